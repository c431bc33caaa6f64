"""A source's own code gains no rights by an adoption, whatever differences are accepted."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tenancy_orm.adoption import in_place, looking
from tenancy_orm.drift.policy import RevisionPolicy
from tenancy_orm.errors import AdoptionError, TenantNotFoundError
from tests.integration.adoption.conftest import config, fleet, project
from tests.integration.adoption.test_databases import OLD
from tests.support.fleet import Fleet
from tests.support.postgres import Postgres
from tests.support.sources import foreign_database

__all__ = ["config", "fleet", "project"]

# the owner of all tenants' databases may grant this
HOSTILE = """
CREATE FUNCTION let_in(database text, role text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', database, role); END $$;
"""


async def attack(fleet: Fleet, postgres: Postgres, slug: str) -> None:
    """As the tenant: call the function, and connect to globex's database."""
    place = (await fleet.tenancy.tenants.get(slug)).placement
    assert place is not None
    password = fleet.provisioner.password(await fleet.tenancy.tenants.get(slug))
    victim = fleet.database("globex")
    connection = await asyncpg.connect(postgres.url(place.database, user=place.role, password=password))
    try:
        await connection.execute("SELECT let_in($1, $2)", victim, place.role)
    finally:
        await connection.close()
    connection = await asyncpg.connect(postgres.url(victim, user=place.role, password=password))
    await connection.close()


@pytest.mark.parametrize("options", [{}, {"in_place": True, "revoke": True}])
async def test_a_function_of_the_source_never_runs_as_the_owner(
    fleet: Fleet, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    await fleet.create("globex")

    async def unchecked(*_: Any, **__: Any) -> None:
        pass

    async with foreign_database(postgres, OLD + HOSTILE) as source:
        with monkeypatch.context() as patch:
            for module in (looking, in_place):
                patch.setattr(module, "code_of", lambda *_: ())
            patch.setattr(RevisionPolicy, "check", unchecked)
            patch.setattr(RevisionPolicy, "align", unchecked)
            await fleet.tenancy.adoption.adopt("naive", source.url, accept_differences=True, **options)
            await attack(fleet, postgres, "naive")
    async with foreign_database(postgres, OLD + HOSTILE) as source:
        with pytest.raises(AdoptionError, match=r"function public\.let_in"):
            await fleet.tenancy.adoption.adopt("acme", source.url, accept_differences=True, **options)
        with pytest.raises(TenantNotFoundError):
            await fleet.tenancy.tenants.get("acme")
