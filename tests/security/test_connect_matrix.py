"""Every ordered pair of a tenant's role and a database: only its own admits it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

from tenancy_orm.provisioning.creation.pipeline import Creation
from tenancy_orm.provisioning.server_objects import databases
from tenancy_orm.tenant import Status, Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import VERSIONS, Workshop, intercept, open_workshop, placement, running_server

SLUGS = ("acme", "globex", "initech")
SHARED = ("registry", "maintenance", "postgres", "template1", "template", "scratch", "warm")
SEALED = ("template", "warm")


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def server(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[Postgres]:
    """A server of each version, of this module's own: what is closed to PUBLIC here is opened to it again."""
    with running_server(request.param, f"{postgres.worker}-matrix") as running:
        yield running


@dataclass
class Fleet:
    """Three tenants, and every kind of database there is."""

    server: Postgres
    names: dict[str, str]
    passwords: dict[str, str] = field(repr=False)

    async def connect(self, tenant: str, database: str) -> None:
        """Log in as a tenant's role to a database, and do something there."""
        url = self.server.url(self.names[database], user=self.names[tenant], password=self.passwords[tenant])
        connection = await asyncpg.connect(url, timeout=10)
        try:
            assert await connection.fetchval("SELECT current_database()") == self.names[database]
        finally:
            await connection.close()


@pytest.fixture(scope="module")
def fleet(server: Postgres) -> Iterator[Fleet]:
    """Kept for the whole module, with a scratch database that is in use."""
    loop = asyncio.new_event_loop()
    stack = AsyncExitStack()
    try:
        yield loop.run_until_complete(make_fleet(server, stack))
        loop.run_until_complete(stack.aclose())
    finally:
        loop.close()


async def make_fleet(server: Postgres, stack: AsyncExitStack) -> Fleet:
    registry, maintenance = server.new_name("registry"), server.new_name("maintenance")
    await server.create_database(maintenance)
    workshop = await open_workshop(
        control_url=await server.create_database(registry),
        admin_url=server.url(maintenance),
        name_prefix="matrix",
        provisioning={"warm_pool": 1, "warm_pool_max": 1, "warm_pool_background": False},
    )
    stack.push_async_callback(workshop.close)
    tenants = {slug: await workshop.create(slug) for slug in SLUGS}
    names = {slug: placement(tenant).role for slug, tenant in tenants.items()}
    names |= {"registry": registry, "maintenance": maintenance, "postgres": "postgres", "template1": "template1"}
    names["template"] = (await workshop.provisioner.template("default")).name
    (names["warm"],) = (await workshop.provisioner.warm_pool.refill()).made
    names["scratch"] = await stack.enter_async_context(workshop.provisioner.scratch("default"))
    return Fleet(server, names, {slug: workshop.provisioner.password(tenant) for slug, tenant in tenants.items()})


@asynccontextmanager
async def open_to_public(fleet: Fleet, database: str) -> AsyncIterator[None]:
    """Remove the layer under test from one database, leaving PostgreSQL's defaults."""
    name = fleet.names[database]
    async with fleet.server.connect() as connection:
        await connection.execute(f'GRANT CONNECT ON DATABASE "{name}" TO PUBLIC')
        if database in SEALED:
            await connection.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
        try:
            yield
        finally:
            if database in SEALED:
                await connection.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
            await databases.close_to_public(connection, name)


PAIRS = [(tenant, database) for tenant in SLUGS for database in (*SLUGS, *SHARED) if tenant != database]


@pytest.mark.parametrize(("tenant", "database"), PAIRS, ids=str)
async def test_a_role_is_refused_by_every_other_database(fleet: Fleet, tenant: str, database: str) -> None:
    """With the REVOKE undone the connection works; with it in force it is refused."""
    async with open_to_public(fleet, database):
        await fleet.connect(tenant, database)
    sealed = asyncpg.ObjectNotInPrerequisiteStateError if database in SEALED else asyncpg.InsufficientPrivilegeError
    with pytest.raises(sealed):
        await fleet.connect(tenant, database)


@pytest.mark.parametrize("database", SEALED)
async def test_a_database_that_is_not_sealed_refuses_as_well(fleet: Fleet, database: str) -> None:
    """Its REVOKE is in force from its first moment, not only the seal."""
    async with fleet.server.connect() as connection:
        await connection.execute(f'ALTER DATABASE "{fleet.names[database]}" WITH ALLOW_CONNECTIONS true')
        try:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await fleet.connect("acme", database)
        finally:
            await connection.execute(f'ALTER DATABASE "{fleet.names[database]}" WITH ALLOW_CONNECTIONS false')


@pytest.mark.parametrize("tenant", SLUGS)
async def test_a_role_is_admitted_by_its_own_database(fleet: Fleet, tenant: str) -> None:
    """And by nothing else: these are all the databases there are."""
    await fleet.connect(tenant, tenant)
    async with fleet.server.connect() as connection:
        rows = await connection.fetch(
            "SELECT datname FROM pg_database WHERE datallowconn AND has_database_privilege($1, datname, 'CONNECT')",
            fleet.names[tenant],
        )
    assert [row["datname"] for row in rows] == [fleet.names[tenant]]


async def test_no_role_may_make_temporary_tables_anywhere(fleet: Fleet) -> None:
    """Not in its own database either."""
    async with fleet.server.connect() as connection:
        for tenant in SLUGS:
            rows = await connection.fetch(
                "SELECT datname FROM pg_database WHERE datname <> 'template0' "
                "AND has_database_privilege($1, datname, 'TEMP, CREATE')",
                fleet.names[tenant],
            )
            assert rows == []


async def test_a_clone_does_not_inherit_its_templates_revoke(fleet: Fleet) -> None:
    """What the explicit REVOKE on each database is for: a plain clone of the closed template is open to everybody."""
    name = fleet.server.new_name("clone")
    async with fleet.server.connect() as connection:
        await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{fleet.names["template"]}"')
        try:
            assert await databases.is_open_to_public(connection, name)
            assert not await databases.is_open_to_public(connection, fleet.names["template"])
        finally:
            await databases.drop(connection, name)


@pytest.mark.parametrize("step", ["database", "grants", "proved"])
async def test_there_is_no_moment_at_which_a_new_database_is_open(
    server: Postgres, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Between CREATE DATABASE and REVOKE a connection would be made that outlives the REVOKE; nobody gets one."""
    refusals: list[str | None] = []

    async def attack(creation: Creation) -> None:
        url = server.url(creation.role, user=fleet.names["acme"], password=fleet.passwords["acme"])
        try:
            await (await asyncpg.connect(url, timeout=10)).close()
            refusals.append(None)
        except asyncpg.PostgresError as exc:
            refusals.append(exc.sqlstate)

    registry = await server.create_database(server.new_name("registry"))
    workshop = await open_workshop(control_url=registry, admin_url=server.admin_url, name_prefix="moment")
    try:
        intercept(monkeypatch, step, after=attack)
        await workshop.create("victim")
        assert refusals == [{"database": "55000"}.get(step, "42501")]
        with monkeypatch.context() as patch:
            # the same attack on a database that is made in the usual way
            patch.setattr(databases, "create", usual(databases.create))
            if step == "database":
                await workshop.create("usual")
                assert refusals[1:] == [None]
    finally:
        await workshop.close()


def usual(create_database: Any) -> Any:
    """CREATE DATABASE without ALLOW_CONNECTIONS false."""

    async def create(*args: Any, **options: Any) -> None:
        await create_database(*args, **{**options, "open_to_connections": True})

    return create


async def test_anothers_role_has_no_rights_even_where_it_can_connect(server: Postgres, fleet: Fleet) -> None:
    """The second layer below: rights on tables are the tenant's own role's, not a group's."""
    async with open_to_public(fleet, "globex"):
        url = server.url(fleet.names["globex"], user=fleet.names["acme"], password=fleet.passwords["acme"])
        connection = await asyncpg.connect(url, timeout=10)
        try:
            for statement in (
                "SELECT * FROM notes",
                "INSERT INTO notes (body) VALUES ('x')",
                "SELECT * FROM bodies",
                "SELECT * FROM alembic_version",
                """SELECT * FROM "odd ""schema"."odd ""table" """,
                "SELECT nextval('notes_id_seq')",
                "CREATE TABLE x ()",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        finally:
            await connection.close()


async def test_a_purged_tenants_password_opens_nothing(server: Postgres) -> None:
    """Its role is gone; and a new tenant of the same slug has another."""
    registry = await server.create_database(server.new_name("registry"))
    workshop: Workshop = await open_workshop(control_url=registry, admin_url=server.admin_url, name_prefix="purged")
    try:
        tenant: Tenant = await workshop.create("acme")
        url = server.url(
            placement(tenant).database, user=placement(tenant).role, password=workshop.provisioner.password(tenant)
        )
        await (await asyncpg.connect(url, timeout=10)).close()
        _, deleted = await workshop.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
        await workshop.provisioner.purge(deleted)
        again = await workshop.create("acme")
        for attempt in (url, url.replace(f"/{placement(tenant).database}", f"/{placement(again).database}")):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(attempt, timeout=10)
    finally:
        await workshop.close()
