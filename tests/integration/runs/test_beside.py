"""No run passes by another one that is paused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from tenancy_orm.errors import RunStateError
from tenancy_orm.runs import Wave, Waves
from tests.integration.migrations.conftest import alembic, variables
from tests.support.alembic_program import Alembic
from tests.support.fleet import Fleet
from tests.support.projects import Project

__all__ = ["alembic", "variables"]

COLUMN = ('op.add_column("notes", sa.Column("title", sa.Text))', 'op.drop_column("notes", "title")')
CANARY = Waves((Wave(name="canary", tenants=["acme"], pause=True),))


async def revisions(fleet: Fleet) -> list[str | None]:
    return [await fleet.revision(slug) for slug in ("acme", "globex", "initech")]


async def test_a_paused_run_is_not_passed_by(fleet: Fleet, project: Project, alembic: Alembic) -> None:
    """Every command says which run it is, why it is paused, and what to do; the tenants that wait stay as they are."""
    migrations = fleet.migrations
    await migrations.upgrade("0001", tenants=["initech"])
    project.add("0002", *COLUMN, down="0001")
    assert (await migrations.upgrade(waves=CANARY)).run == 2
    message = (
        r"run 2 \(upgrade head\) is paused: paused before wave 2 \(rest\), as planned. "
        "{} of it are still to be migrated"
    )
    starts: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        ("2 tenants", migrations.upgrade),
        ("1 tenant", partial(migrations.upgrade, tenants=["acme", "globex"])),
        ("2 tenants", partial(migrations.downgrade, "base")),
    ]
    for number, start in starts:
        with pytest.raises(RunStateError, match=message.format(number)) as refused:
            await start()
        assert refused.value.run == 2
    printed = await alembic("upgrade", "head", ok=False)
    for part in ("run 2 (upgrade head) is paused", "migrate resume 2", "migrate cancel 2", "-x beside=true"):
        assert part in printed
    assert await revisions(fleet) == ["0002", "0001", "0001"]
    assert len(await migrations.runs()) == 2, "none was recorded"

    assert (await migrations.downgrade("0001", tenants=["acme"])).ok, "the run does not go on with it"
    await alembic("-x", "tenant=globex", "-x", "beside=true", "upgrade", "head")
    assert await revisions(fleet) == ["0001", "0002", "0001"]
    await migrations.cancel(2)
    assert (await migrations.upgrade()).ok


async def test_an_undo_is_refused_before_it_cancels_its_run(fleet: Fleet, project: Project) -> None:
    """Its own paused run is not in its way; another one is, and leaves it as it is."""
    migrations = fleet.migrations
    project.add("0002", *COLUMN, down="0001")
    assert (await migrations.upgrade(waves=CANARY)).run == 1
    waves = Waves((Wave(tenants=["globex"], pause=True),))
    assert (await migrations.upgrade(tenants=["globex", "acme"], waves=waves, beside=True)).state == "paused"
    with pytest.raises(RunStateError, match=r"run 2 .* is paused"):
        await migrations.undo(1)
    assert (await migrations.get_run(1)).state == "paused"
    assert (await migrations.undo(1, beside=True, leave_moved=True)).ok
    await migrations.cancel(2)
    assert (await migrations.upgrade(waves=CANARY)).run == 4
    assert (await migrations.undo(4)).ok, "a paused run can be undone"
