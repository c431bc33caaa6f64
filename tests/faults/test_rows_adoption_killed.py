"""SIGKILL at every step of an adoption by rows: nothing half is left, and the same command goes on."""

from __future__ import annotations

import pytest

from tests.faults.test_adoption_killed import killed
from tests.integration.adoption.conftest import config, fleet
from tests.integration.adoption.test_rows import ACME, project
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.shared_database import MAPPING, SHARED
from tests.support.sources import foreign_database

__all__ = ["config", "fleet", "project"]


@pytest.mark.parametrize("at", ["make tables", "copy public.tasks", "upgrade", "proved"])
async def test_the_same_command_goes_on(fleet: Fleet, postgres: Postgres, at: str) -> None:
    arguments = {"where": ACME, "mapping": MAPPING, "at": "0001"}
    async with foreign_database(postgres, SHARED) as source:
        await killed(fleet, source.url, at, where=ACME, mapping=MAPPING)
        report = await fleet.tenancy.adoption.rows.adopt("acme", source.url, **arguments)  # type: ignore[arg-type]
        assert report.tenant is not None
        assert (report.tenant.status, report.tenant.schema_revision) == ("active", "0002")
    assert await fleet.fetch("acme", "SELECT count(*) FROM tasks") == [(3,)]
    await fleet.provisioner.reconcile()
    assert (await fleet.provisioner.reconcile(check=True)).clean
    (left,) = await fleet.services.control.fetch("SELECT count(*) AS n FROM tenancy.operations WHERE state <> 'done'")
    assert left.n == 0
