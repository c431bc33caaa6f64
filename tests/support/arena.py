"""Two tenants, of which one attacks: what tests of hostile roles share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tenancy_orm.postgres.errors import sqlstate_of
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.provisioning.server_objects import roles
from tenancy_orm.tenant import Status, Tenant
from tests.support.postgres import Postgres
from tests.support.provisioning import Workshop, Workshops, placement

PURGE_SECONDS = 30.0


@dataclass
class Arena:
    """Two tenants: the attacker, and its victim."""

    server: Postgres
    workshop: Workshop
    attacker: Tenant
    victim: Tenant
    stack: AsyncExitStack = field(repr=False)

    def fill(self, statement: str) -> str:
        """Put the names into a statement. Database and role of a tenant are called alike."""
        own, other = (quote_identifier(placement(tenant).role) for tenant in (self.attacker, self.victim))
        return statement.replace("<own>", own).replace("<other>", other)

    async def attack(self, *statements: str) -> Any:
        """Run statements as the attacker, and leave its connection, and what it holds, as they are."""
        connection = await self.stack.enter_async_context(hostile(self.workshop, self.attacker))
        for statement in statements:
            await connection.execute(self.fill(statement))
        return connection

    async def plainly(self, statement: str) -> str | None:
        """The SQLSTATE of what a statement by itself, in the administrator's session, fails with; None if it works."""
        async with self.workshop.admin() as connection:
            await connection.execute("SET lock_timeout = '200ms'")
            try:
                await connection.execute(self.fill(statement))
            except asyncpg.PostgresError as exc:
                return sqlstate_of(exc)
        return None

    async def connections(self, tenant: Tenant) -> int:
        """How many connections a tenant's role has."""
        async with self.workshop.admin() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1"
            return int(await connection.fetchval(query, placement(tenant).role))

    async def prepared(self) -> int:
        """How many prepared transactions there are."""
        async with self.workshop.admin() as connection:
            return int(await connection.fetchval("SELECT count(*) FROM pg_prepared_xacts"))

    async def purge(self, tenant: Tenant) -> None:
        """Delete and purge a tenant, within a deadline."""
        deleted = await self.change(tenant, Status.DELETED)
        async with asyncio.timeout(PURGE_SECONDS):
            await self.workshop.provisioner.align(deleted, timeout=10)
            await self.workshop.provisioner.purge(deleted)

    async def change(self, tenant: Tenant, status: Status) -> Tenant:
        """Change a tenant's status in the registry."""
        _, after = await self.workshop.registry.transition(tenant.id, status, action="tenant.update")
        return after

    async def retired(self) -> set[str]:
        """The roles that a purge could not drop."""
        async with self.workshop.admin() as connection:
            return set(await roles.states(connection, self.workshop.names.retired("")))


@asynccontextmanager
async def hostile(workshop: Workshop, tenant: Tenant) -> AsyncIterator[Any]:
    """A tenant's connection that is closed without a word."""
    place = placement(tenant)
    server = workshop.servers[place.server]
    password = workshop.provisioner.password(tenant)
    connection = await asyncpg.connect(
        host=server.host, port=server.port, user=place.role, password=password, database=place.database, timeout=10
    )
    try:
        yield connection
    finally:
        connection.terminate()


@asynccontextmanager
async def open_arena(workshops: Workshops, administrator: str) -> AsyncIterator[Arena]:
    """Two tenants; the administrator is a "superuser" or a "plain" one. Nothing stays prepared after them."""
    async with workshops.workshop(administrator) as workshop:
        async with AsyncExitStack() as stack:
            mallory, acme = await workshop.create("mallory"), await workshop.create("acme")
            yield Arena(workshops.server, workshop, mallory, acme, stack)
        async with workshops.server.connect() as connection:
            assert await connection.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 0
