"""The marker: a connection proves which tenant's database it is, before anything else uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm.config import TenancyConfig
from tenancy_orm.errors import MarkerMismatchError
from tenancy_orm.events import EventBus, IsolationIncident
from tenancy_orm.routing import Router, connector, marker
from tenancy_orm.tenant import Tenant
from tests.support import databases as support
from tests.support.databases import Databases, moved
from tests.support.postgres import Postgres
from tests.support.waiting import until


@pytest.fixture
def config(postgres: Postgres, name_prefix: str) -> TenancyConfig:
    """A small budget."""
    return support.configuration(postgres, name_prefix)


@pytest.fixture
async def made(postgres: Postgres, config: TenancyConfig) -> AsyncIterator[Databases]:
    """A maker of tenants."""
    async with support.databases(postgres, config) as made:
        yield made


@pytest.fixture
def events() -> EventBus:
    """The events of incidents."""
    return EventBus()


@pytest.fixture
async def router(made: Databases, events: EventBus, config: TenancyConfig) -> AsyncIterator[Router]:
    """A router to them."""
    async with support.router(made, config, events=events) as router:
        yield router


async def swapped(made: Databases) -> tuple[Tenant, Tenant]:
    """Two tenants with registry rows that name each other's database, where PostgreSQL itself admits both."""
    a, b = await made.create("acme"), await made.create("globex")
    assert a.placement is not None and b.placement is not None
    for role, database in ((a.placement.role, b.placement.database), (b.placement.role, a.placement.database)):
        await made.admin.execute(f"GRANT CONNECT ON DATABASE {database} TO {role}")
        async with made.postgres.connect(database) as inside:
            await inside.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
            await inside.execute("INSERT INTO notes (body) VALUES ('secret of ' || current_database())")
    return moved(a, database=b.placement.database), moved(b, database=a.placement.database)


async def read(router: Router, tenant: Tenant) -> list[Any]:
    async with router.session(tenant) as session:
        return list(await session.scalars(text("SELECT body FROM notes")))


async def test_without_the_check_swapped_rows_show_each_other_s_data(
    made: Databases, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check is for: the attack works where it is off."""

    async def believe(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr(connector, "verify", believe)
    for tenant in await swapped(made):
        assert tenant.placement is not None
        assert await read(router, tenant) == [f"secret of {tenant.placement.database}"]


async def test_two_tenants_with_swapped_rows_are_both_refused(
    made: Databases, router: Router, events: EventBus
) -> None:
    """Before anything is read, with the connection closed, and told."""
    told: list[IsolationIncident] = []
    events.subscribe(IsolationIncident, told.append)
    a, b = await swapped(made)
    for tenant, other in ((a, b), (b, a)):
        assert tenant.placement is not None
        with pytest.raises(MarkerMismatchError) as caught:
            await read(router, tenant)
        assert caught.value.tenant == tenant.slug
        assert caught.value.database == tenant.placement.database
        assert caught.value.expected == marker.marker_text(made.installation, tenant.id)
        assert caught.value.found == marker.marker_text(made.installation, other.id)
    assert [(event.slug, event.kind) for event in told] == [
        ("acme", "MarkerMismatchError"),
        ("globex", "MarkerMismatchError"),
    ]
    await until(lambda: router.statistics().servers["default"].open == 0)
    assert await made.sessions() == 0


async def test_every_new_connection_is_checked(made: Databases, router: Router) -> None:
    """Not the first one alone."""
    a = await made.create()
    assert a.placement is not None
    async with router.connection(a):
        await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS 'tenancy:of:another'")
        with pytest.raises(MarkerMismatchError):
            await read(router, a)


async def test_a_database_without_a_marker_is_nobody_s(made: Databases, router: Router) -> None:
    """One that was adopted, or restored by hand."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS NULL")
    with pytest.raises(MarkerMismatchError) as caught:
        await read(router, a)
    assert caught.value.found is None


async def test_the_marker_of_another_installation_does_not_pass(made: Databases, router: Router) -> None:
    """Two control databases can share a server."""
    a = await made.create()
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS '{marker.marker_text(uuid4(), a.id)}'")
    with pytest.raises(MarkerMismatchError):
        await read(router, a)


async def test_a_tenant_cannot_forge_a_marker(made: Databases, router: Router) -> None:
    """Neither by a comment of its own, nor by names that stand before the catalogue's in its search_path."""
    a, b = await made.create("acme"), await made.create("globex")
    assert a.placement is not None and b.placement is not None
    forged = marker.marker_text(made.installation, a.id)
    role, database = a.placement.role, b.placement.database
    # even where it may do far more than it should: a schema, functions and operators of its own in the other database
    await made.admin.execute(f"GRANT CONNECT, CREATE ON DATABASE {database} TO {role}")
    login = await asyncpg.connect(made.postgres.url(database, user=role, password=made.passwords[a.id]), timeout=10)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await login.execute(f"COMMENT ON DATABASE {database} IS '{forged}'")
        await login.execute(
            f"""
            CREATE SCHEMA evil;
            CREATE FUNCTION evil.current_database() RETURNS name LANGUAGE sql
                AS $$ SELECT '{a.placement.database}'::name $$;
            CREATE FUNCTION evil.yes(text, text) RETURNS bool LANGUAGE sql AS $$ SELECT true $$;
            CREATE FUNCTION evil.yes(oid, oid) RETURNS bool LANGUAGE sql AS $$ SELECT true $$;
            CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.yes);
            CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.yes);
            CREATE TABLE evil.pg_shdescription AS SELECT * FROM pg_catalog.pg_shdescription;
            UPDATE evil.pg_shdescription SET description = '{forged}';
            ALTER ROLE {role} SET search_path = evil, pg_catalog
            """
        )
        await login.execute("SET search_path = evil, pg_catalog")
        assert await login.fetchval("SELECT current_database()") == a.placement.database, "the names do stand before"
    finally:
        await login.close()
    with pytest.raises(MarkerMismatchError):
        await read(router, moved(a, database=database))


async def test_a_dead_check_lets_nothing_through(made: Databases, router: Router) -> None:
    """Cancelled or failing in the middle of the check: no connection is handed out unproved."""
    a = await made.create()
    task = asyncio.create_task(read(router, a))
    await until(lambda: router.statistics().servers["default"].opening == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert a.placement is not None
    await made.admin.execute(f"COMMENT ON DATABASE {a.placement.database} IS NULL")
    await until(lambda: router.statistics().servers["default"].opening == 0)
    router.retire(a.id)
    with pytest.raises(MarkerMismatchError):
        await read(router, a)
