"""Adoption in place: a database on one of the installation's servers becomes a tenant's where it is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from ..audit.actor import Actor
from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue, Ignored, read
from ..drift.compare import Difference
from ..drift.policy import code_of
from ..drift.reference import ignored_at
from ..errors import AdoptionError, ConfigurationError, ServerUnavailableError
from ..jobs.claims import Claimant
from ..migrations.connections import Connections, Health
from ..migrations.database import DatabaseMigration, Target
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..operations import Operation, Operations
from ..operations.progress import StepProgress
from ..postgres import connections as plain_connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.creation.takeover import Takeover
from ..provisioning.server_objects import advisory_locks
from ..tenant import Tenant
from ..tenants.manager import CreatedTenant, TenantManager
from .comparison import comparable, differences
from .contents import Contents
from .looking import Looking
from .source import OpenSource

_SHARED_DATABASES = ("postgres", "template0", "template1")


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceLook:
    """What was found of a database that is to be adopted in place.

    Attributes:
        server: The server that it is on.
        database: Its name.
        contents: What it has.
        heads: Its revision.
        stamp: Whether the database does not say so itself.
        end: The revision that the tenant is brought to.
        differences: How its schema differs from that of its revision.
        refused: Code that its revision does not make.
        foreign_rights: What PUBLIC and roles other than its owner may do in it.
    """

    server: str
    database: str
    contents: Contents
    heads: Heads
    stamp: bool
    end: Heads
    differences: tuple[Difference, ...]
    refused: tuple[str, ...]
    foreign_rights: tuple[str, ...]

    @property
    def revision(self) -> str | None:
        """Its revision, as one text."""
        return format_revision(self.heads)


class InPlace:
    """Takes databases over.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to databases.
        environment: The migrations; None without any.
        looking: Reads revisions and schemas.
    """

    def __init__(
        self, services: FleetServices, connections: Connections, environment: Environment | None, looking: Looking
    ) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._looking = looking
        # a database that does not say its revision has no version table
        self._ignored = ignored_at(frozenset(), environment, Ignored(services.config.migration.drift_ignore))

    # --- looking ----------------------------------------------------------------------------------------------------

    async def look(self, opened: OpenSource, progress: StepProgress) -> InPlaceLook:
        """Look at a database. Nothing is changed.

        Raises:
            AdoptionError: it is on none of the servers, or cannot be taken over.
        """
        if opened.source.schema is not None:
            raise ConfigurationError("only a whole database is adopted in place: leave the schema out, or copy it")
        if opened.source.without:
            raise ConfigurationError("a database in place keeps its tables: leave none out, or copy it")
        if opened.encoding != "UTF8":
            raise AdoptionError(
                f"{opened.source} has the encoding {opened.encoding}, and tenants' databases have UTF8: adopt a copy, "
                "which converts it"
            )
        progress("look at the source")
        server = await self._find_server(opened)
        self._refuse_shared(opened, server)
        heads, stamp = await self._looking.heads(opened)
        contents = await self._looking.contents(opened)
        self._looking.check_extensions(opened, contents)
        progress("compare its schema")
        expected = await self._expected(server, heads)
        found = await read(opened.connection, owner=self._services.names.owner, ignored=self._ignored)
        facts = await self._services.provisioner.look_at_takeover(
            server, opened.database, but=[await opened.connection.fetchval("SELECT pg_backend_pid()")]
        )
        if facts.obstacles:
            raise AdoptionError(f"{opened.source} cannot be taken over: {'; '.join(facts.obstacles)}")
        return InPlaceLook(
            server=server,
            database=opened.database,
            contents=contents,
            heads=heads,
            stamp=stamp,
            end=self._looking.end(heads),
            differences=tuple(differences(expected, found)),
            refused=tuple(code_of(comparable(expected), comparable(found))),
            foreign_rights=facts.foreign_rights,
        )

    async def _expected(self, server: str, heads: Heads) -> Catalogue:
        return (await self._looking.expected(server, heads)).without(self._ignored)

    async def _find_server(self, opened: OpenSource) -> str:
        """Return the server that the source is on, by a lock that only that one shows."""
        first, second = secrets.randbits(31), secrets.randbits(31)
        await opened.connection.execute(f"SELECT pg_advisory_lock_shared({first}, {second})")
        for name in self._services.servers:
            try:
                connection = await self._services.provisioner.connect_admin(name, purpose="tenancy-adopt")
            except (ServerUnavailableError, *SERVER_FAILURES):
                continue
            try:
                if await connection.fetchval(advisory_locks.LOCKED, first, second) == opened.database:
                    return name
            finally:
                await run_to_completion(plain_connections.close(connection))
        raise AdoptionError(
            f"{opened.source} is on none of the installation's servers ({', '.join(self._services.servers)}), so that "
            "it cannot become a tenant in place: add its server, or adopt a copy"
        )

    def _refuse_shared(self, opened: OpenSource, server: str) -> None:
        shared = {*_SHARED_DATABASES, self._services.servers[server].dsn.database}
        if opened.database in shared:
            raise AdoptionError(f"{opened.source} is shared by server {server!r}, so it cannot become a tenant's")
        if (opened.marker or "").startswith(("tenancy:", "tenancy-")):
            raise AdoptionError(f"{opened.source} is the database of a tenant, or a template: it has its marker")

    # --- taking over ------------------------------------------------------------------------------------------------

    async def take(
        self,
        slug: str,
        look: InPlaceLook,
        tenants: TenantManager,
        operations: Operations,
        *,
        detail: Mapping[str, Any],
        values: Mapping[str, Any],
        progress: StepProgress,
        actor: Actor,
    ) -> tuple[CreatedTenant, Operation]:
        """Take a database over, or bring it back to how it was.

        Raises:
            TenancyError: as ``TenantManager.create``.
        """
        claimant, begun = Claimant(), list[Operation]()

        async def begin(tenant: Tenant) -> None:
            begun.append(
                await operations.begin("adopt", tenant.id, step="begun", claimant=claimant, detail=detail, actor=actor)
            )

        async def record(state: Mapping[str, Any]) -> None:
            progress("take over")
            await operations.advance(begun[0], claimant, "take over", detail={"undo": state})

        async def prepare(database: str) -> None:
            if look.stamp and self._environment is not None:
                plan = Plan.of(self._environment, "stamp", tuple(sorted(look.heads)))
                await self._migration(plan, look.server, database).run()

        takeover = Takeover(
            database=look.database,
            policy=_Unchanged(self, look),
            begin=begin,
            record=record,
            prepare=prepare,
            timeout=self._services.config.adoption.timeout,
            undo=(f"DROP TABLE IF EXISTS {self._version_table()}",) if look.stamp else (),
        )
        created = await tenants.create(slug, server=look.server, filling=takeover, actor=actor, **values)
        await operations.finish(begun[0], claimant, "done")
        return created, await operations.get(begun[0].id)

    def _version_table(self) -> str:
        assert self._environment is not None  # noqa: S101 - there is a revision to write
        table = self._environment.quoted_version_table
        return table if self._environment.quoted_version_schema is not None else f"public.{table}"

    def _migration(self, plan: Plan, server: str, database: str) -> DatabaseMigration:
        health = Health()
        target = Target(
            label=database,
            url=self._connections.url(server, database),
            connect=lambda: self._connections.connect(server, database, health),
        )
        return DatabaseMigration(
            plan, target, adapter=self._connections.adapter(server), limits=self._connections.limits
        )

    async def refuse_changed(self, connection: Connection, look: InPlaceLook) -> None:
        """Refuse a database that has become another one since it was looked at. Nobody else can change it now."""
        expected = await self._expected(look.server, look.heads)
        found = await read(connection, owner=self._services.names.owner, ignored=self._ignored)
        if refused := list(code_of(comparable(expected), comparable(found))):
            raise AdoptionError(
                f"database {look.database!r} has code that revision {look.revision or 'base'} does not make: "
                f"{', '.join(refused)}"
            )
        if {one.text for one in differences(expected, found)} != {one.text for one in look.differences}:
            raise AdoptionError(
                f"the schema of database {look.database!r} has changed since it was looked at: try again"
            )
        if self._environment is None or look.stamp:
            return
        try:
            rows = await connection.fetch(f"SELECT version_num::text FROM ONLY {self._version_table()}")  # noqa: S608 - quoted
        except asyncpg.PostgresError as exc:
            raise AdoptionError(
                f"the version table of database {look.database!r} cannot be read: {describe(exc)}"
            ) from exc
        if frozenset(row[0] for row in rows) != look.heads:
            raise AdoptionError(f"database {look.database!r} has been migrated since it was looked at: try again")


class _Unchanged:
    """What was looked at is what is taken over; a ``ContentsPolicy``."""

    def __init__(self, in_place: InPlace, look: InPlaceLook) -> None:
        self._in_place = in_place
        self._look = look

    async def check(self, connection: Connection, *, server: str, login: str, role: str) -> None:
        """Refuse code that the revision does not make, and what has changed."""
        await self._in_place.refuse_changed(connection, self._look)

    async def give_back(self, connection: Connection, *, role: str) -> None:
        """Do nothing: the role is new."""

    async def align(self, connection: Connection, *, role: str) -> None:
        """Rights are those of a tenant's database already."""


__all__ = ["InPlace", "InPlaceLook"]
