"""Migrations, seeds and reference data that a move overtakes: they change the database that the tenant has then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, Table
from sqlalchemy.ext.asyncio import AsyncSession

from tenancy_orm import Tenancy
from tenancy_orm.config import ProvisioningConfig
from tenancy_orm.operations import Switch
from tenancy_orm.operations.switch import Paused
from tenancy_orm.seeds import SeedManager, seed
from tests.support.fleet import open_fleet
from tests.support.moving import Pair, moving_config
from tests.support.projects import NOTES, Project
from tests.support.waiting import until

pytestmark = pytest.mark.new_installation

WAITS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%tenancy-migration%'"


async def test_a_migration_that_waits_for_a_move_changes_the_new_database(
    pair: Pair, control_url: str, name_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has found the tenant on the old server, and gets the lock there once the move has ended."""
    project = Project.create(tmp_path / "app")
    project.add("0001", NOTES, 'op.drop_table("notes")')
    config = moving_config(pair, control_url, name_prefix, metadata=None, migrations=str(project.migrations))
    original = Switch._close
    runs: list[asyncio.Task[object]] = []
    async with open_fleet(config, initialise=True) as fleet:
        (acme,) = await fleet.create("acme", server="one")
        project.add("0002", 'op.add_column("notes", sa.Column("extra", sa.Text))', down="0001")

        async def close(switch: Switch, paused: Paused, *arguments: object) -> None:
            await original(switch, paused, *arguments)  # type: ignore[arg-type]
            runs.append(asyncio.create_task(fleet.migrations.upgrade()))
            await until(lambda: pair.rows(acme, WAITS) != [(0,)], seconds=60.0)

        monkeypatch.setattr(Switch, "_close", close)
        await fleet.tenancy.moves.move("acme", to="two")
        await asyncio.gather(*runs)
        assert await fleet.columns("acme") == ["id", "body", "extra"]
        assert await fleet.recorded("acme") == await fleet.revision("acme") == "0002"
        # the former database is as it was
        columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'notes'::regclass AND attname = 'extra'"
        assert pair.rows(acme, columns) == [(0,)]


async def test_seeds_that_a_move_has_overtaken_come_to_the_new_database(
    pair: Pair, control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run as the owner, whom no pause keeps away; in the former database they would be lost."""
    metadata = MetaData()
    roles = Table("roles", metadata, Column("name", String, primary_key=True))

    async def add(session: AsyncSession) -> None:
        await session.execute(roles.insert().values(name="clerk"))

    config = moving_config(pair, control_url, name_prefix, metadata=metadata)
    original = SeedManager._apply
    listed, moved = asyncio.Event(), asyncio.Event()

    async def apply(manager: SeedManager, *arguments: Any, **options: Any) -> None:
        # it knows where the tenant is
        listed.set()
        await moved.wait()
        await original(manager, *arguments, **options)

    monkeypatch.setattr(SeedManager, "_apply", apply)
    async with open_fleet(config, initialise=True) as fleet:
        await fleet.create("acme", server="one")
        seeded = config.replace(provisioning=ProvisioningConfig(seeds=(seed(name="clerk", template=True)(add),)))
        async with Tenancy(seeded) as other:
            run = asyncio.create_task(other.seeds.apply())
            await listed.wait()
            await fleet.tenancy.moves.move("acme", to="two")
            moved.set()
            report = await run
        assert report.outcomes[0].applied == {"clerk": 1}
        assert await fleet.fetch("acme", "SELECT name FROM roles") == [("clerk",)]
