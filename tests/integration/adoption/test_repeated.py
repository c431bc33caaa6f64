"""Adoptions that are repeated: what is complete, what is not any more, and what was left for later."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tenancy_orm.adoption import contents
from tenancy_orm.adoption.looking import Looking
from tenancy_orm.adoption.source import Source, open_source
from tenancy_orm.errors import AdoptionError, ControlUnavailableError, TenantExistsError
from tenancy_orm.jobs.claims import Claimant
from tenancy_orm.migrations.connections import Connections
from tenancy_orm.operations import Operations
from tenancy_orm.runs import FleetMigrator
from tests.integration.adoption.test_databases import OLD
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.sources import foreign_database


async def test_a_deleted_tenant_is_not_said_to_be_complete(fleet: Fleet, postgres: Postgres) -> None:
    """Nor one that another process adopts at this moment."""
    adopt = fleet.tenancy.adoption.adopt
    async with foreign_database(postgres, OLD) as source:
        report = await adopt("acme", source.url)
        assert report.tenant is not None
        operations, claimant = Operations(fleet.services.control), Claimant()
        begun = await operations.begin("adopt", report.tenant.id, step="take over", claimant=claimant)
        with pytest.raises(AdoptionError, match="adopts 'acme' now"):
            await adopt("acme", source.url)
        await operations.finish(begun, claimant, "failed")
        await fleet.tenancy.tenants.delete("acme")
        with pytest.raises(TenantExistsError, match="already exists; choose another slug"):
            await adopt("acme", source.url)
        await fleet.tenancy.tenants.purge("acme")
        assert (await adopt("acme", source.url)).api_key is not None


async def test_revisions_that_a_database_in_place_lacks_are_run_by_the_same_command(
    fleet: Fleet, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops them is said, with the key of the tenant, which is active."""

    async def refuse(*_: Any, **__: Any) -> Any:
        raise ControlUnavailableError("it does not answer")

    adopt = fleet.tenancy.adoption.adopt
    async with foreign_database(postgres, OLD) as source:
        with monkeypatch.context() as patch:
            patch.setattr(FleetMigrator, "upgrade", refuse)
            report = await adopt("acme", source.url, in_place=True, revoke=True)
        assert report.api_key is not None and "run tenancy migrate upgrade: it does not answer" in report.notes[-1]
        assert await fleet.recorded("acme") == "0001"
        again = await adopt("acme", source.url, in_place=True, revoke=True)
        assert again.pending == "0002" and again.tenant is not None and again.tenant.schema_revision == "0002"
        assert await fleet.revision("acme") == "0002"


async def test_a_database_of_another_encoding_is_copied_and_not_taken_over(fleet: Fleet, postgres: Postgres) -> None:
    name = postgres.new_name("old")
    await postgres.administer(f"CREATE DATABASE \"{name}\" ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        async with postgres.connect(name) as connection:
            await connection.execute(OLD)
        with pytest.raises(AdoptionError, match=r"encoding LATIN1.*adopt a copy"):
            await fleet.tenancy.adoption.adopt("acme", postgres.url(name), in_place=True, revoke=True)
        report = await fleet.tenancy.adoption.adopt("acme", postgres.url(name))
        assert report.tenant is not None
        assert await fleet.fetch("acme", "SHOW server_encoding") == [("UTF8",)]
    finally:
        await postgres.drop_database(name)


async def test_the_look_at_a_source_ends(fleet: Fleet, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the time of an adoption, however long a table takes to be counted."""

    async def endless(*_: Any) -> int:
        await asyncio.Event().wait()
        return 0

    services = fleet.services
    slow = replace(services, config=services.config.replace(adoption={"timeout": 0.2}))
    monkeypatch.setattr(contents, "count_rows", endless)
    looking = Looking(slow, Connections(slow), None)
    async with (
        foreign_database(postgres, OLD) as source,
        open_source(Source.parse(source.url), timeout=30) as opened,
    ):
        with pytest.raises(AdoptionError, match=r"within 0\.2 s; raise adoption\.timeout"):
            await looking.contents(opened)
