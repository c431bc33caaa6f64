"""SIGKILL at every step of an adoption: nothing half is left, the source is as it was, and the same command goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tenancy_orm.errors import OperationStateError, TenantNotFoundError
from tests.integration.adoption.conftest import config, fleet, project
from tests.integration.adoption.test_databases import OLD, state_of
from tests.integration.adoption.test_in_place import RIGHTS
from tests.support.fleet import Fleet
from tests.support.killed import run_killed
from tests.support.postgres import Postgres
from tests.support.sources import foreign_database

__all__ = ["config", "fleet", "project"]


async def killed(fleet: Fleet, url: str, at: str, **options: Any) -> None:
    """Adopt ``url`` as acme in another process that dies at a step."""
    given = fleet.tenancy.config
    task = {
        "config": {
            "control_url": given.control_url,
            "servers": dict(given.servers or {}),
            "migrations": str(given.migrations),
            "encryption_keys": dict(given.encryption_keys or {}),
            "name_prefix": given.name_prefix,
        },
        "arguments": ["acme", url],
        "options": options,
        "at": at,
    }
    await run_killed("adoption_process", task)


@pytest.mark.parametrize("at", ["compare its schema", "copy", "verify", "upgrade", "hand over", "proved", "end"])
async def test_the_same_command_goes_on(fleet: Fleet, postgres: Postgres, at: str) -> None:
    async with foreign_database(postgres, OLD) as source:
        before = await state_of(source)
        await killed(fleet, source.url, at)
        assert await state_of(source) == before
        report = await fleet.tenancy.adoption.adopt("acme", source.url)
        assert report.tenant is not None
        assert (report.tenant.status, report.tenant.schema_revision) == ("active", "0002")
        assert await state_of(source) == before
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(50,)]
    await fleet.provisioner.reconcile()
    assert (await fleet.provisioner.reconcile(check=True)).clean
    (left,) = await fleet.services.control.fetch("SELECT count(*) AS n FROM tenancy.operations WHERE state <> 'done'")
    assert left.n == 0


@pytest.mark.parametrize("at", ["take over", "close", "settle", "mark", "rename", "proved", "upgrade"])
async def test_a_database_in_place_is_never_lost(fleet: Fleet, postgres: Postgres, at: str) -> None:
    """Reconcile leaves it alone; the same command brings it back to how it was, and goes on."""
    async with foreign_database(postgres, OLD) as source:
        await killed(fleet, source.url, at, in_place=True, revoke=True)
        report = await fleet.provisioner.reconcile()
        assert (report.removed, report.finished, report.unknown) == ((), (), ())
        if at != "upgrade":
            assert any("an adoption in place was interrupted" in error for error in report.errors)
        adopted = await fleet.tenancy.adoption.adopt("acme", source.url, in_place=True, revoke=True)
        assert adopted.tenant is not None
        assert (adopted.tenant.status, adopted.tenant.schema_revision) == ("active", "0002")
    assert await fleet.fetch("acme", "SELECT count(*) FROM notes") == [(50,)]
    assert (await fleet.provisioner.reconcile(check=True)).clean
    (left,) = await fleet.services.control.fetch("SELECT count(*) AS n FROM tenancy.operations WHERE state <> 'done'")
    assert left.n == 0


async def test_an_interrupted_adoption_can_be_undone_by_its_number(fleet: Fleet, postgres: Postgres) -> None:
    """Without its URL; what goes on needs that, unless only the record is left to end."""
    async with foreign_database(postgres, OLD) as source:
        before = await source.fetch(RIGHTS)
        for at, options in (("rename", {"in_place": True, "revoke": True}), ("verify", {})):
            await killed(fleet, source.url, at, **options)
            (operation,) = await fleet.tenancy.operations.list("acme")
            with pytest.raises(OperationStateError, match="the URL of its source, which is stored nowhere"):
                await fleet.tenancy.adoption.resume(operation.id)
            await fleet.tenancy.adoption.discard(operation.id)
            assert await source.fetch(RIGHTS) == before
            with pytest.raises(TenantNotFoundError):
                await fleet.tenancy.tenants.get("acme")
            await fleet.provisioner.reconcile()
            assert (await fleet.provisioner.reconcile(check=True)).clean
        report = await fleet.tenancy.adoption.adopt("acme", source.url)
        assert report.operation is not None
        for method in (fleet.tenancy.adoption.resume, fleet.tenancy.adoption.discard):
            with pytest.raises(OperationStateError):
                await method(report.operation)
