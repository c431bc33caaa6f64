"""Two tenants, of which one attacks: what tests of hostile roles share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tenancy_orm.postgres.errors import sqlstate_of
from tenancy_orm.postgres.quoting import quote_identifier
from tenancy_orm.provisioning import roles
from tenancy_orm.tenant import Status, Tenant
from tests.support.control_databases import create_control_database, forget_tenants
from tests.support.postgres import Postgres
from tests.support.provisioning import (
    Workshop,
    open_workshop,
    placement,
    plain_administrator,
)

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


class Arenas:
    """The arenas of a server, one after the other, in one event loop.

    All with one kind of administrator share an installation and what has opened it: of each second that a new one would
    take, the tenants are a tenth. An installation that a test leaves otherwise than it was is not used again.
    """

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self._numbers = itertools.count(1)
        self._workshops: dict[str, Workshop] = {}

    @asynccontextmanager
    async def arena(self, administrator: str) -> AsyncIterator[Arena]:
        """Two tenants; the administrator is a "superuser" or a "plain" one. Nothing stays prepared after them."""
        # not in the dictionary while it is used: whatever fails, the next arena has another installation
        workshop = self._workshops.pop(administrator, None) or await self._open(administrator)
        try:
            async with AsyncExitStack() as stack:
                mallory, acme = await workshop.create("mallory"), await workshop.create("acme")
                yield Arena(self._server, workshop, mallory, acme, stack)
            async with self._server.connect() as connection:
                assert await connection.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 0
            await workshop.close_others()
            await self._server.drop_all(workshop.config.name_prefix, but=workshop.names)
            await forget_tenants(self._server, workshop.config.control_url)
        except BaseException:
            await workshop.close()
            raise
        self._workshops[administrator] = workshop

    async def _open(self, administrator: str) -> Workshop:
        admin_url = self._server.admin_url
        if administrator == "plain":
            async with plain_administrator(self._server) as admin_url:
                pass
        control_url = await create_control_database(self._server, self._server.new_name("hostile"))
        return await open_workshop(
            control_url=control_url, admin_url=admin_url, name_prefix=f"h{next(self._numbers)}{administrator}"
        )

    async def close(self) -> None:
        """Close what is open."""
        while self._workshops:
            await self._workshops.popitem()[1].close()


@asynccontextmanager
async def open_arenas(server: Postgres) -> AsyncIterator[Arenas]:
    """Arenas for the body, which must not change event loops."""
    arenas = Arenas(server)
    try:
        yield arenas
    finally:
        await arenas.close()
