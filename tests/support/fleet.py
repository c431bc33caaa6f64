"""A fleet of tenants with real databases, at the level that migrations work on."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig, Tenant
from tenancy_orm.migrations import FleetServices, waits
from tenancy_orm.provisioning import Provisioner
from tenancy_orm.registry.registry import Registry
from tenancy_orm.runs import FleetMigrator
from tenancy_orm.servers.server import Server
from tests.support import waiting
from tests.support.postgres import Postgres
from tests.support.projects import Project


@dataclass
class Fleet:
    """Tenants, and what migrates them."""

    tenancy: Tenancy
    tenants: dict[str, Tenant] = field(default_factory=dict)

    @property
    def migrations(self) -> FleetMigrator:
        return self.tenancy.migrations

    @property
    def services(self) -> FleetServices:
        return self.tenancy.migrations.services

    @property
    def registry(self) -> Registry:
        return self.tenancy.internals.registry

    @property
    def provisioner(self) -> Provisioner:
        return self.tenancy.internals.provisioner

    async def create(self, *slugs: str, server: str = "default") -> list[Tenant]:
        """Create tenants from the template of the schema as it is now."""
        for slug in slugs:
            self.tenants[slug] = (await self.tenancy.tenants.create(slug, server=server)).tenant
        return [self.tenants[slug] for slug in slugs]

    def database(self, slug: str) -> str:
        """The name of a tenant's database."""
        placement = self.tenants[slug].placement
        assert placement is not None
        return placement.database

    @asynccontextmanager
    async def connect(self, slug: str) -> AsyncIterator[asyncpg.Connection[Any]]:
        """An administrator's connection to a tenant's database."""
        placement = (await self.registry.find(slug)).placement
        assert placement is not None
        connection = await self.services.provisioner.connect_admin(placement.server, placement.database)
        try:
            yield connection
        finally:
            await connection.close()

    async def fetch(self, slug: str, sql: str) -> list[tuple[Any, ...]]:
        """Ask a tenant's database."""
        async with self.connect(slug) as connection:
            return [tuple(row) for row in await connection.fetch(sql)]

    async def change_properties(self, slug: str) -> None:
        """Give a tenant's database another locale, for the order of texts by the C library, and a time zone."""
        place = (await self.registry.find(slug)).placement
        assert place is not None
        change = "UPDATE pg_database SET datcollate = CASE datcollate WHEN 'C' THEN 'C.UTF-8' ELSE 'C' END"
        await self.execute(slug, f"{change} WHERE datname = '{place.database}'")
        await self.execute(slug, f"ALTER DATABASE \"{place.database}\" SET TimeZone = 'Asia/Kathmandu'")

    async def properties(self, slug: str) -> tuple[Any, ...]:
        """The locale of a tenant's database, and the settings of its sessions."""
        query = """
            SELECT datcollate::text, datctype::text,
                   ARRAY(SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setdatabase = d.oid AND setrole = 0)
              FROM pg_database d WHERE datname = current_database()
        """
        return (await self.fetch(slug, query))[0]

    async def may(self, slug: str, privilege: str, table: str) -> bool:
        """Whether a tenant's role has a privilege on one of its tables."""
        place = self.tenants[slug].placement
        assert place is not None
        ((may,),) = await self.fetch(slug, f"SELECT has_table_privilege('{place.role}', '{table}', '{privilege}')")
        return bool(may)

    async def expire_claims(self) -> None:
        """Let the time pass after which others take over what a silent process has claimed of a run."""
        async with self.services.control.transaction() as connection:
            expire = "UPDATE tenancy.migration_run_processes SET claimed_until = clock_timestamp()"
            await connection.execute(text(expire))

    async def execute(self, slug: str, sql: str) -> None:
        """Do something to a tenant's database, as the administrator."""
        async with self.connect(slug) as connection:
            await connection.execute(sql)

    async def revision(self, slug: str) -> str | None:
        """What a tenant's version table says."""
        return ",".join(row[0] for row in await self.fetch(slug, "SELECT version_num FROM alembic_version")) or None

    async def recorded(self, slug: str) -> str | None:
        """What the registry says of a tenant's revision."""
        return (await self.registry.find(slug)).schema_revision

    async def columns(self, slug: str, table: str = "notes") -> list[str]:
        """The columns of one of a tenant's tables."""
        return [
            row[0]
            for row in await self.fetch(
                slug,
                f"SELECT attname::text FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 "
                "AND NOT attisdropped ORDER BY attnum",
            )
        ]


@asynccontextmanager
async def open_fleet(config: TenancyConfig, *, initialise: bool = False) -> AsyncIterator[Fleet]:
    """Open a ``Tenancy``; ``initialise`` makes the control database's tables."""
    tenancy = Tenancy(config)
    await tenancy.open(initialise=initialise)
    try:
        yield Fleet(tenancy)
    finally:
        await tenancy.close()


async def until(ask: Callable[[], Awaitable[Any]], wanted: object = True) -> None:
    """Wait until ``ask`` answers what is wanted."""

    async def answered() -> bool:
        return bool(await ask() == wanted)

    await waiting.until(answered)


async def activity(connection: asyncpg.Connection[Any], condition: str) -> int:
    """How many other sessions of this database are in a certain state."""
    # a transaction sees the activity as it was when it first looked
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND "
    return int(await connection.fetchval(query + condition))


def look_before_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let migrations begin to wait for locks only when what looks who holds them is connected."""
    watched = waits.watched

    @asynccontextmanager
    async def connected(pid: int, connect: Callable[[], Awaitable[Any]]) -> AsyncIterator[waits.LockWatch]:
        connection = await connect()

        async def opened() -> Any:
            return connection

        try:
            async with watched(pid, opened) as watch:
                yield watch
        finally:
            # where nobody has asked for it
            if not connection.is_closed():
                connection.terminate()

    monkeypatch.setattr(waits, "watched", connected)


def fleet_config(postgres: Postgres, control_url: str, name_prefix: str, project: Project) -> TenancyConfig:
    """The configuration of a fleet of one server, with the migrations of ``project``."""
    return TenancyConfig(
        control_url=control_url,
        servers={"default": postgres.admin_url},
        migrations=project.migrations,
        encryption_keys={"1": base64.b64encode(secrets.token_bytes(32)).decode()},
        name_prefix=name_prefix,
    )


def count_queries(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str | None, list[str]]:
    """From now on, note what is asked over each administrative connection, by database; there may be one for each."""
    connect = server.connect_admin
    queries: dict[str | None, list[str]] = {}

    async def counted(database: str | None = None, **options: Any) -> Any:
        # the server itself, which has no name here, is asked by runs, and by who shares its connections among processes
        assert database is None or database not in queries, "connected twice"
        connection = await connect(database, **options)
        asked = queries[database] = []
        connection.add_query_logger(lambda record: asked.append(record.query))
        return connection

    monkeypatch.setattr(server, "connect_admin", counted)
    return queries
