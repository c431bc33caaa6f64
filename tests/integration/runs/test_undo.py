"""The undo of a run brings each tenant to the revision that it had, and names beforehand what cannot go back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm.errors import ConfigurationError, MigrationError, RunNotFoundError, RunStateError, UndoRefusedError
from tenancy_orm.jobs import Claimant
from tenancy_orm.runs import Wave, Waves, catch_up
from tenancy_orm.runs.undo import Undo
from tests.support.fleet import Fleet
from tests.support.projects import Project
from tests.support.waiting import until


def add_column(
    project: Project, revision: str, down: str | tuple[str, ...], *, before: str = "", back: bool = True
) -> None:
    """A revision that adds a column named after it."""
    name = f"c{revision}"
    project.add(
        revision,
        f'{before}\nop.add_column("notes", sa.Column("{name}", sa.Text))',
        f'op.drop_column("notes", "{name}")' if back else "pass",
        down=down,
    )


FILL = """

from tenancy_orm.migrations import data_migration


@data_migration(table="notes")
def fill(batch):
    return f"UPDATE notes SET c0002 = 'filled' WHERE {batch.rows}"


@fill.reverse
def empty(batch):
    return f"UPDATE notes SET c0002 = NULL WHERE {batch.rows}"
"""

FAILS_FOR = """
tenant = op.get_context().opts["tenant"]
if tenant is not None and tenant.slug == "{}":
    raise RuntimeError("broken here")
"""


async def revisions(fleet: Fleet) -> dict[str, str | None]:
    """The revision of each tenant, in its database; the registry must agree."""
    found = await fleet.migrations.status(verify=True)
    assert all(one.is_recorded for one in found)
    return {one.slug: one.revision for one in found}


async def schema(fleet: Fleet, slug: str) -> set[str]:
    """The columns that revisions after 0001 have added."""
    return {name for name in await fleet.columns(slug) if name.startswith("c")}


async def test_each_tenant_goes_back_to_its_own_revision(fleet: Fleet, project: Project) -> None:
    """Not all to one; who was not touched stays; who is new stays until asked for; nobody is upgraded by itself."""
    add_column(project, "0002", "0001")
    await fleet.migrations.upgrade(tenants=["globex"])
    add_column(project, "0003", "0002")
    await fleet.migrations.upgrade(tenants=["initech"])
    upgraded = await fleet.migrations.upgrade()
    await fleet.create("newcomer")
    assert upgraded.run is not None
    assert set((await revisions(fleet)).values()) == {"0003"}

    plan = await fleet.migrations.plan_undo(upgraded.run)
    assert {one.slug: (one.revision, one.target) for one in plan.tenants} == {
        "acme": ("0003", "0001"),
        "globex": ("0003", "0002"),
    }
    assert (plan.untouched, plan.new, plan.new_target, plan.ok) == (("initech",), ("newcomer",), None, True)
    with pytest.raises(MigrationError, match=r"not known where new ones go \(newcomer\)"):
        await fleet.migrations.undo(upgraded.run, include_new=True)
    assert set((await revisions(fleet)).values()) == {"0003"}

    undone = await fleet.migrations.undo(upgraded.run)
    undone.raise_for_failures()
    assert (undone.command, undone.target) == ("undo", f"run {upgraded.run}")
    record = await fleet.migrations.get_run(undone.run or 0)
    assert (record.undoes, record.state, record.tenants["done"]) == (upgraded.run, "done", 2)
    now = {"acme": "0001", "globex": "0002", "initech": "0003", "newcomer": "0003"}
    assert await revisions(fleet) == now
    assert [await schema(fleet, slug) for slug in ("acme", "globex", "initech")] == [
        set(),
        {"c0002"},
        {"c0002", "c0003"},
    ]
    # the code that could upgrade them is still here: neither after the fleet nor before their use
    assert await fleet.registry.fleet_revision() is None
    assert await fleet.registry.behind("0003") == []
    assert (await catch_up.CatchUp(fleet.migrations, fleet.services.schema).run()).upgraded == ()
    assert await revisions(fleet) == now

    again = await fleet.migrations.plan_undo(upgraded.run)
    assert (again.tenants, again.untouched) == ((), ("acme", "globex", "initech"))
    news = await fleet.migrations.undo(upgraded.run, include_new=True, new_revision="0001")
    assert [one.slug for one in news.changed] == ["newcomer"]
    assert (await revisions(fleet))["newcomer"] == "0001"

    redone = await fleet.migrations.undo(undone.run or 0)
    assert redone.ok
    assert [tenant.slug for tenant in await fleet.registry.behind("0004")] == ["acme", "globex", "initech"]
    assert await revisions(fleet) == {**now, "acme": "0003", "globex": "0003", "newcomer": "0001"}


async def test_new_tenants_go_where_all_the_others_do(fleet: Fleet, project: Project) -> None:
    """Also those that were created while the run was under way, which it found at its target."""
    add_column(project, "0002", "0001")
    paused = await fleet.migrations.upgrade(waves=Waves((Wave(tenants="acme", pause=True),)))
    await fleet.create("meanwhile")
    assert paused.run is not None
    await fleet.migrations.resume(paused.run)
    await fleet.create("later")
    plan = await fleet.migrations.plan_undo(paused.run)
    assert (plan.new, plan.new_target) == (("meanwhile", "later"), "0001")
    undone = await fleet.migrations.undo(paused.run, include_new=True)
    assert undone.ok
    assert set((await revisions(fleet)).values()) == {"0001"}
    assert await fleet.registry.fleet_revision() == "0001"
    # older code finds what it left, and newer code does not begin by itself
    assert (await catch_up.CatchUp(fleet.migrations, fleet.services.schema).run()).upgraded == ()


async def test_a_run_that_ended_in_the_middle_is_undone(fleet: Fleet, project: Project) -> None:
    """One tenant is done, one failed between two revisions, one was not begun."""
    project.configure("target_metadata=target_metadata, transaction_per_migration=True")
    add_column(project, "0002", "0001")
    add_column(project, "0003", "0002", before=FAILS_FOR.format("globex"))
    failed = await fleet.migrations.upgrade(concurrency=1, stop_on_failure=True)
    assert failed.run is not None
    assert await revisions(fleet) == {"acme": "0003", "globex": "0002", "initech": "0001"}
    undone = await fleet.migrations.undo(failed.run)
    assert sorted(one.slug for one in undone.changed) == ["acme", "globex"]
    assert await revisions(fleet) == {"acme": "0001", "globex": "0001", "initech": "0001"}


@pytest.mark.parametrize("stop", ["cancel", "pause"])
async def test_a_tenant_that_is_still_being_migrated_is_not_left_behind(
    fleet: Fleet, project: Project, stop: str
) -> None:
    """Its database has the old revision until the change is committed: it would count as one that was not touched."""
    add_column(project, "0002", "0001", before='op.execute("SELECT pg_sleep(2)")')
    running = asyncio.create_task(fleet.migrations.upgrade(concurrency=1))

    async def is_begun() -> bool:
        return any(one.tenants["running"] for one in await fleet.migrations.runs())

    await until(is_begun)
    (run,) = await fleet.migrations.runs()
    await getattr(fleet.migrations, stop)(run.id)
    for planned in (fleet.migrations.plan_undo(run.id), fleet.migrations.undo(run.id)):
        with pytest.raises(RunStateError, match=r"undone while tenants are being migrated \(acme\); try again once"):
            await planned
    await running
    assert len(await fleet.migrations.runs()) == 1
    assert (await fleet.migrations.undo(run.id)).ok
    assert set((await revisions(fleet)).values()) == {"0001"}


async def test_a_run_that_was_resumed_since_its_undo_was_planned_is_not_cancelled(
    fleet: Fleet, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan would be without what its processes have changed in the meantime."""
    add_column(project, "0002", "0001")
    paused = await fleet.migrations.upgrade(waves=Waves((Wave(tenants="acme", pause=True),)))
    assert paused.run is not None
    original = Undo.plan

    async def plan(*args: Any, **options: Any) -> Any:
        found = await original(*args, **options)
        await fleet.migrations._recorded.records.reopen(paused.run or 0, Claimant())
        return found

    monkeypatch.setattr(Undo, "plan", plan)
    with pytest.raises(RunStateError, match="is running, and cannot be undone; cancel it first"):
        await fleet.migrations.undo(paused.run)
    assert (await revisions(fleet))["acme"] == "0002"


async def test_a_paused_run_is_not_cancelled_for_waves_that_cannot_be(fleet: Fleet, project: Project) -> None:
    """The undo names them first; it has only tenants that the run has reached."""
    add_column(project, "0002", "0001")
    paused = await fleet.migrations.upgrade(waves=Waves((Wave(tenants="acme", pause=True),)))
    assert paused.run is not None
    for planned in (fleet.migrations.plan_undo, fleet.migrations.undo):
        with pytest.raises(ConfigurationError, match="'globex', which is not a tenant of this run"):
            await planned(paused.run, waves=Waves((Wave(tenants="globex"),)))
    assert (await fleet.migrations.get_run(paused.run)).state == "paused"


async def test_an_undo_is_a_run_that_can_be_resumed(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """With waves; the targets are recorded, so that a retry brings each tenant to its own."""
    mended = tmp_path / "mended"
    add_column(project, "0002", "0001")
    await fleet.migrations.upgrade(tenants=["globex"])
    add_column(project, "0003", "0002")
    path = project.migrations / "versions" / "0003.py"
    broken = f'if not __import__("pathlib").Path("{mended}").exists(): raise RuntimeError("broken")'
    path.write_text(path.read_text().replace("    op.drop_column", f"    {broken}\n    op.drop_column"))
    upgraded = await fleet.migrations.upgrade()
    assert upgraded.run is not None
    waves = Waves((Wave(name="canary", tenants="globex"),))
    paused = await fleet.migrations.undo(upgraded.run, waves=waves)
    assert paused.run is not None
    assert (paused.state, len(paused.failures)) == ("paused", 1)
    assert set((await revisions(fleet)).values()) == {"0003"}
    mended.touch()
    done = await fleet.migrations.retry(paused.run)
    assert (done.state, done.ok) == ("done", True)
    assert await revisions(fleet) == {"acme": "0001", "globex": "0002", "initech": "0001"}


async def test_what_has_no_downgrade_is_named_before_anything_starts(fleet: Fleet, project: Project) -> None:
    """Alembic would run the empty function, move the version table, and leave the column."""
    add_column(project, "0002", "0001", back=False)
    add_column(project, "0003", "0002")
    upgraded = await fleet.migrations.upgrade()
    assert upgraded.run is not None
    plan = await fleet.migrations.plan_undo(upgraded.run)
    assert (dict(plan.irreversible), plan.ok) == ({"0002": "its downgrade() does nothing"}, False)
    with pytest.raises(UndoRefusedError, match=r"revision 0002: its downgrade\(\) does nothing") as refused:
        await fleet.migrations.undo(upgraded.run)
    assert refused.value.irreversible == {"0002": "its downgrade() does nothing"}
    assert set((await revisions(fleet)).values()) == {"0003"}
    assert len(await fleet.migrations.runs()) == 1

    await fleet.migrations.downgrade("0001", tenants=["initech"])
    assert (await fleet.revision("initech"), await schema(fleet, "initech")) == ("0001", {"c0002"})

    path = project.migrations / "versions" / "0002.py"
    path.write_text(path.read_text().partition("def downgrade")[0])
    assert (await fleet.migrations.plan_undo(upgraded.run)).irreversible == {"0002": "it has no downgrade()"}
    assert (await fleet.migrations.undo(upgraded.run, stamp_irreversible=True)).ok
    assert set((await revisions(fleet)).values()) == {"0001"}
    assert await schema(fleet, "acme") == {"c0002"}


async def test_a_revision_that_is_only_forgotten_reverses_no_data(fleet: Fleet, project: Project) -> None:
    """What it did stays, its rows as well; a data migration that nothing reverses is named like an empty downgrade."""
    add_column(project, "0002", "0001", back=False)
    path = project.migrations / "versions" / "0002.py"
    path.write_text(path.read_text() + FILL)
    project.add("0003", "pass", "pass", down="0002")
    path = project.migrations / "versions" / "0003.py"
    path.write_text(path.read_text() + FILL.partition("@fill.reverse")[0])
    await fleet.execute("acme", "INSERT INTO notes (body) VALUES ('x')")
    upgraded = await fleet.migrations.upgrade()
    assert upgraded.run is not None
    assert (await fleet.migrations.plan_undo(upgraded.run)).irreversible == {
        "0002": "its downgrade() does nothing",
        "0003": "its data migration fill has no reverse",
    }
    assert (await fleet.migrations.undo(upgraded.run, stamp_irreversible=True)).ok
    assert set((await revisions(fleet)).values()) == {"0001"}
    assert await fleet.fetch("acme", "SELECT c0002 FROM notes") == [("filled",)]


async def test_who_was_moved_on_is_left_to_a_decision(fleet: Fleet, project: Project) -> None:
    """A later run, or somebody by hand: named, and refused; the later run can be undone first."""
    add_column(project, "0002", "0001")
    first = await fleet.migrations.upgrade()
    add_column(project, "0003", "0002")
    second = await fleet.migrations.upgrade(tenants=["acme"])
    assert first.run is not None
    assert second.run is not None
    with pytest.raises(UndoRefusedError, match=f"tenant acme: run {second.run} has moved it to 0003") as refused:
        await fleet.migrations.undo(first.run)
    assert set(refused.value.moved) == {"acme"}
    assert await revisions(fleet) == {"acme": "0003", "globex": "0002", "initech": "0002"}

    only = await fleet.migrations.undo(first.run, tenants=["globex"])
    assert [one.slug for one in only.changed] == ["globex"]
    assert (await fleet.migrations.undo(first.run, leave_moved=True)).ok
    assert await revisions(fleet) == {"acme": "0003", "globex": "0001", "initech": "0001"}
    await fleet.migrations.undo(second.run)
    assert (await fleet.migrations.undo(first.run)).ok
    assert set((await revisions(fleet)).values()) == {"0001"}
    with pytest.raises(MigrationError, match="'globex' was not in run"):
        await fleet.migrations.undo(second.run, tenants=["globex"])
    with pytest.raises(RunNotFoundError):
        await fleet.migrations.undo(999)


async def test_heads_branches_and_merges_are_undone(fleet: Fleet, project: Project) -> None:
    """Each tenant has its own set of heads: one was on one branch, one on both, one on none."""
    add_column(project, "a", "0001")
    add_column(project, "b", "0001")
    await fleet.migrations.upgrade("a", tenants=["acme", "globex"])
    await fleet.migrations.upgrade("b", tenants=["globex"])
    project.add("m", down=("a", "b"))
    add_column(project, "z", "m")
    upgraded = await fleet.migrations.upgrade()
    assert upgraded.run is not None
    assert set((await revisions(fleet)).values()) == {"z"}
    assert (await fleet.migrations.undo(upgraded.run)).ok
    assert await revisions(fleet) == {"acme": "a", "globex": "a,b", "initech": "0001"}
    assert [await schema(fleet, slug) for slug in ("acme", "globex", "initech")] == [{"ca"}, {"ca", "cb"}, set()]


async def test_downgrades_and_stamps_are_undone_as_well(fleet: Fleet, project: Project) -> None:
    """A downgrade by the upgrade, a stamp by a stamp, which changes no schema; extensions are not removed."""
    add_column(project, "0002", "0001")
    await fleet.migrations.upgrade()
    down = await fleet.migrations.downgrade("base")
    assert (await fleet.migrations.undo(down.run or 0)).ok
    assert set((await revisions(fleet)).values()) == {"0002"}
    assert await schema(fleet, "acme") == {"c0002"}
    stamped = await fleet.migrations.stamp("base")
    undone = await fleet.migrations.undo(stamped.run or 0)
    assert (undone.ok, await schema(fleet, "acme")) == (True, {"c0002"})
    again = await fleet.migrations.undo(undone.run or 0)
    assert (again.ok, set((await revisions(fleet)).values()), await schema(fleet, "acme")) == (True, {None}, {"c0002"})
    extensions: Any = await fleet.migrations.install_extensions()
    with pytest.raises(MigrationError, match="installed extensions"):
        await fleet.migrations.undo(extensions.run)


async def test_a_run_that_changed_nothing_is_not_undone(fleet: Fleet, project: Project) -> None:
    """It says so, records no run without tenants, and leaves a paused run as it is."""
    add_column(project, "0002", "0001")
    paused = await fleet.migrations.upgrade(waves=Waves((Wave(tenants="acme", pause=True),)))
    assert paused.run is not None
    with pytest.raises(MigrationError, match=r"has nothing to undo: no tenant has another revision than before it$"):
        await fleet.migrations.undo(paused.run, tenants=["globex"])
    assert (await fleet.migrations.get_run(paused.run)).state == "paused"
    await fleet.migrations.undo(paused.run)
    await fleet.create("newcomer")
    before = await fleet.migrations.runs()
    with pytest.raises(MigrationError, match=r"than before it; created since it: 1 tenant, which --include-new"):
        await fleet.migrations.undo(paused.run)
    assert await fleet.migrations.runs() == before


@pytest.mark.parametrize("how", ["retry", "resume"])
async def test_an_undo_that_goes_on_does_not_take_back_what_came_after_it(
    fleet: Fleet, project: Project, tmp_path: Path, how: str
) -> None:
    """It was planned, and agreed to, from where each tenant was then."""
    mended = tmp_path / "mended"
    project.add(
        "0002",
        'op.add_column("notes", sa.Column("c0002", sa.Text))',
        f'''if not __import__("pathlib").Path("{mended}").exists(): raise RuntimeError("broken")
op.drop_column("notes", "c0002")''',
        down="0001",
    )
    add_column(project, "0003", "0002", back=False)
    upgraded = await fleet.migrations.upgrade("0002")
    assert upgraded.run is not None
    undo = await fleet.migrations.undo(upgraded.run, max_failures=1, concurrency=1)
    assert undo.run is not None
    assert (undo.state, len(undo.failures), len(undo.skipped)) == ("failed", 1, 2)
    mended.touch()
    assert (await fleet.migrations.upgrade()).ok
    again = await (fleet.migrations.retry if how == "retry" else fleet.migrations.resume)(undo.run)
    assert again.state == "failed"
    assert "another run has moved it to 0003; undo that first" in set(again.reasons.values())
    assert set((await revisions(fleet)).values()) == {"0003"}


async def test_what_a_later_run_has_done_in_its_place_is_named(fleet: Fleet, project: Project, tmp_path: Path) -> None:
    """It failed for a tenant, which another run has upgraded since: that is not taken back with it."""
    mended = tmp_path / "mended"
    acme = 't is not None and t.slug == "acme"'
    broken = f'if {acme} and not __import__("pathlib").Path("{mended}").exists(): raise RuntimeError("broken")'
    up = f't = op.get_context().opts["tenant"]\n{broken}\nop.add_column("notes", sa.Column("c0002", sa.Text))'
    project.add("0002", up, 'op.drop_column("notes", "c0002")', down="0001")
    first = await fleet.migrations.upgrade()
    assert first.run is not None
    mended.touch()
    second = await fleet.migrations.upgrade(tenants=["acme"])
    assert second.ok
    plan = await fleet.migrations.plan_undo(first.run)
    assert dict(plan.moved) == {"acme": f"run {second.run} has moved it to 0002 since; undo that run first"}
    assert sorted(one.slug for one in plan.tenants) == ["globex", "initech"]
    # what was moved and came back is where this run has brought it
    await fleet.migrations.downgrade("0001", tenants=["globex"])
    await fleet.migrations.upgrade(tenants=["globex"])
    assert "globex" not in (await fleet.migrations.plan_undo(first.run)).moved
