"""The look at a source before anything is changed: its revision, its rows, and how its schema differs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import asyncpg

from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue, Ignored, read
from ..drift.compare import Difference
from ..drift.policy import code_of
from ..drift.reference import References, ignored_at
from ..errors import AdoptionError, ConfigurationError
from ..migrations import local
from ..migrations.connections import Connections
from ..migrations.database import ConnectionAdapter, DatabaseMigration, Target
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..operations.progress import StepProgress
from ..postgres import connections as plain_connections
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from ..postgres.programs import Programs, find_programs
from ..postgres.quoting import quote_identifier
from ..provisioning.copies.database_properties import find_properties, read_properties
from ..provisioning.copies.empty_databases import InstalledExtension
from ..provisioning.creation.new_databases import SAFE_PATH
from ..provisioning.logins.copy_logins import CopyLogin
from ..tenant import Tenant
from .comparison import comparable, differences
from .contents import Contents, SourceTable, read_contents
from .renaming import move_schema, remaining
from .source import OpenSource
from .transfer import Transfer

_UNBOUNDED = {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0", "lock_timeout": "0"}
_VERSION_TABLE = "SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
_VERSION_TABLE += "WHERE nspname = $1 AND relname = $2 AND relkind = 'r')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found of one source.

    Attributes:
        server: The server that it was compared on.
        server_version: Its major version.
        programs: PostgreSQL's programs for it.
        contents: What the source has.
        heads: Its revision.
        stamp: Whether the source does not say so itself.
        end: The revision that the tenant is brought to.
        schema: The schema that a source's schema becomes.
        differences: How its schema differs from that of its revision.
        refused: Code that its revision does not make, which never becomes a tenant's.
        notes: What else is worth knowing.
    """

    server: str
    server_version: int
    programs: Programs
    contents: Contents
    heads: Heads
    stamp: bool
    end: Heads
    schema: str
    differences: tuple[Difference, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def revision(self) -> str | None:
        """The source's revision, as one text."""
        return format_revision(self.heads)


class Looking:
    """Looks at sources, and brings their contents into databases.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to databases, and has the limits of migrations.
        environment: The migrations; None without any.
    """

    def __init__(self, services: FleetServices, connections: Connections, environment: Environment | None) -> None:
        local.install()
        self._services = services
        self._connections = connections
        self._environment = environment
        self._ignored = Ignored(services.config.migration.drift_ignore)
        self._references = References(services, connections, environment, self._ignored)

    async def look(self, opened: OpenSource, server: str, progress: StepProgress) -> Look:
        """Look at a source. Nothing is changed; short-lived databases are made on the server.

        Raises:
            AdoptionError: it cannot become a tenant, whatever differences are accepted.
            MigrationError: the migrations do not have its revision, or one of them fails.
        """
        progress("look at the source")
        version = await self._server_version(opened, server)
        # in a thread: it looks at many directories, and starts the programs
        programs = await asyncio.to_thread(find_programs, version, self._services.config.provisioning.client_programs)
        heads, stamp = await self._heads(opened)
        contents = await self.contents(opened)
        self.check_extensions(opened, contents)
        lost = await self._lost_properties(opened, server)
        progress("compare its schema")
        expected = await self._references.read(server, heads)
        schema = _schema_of(expected, self._environment) if opened.source.schema is not None else "public"
        left_out, found, named = await self._found(opened, contents, programs, version, server, heads, stamp, schema)
        unused = [f"extension {name} is not copied: nothing in the source uses it" for name in contents.unused]
        return Look(
            server=server,
            server_version=version,
            programs=programs,
            contents=contents,
            heads=heads,
            stamp=stamp,
            end=self.end(heads),
            schema=schema,
            differences=(*differences(expected, found, left_out), *named),
            refused=tuple(code_of(comparable(expected), comparable(found))),
            notes=(*contents.notes, *unused, *lost),
        )

    def end(self, heads: Heads) -> Heads:
        """Return the revision that a database at ``heads`` is brought to."""
        if self._environment is None:
            return heads
        return Plan.of(self._environment, "upgrade", "heads").path_from(heads).end

    async def expected(self, server: str, heads: Heads) -> Catalogue:
        """Return the schema of a revision on a server."""
        return await self._references.read(server, heads)

    async def read(self, connection: plain_connections.Connection, heads: Heads, *, owner: str) -> Catalogue:
        """Read the schema of a database that is at ``heads``."""
        return await read(connection, owner=owner, ignored=ignored_at(heads, self._environment, self._ignored))

    async def heads(self, opened: OpenSource) -> tuple[Heads, bool]:
        """Return a source's revision, and whether it has to be written into a version table.

        Raises:
            AdoptionError: neither the source nor the caller says it, or they disagree.
        """
        return await self._heads(opened)

    async def contents(self, opened: OpenSource) -> Contents:
        """Return what a source contains.

        Raises:
            AdoptionError: as ``read_contents``, or it takes too long.
        """
        seconds = self._services.config.adoption.timeout
        try:
            async with asyncio.timeout(seconds):
                return await read_contents(opened)
        except TimeoutError as exc:
            raise AdoptionError(
                f"the rows of {opened.source} cannot be counted within {seconds:g} s; raise adoption.timeout"
            ) from exc

    # --- what a source says -----------------------------------------------------------------------------------------

    async def _lost_properties(self, opened: OpenSource, server: str) -> list[str]:
        """Say what a copy does not have of the source's database: settings, and a locale that the server's is not."""
        source = await read_properties(opened.connection)
        connection = await self._services.provisioner.connect_admin(server, purpose="tenancy-adopt")
        try:
            made = await find_properties(connection, "template0")
        finally:
            await run_to_completion(plain_connections.close(connection))
        notes = []
        if source.settings:
            notes.append(
                f"settings of the source's database are not copied: {', '.join(sorted(source.settings))}; give them "
                "to the tenant's by ALTER DATABASE ... SET"
            )
        if made is not None and made.locale != source.locale:
            says = f"texts are sorted and compared by the locale {made.locale}"
            notes.append(f"{says}, and in the source by {source.locale}")
        return notes

    async def _server_version(self, opened: OpenSource, server: str) -> int:
        connection = await self._services.provisioner.connect_admin(server, purpose="tenancy-adopt")
        try:
            version = plain_connections.version(connection)
        finally:
            await run_to_completion(plain_connections.close(connection))
        if opened.version > version:
            raise AdoptionError(
                f"{opened.source} runs PostgreSQL {opened.version}, and server {server!r} {version}: a dump goes to "
                "the same version or a newer one; name another server"
            )
        return version

    async def _heads(self, opened: OpenSource) -> tuple[Heads, bool]:
        environment, at = self._environment, opened.source.at
        if environment is None:
            if at is not None:
                raise ConfigurationError("there are no migrations, and so no revision that the source could be at")
            return frozenset(), False
        wanted = None if at is None else _resolve(environment, at)
        found = await self._read_heads(opened, environment)
        if found is None or not found:
            if wanted is None:
                raise AdoptionError(
                    f"{opened.source} has no version table of Alembic with its revision; name it: --at REVISION "
                    '(at="base" for none)'
                )
            return wanted, bool(wanted)
        if wanted is not None and wanted != found:
            raise AdoptionError(
                f"{opened.source} says that it is at {format_revision(found)}, and not at {format_revision(wanted)}; "
                "leave --at out, or correct its version table"
            )
        Plan.of(environment, "upgrade", "heads").path_from(found)  # raises if this code does not have it
        return found, False

    async def _read_heads(self, opened: OpenSource, environment: Environment) -> Heads | None:
        schema = environment.options.get("version_table_schema") or opened.source.schema or "public"
        table = environment.options.get("version_table", "alembic_version")
        if not await opened.connection.fetchval(_VERSION_TABLE, schema, table):
            return None
        quoted = await opened.connection.fetchval("SELECT format('%I.%I', $1::text, $2::text)", schema, table)
        try:
            rows = await opened.connection.fetch(f"SELECT version_num::text FROM ONLY {quoted}")  # noqa: S608 - quoted
        except asyncpg.PostgresError as exc:
            raise AdoptionError(
                f"the version table {quoted} of {opened.source} cannot be read: {describe(exc)}"
            ) from exc
        return frozenset(row[0] for row in rows)

    def check_extensions(self, opened: OpenSource, contents: Contents) -> None:
        """Refuse extensions that nobody has configured: a source does not decide what a superuser installs.

        Raises:
            AdoptionError: there are some, or one is in the schema that is adopted.
        """
        configured = self._services.config.extensions
        if others := [one.name for one in contents.extensions if one.name not in configured]:
            raise AdoptionError(
                f"{opened.source} uses the extension {', '.join(others)}, which is not in the setting extensions; add "
                "it there, or remove what uses it from the source"
            )
        if own := [one.name for one in contents.extensions if one.schema == opened.source.schema != "public"]:
            raise AdoptionError(
                f"the extension {', '.join(own)} lives in the schema that is adopted; move it in the source: "
                f"ALTER EXTENSION {own[0]} SET SCHEMA public"
            )

    # --- what it is once it is restored -----------------------------------------------------------------------------

    async def _found(
        self,
        opened: OpenSource,
        contents: Contents,
        programs: Programs,
        version: int,
        server: str,
        heads: Heads,
        stamp: bool,
        schema: str,
    ) -> tuple[tuple[str, ...], Catalogue, Sequence[Difference]]:
        """Restore the schema alone, and return what is left out of it, its catalogue, and what it still names."""
        config = self._services.config
        own = extensions_of(contents)
        configured = (InstalledExtension(name) for name in config.extensions if name not in {one.name for one in own})
        scratch = self._services.provisioner.scratch_databases
        try:
            async with (
                asyncio.timeout(config.adoption.timeout),
                scratch.open(server, extensions=(*own, *configured), seconds=config.adoption.timeout) as database,
            ):
                login = database.login
                left_out = await self._transfer(opened, contents, programs, version, login).run(with_rows=False)
                stamped = heads if stamp else frozenset[str]()
                await self.finish(login, server, opened, contents, schema, stamped, tenant=None)
                connection = await self.connect(login)
                try:
                    found = await self.read(connection, heads, owner=login.role)
                finally:
                    await run_to_completion(plain_connections.close(connection))
        except SERVER_FAILURES as exc:
            raise AdoptionError(f"{opened.source} cannot be looked at on server {server!r}: {reason_of(exc)}") from exc
        former = opened.source.schema
        if former is None or former == schema:
            return left_out, found, ()
        named = [
            Difference(
                kind="schema",
                parent=None,
                name=former,
                change="extra",
                text=f"{one} names the schema {former} in its text, which becomes {schema}",
            )
            for one in remaining(found, former)
        ]
        return left_out, found, named

    def _transfer(
        self, opened: OpenSource, contents: Contents, programs: Programs, version: int, login: CopyLogin
    ) -> Transfer:
        return Transfer(
            programs=programs,
            opened=opened,
            contents=contents,
            into=login,
            version=version,
            connect_timeout=self._connections.limits.connect,
        )

    async def bring(self, opened: OpenSource, look: Look, login: CopyLogin) -> None:
        """Bring a source into an empty database, rows and all."""
        await self._transfer(opened, look.contents, look.programs, look.server_version, login).run(with_rows=True)

    async def finish(
        self,
        login: CopyLogin,
        server: str,
        opened: OpenSource,
        contents: Contents,
        schema: str,
        stamp: Heads,
        *,
        tenant: Tenant | None,
    ) -> None:
        """Make a schema's objects those of ``schema``, move extensions, and write the revision that it is at."""
        await self._move_extensions(login, server, contents)
        if opened.source.schema is not None:
            connection = await self.connect(login)
            try:
                await move_schema(connection, opened.source.schema, schema)
            finally:
                await run_to_completion(plain_connections.close(connection))
        if stamp and self._environment is not None:
            plan = Plan.of(self._environment, "stamp", tuple(sorted(stamp)))
            await self._migration(plan, login, server, tenant).run()

    async def _move_extensions(self, login: CopyLogin, server: str, contents: Contents) -> None:
        """Move extensions to the schema that new tenants have them in; what uses them follows."""
        moved = [one for one in contents.extensions if one.schema not in ("public", "pg_catalog")]
        if not moved:
            return
        # they are the administrator's, and moving one calls no function of the database
        connection = await self._services.provisioner.connect_admin(
            server, login.database, settings=SAFE_PATH, purpose="tenancy-adopt"
        )
        try:
            for one in moved:
                await connection.execute(f"ALTER EXTENSION {quote_identifier(one.name)} SET SCHEMA public")
            for schema in {one.schema for one in moved}:
                with suppress(asyncpg.DependentObjectsStillExistError):  # the source has more in it
                    await connection.execute(f"DROP SCHEMA {quote_identifier(schema)}")
        except asyncpg.PostgresError as exc:
            names = ", ".join(f"{one.name} (in schema {one.schema})" for one in moved)
            raise AdoptionError(f"the extensions {names} cannot become public's: {reason_of(exc)}") from exc
        finally:
            await run_to_completion(plain_connections.close(connection))

    async def upgrade(self, login: CopyLogin, server: str, tenant: Tenant) -> None:
        """Run the missing revisions, as the login."""
        if self._environment is not None:
            await self._migration(Plan.of(self._environment, "upgrade", "heads"), login, server, tenant).run()

    async def build(self, login: CopyLogin, server: str, revision: str, *, tenant: Tenant | None) -> None:
        """Run the revisions that an empty database needs to be at ``revision``, as the login."""
        if self._environment is not None:
            await self._migration(Plan.of(self._environment, "upgrade", revision), login, server, tenant).run()

    def _migration(self, plan: Plan, login: CopyLogin, server: str, tenant: Tenant | None) -> DatabaseMigration:
        target = Target(
            label="the source" if tenant is None else tenant.slug,
            url=self._connections.url(server, login.database),
            connect=lambda: self.connect(login),
            # without its role, which gets its rights once the contents are the tenant's
            tenant=None if tenant is None else replace(tenant, placement=None),
        )
        return DatabaseMigration(plan, target, adapter=ConnectionAdapter(), limits=self._connections.limits)

    async def connect(self, login: CopyLogin) -> plain_connections.Connection:
        """Open a connection of the login, which the caller closes."""
        return await login.connect(
            timeout=self._connections.limits.connect, settings=_UNBOUNDED, purpose="tenancy-adopt"
        )


def extensions_of(contents: Contents) -> tuple[InstalledExtension, ...]:
    """Return the extensions that a copy gets: in the source's schemas, and in the versions that the server has."""
    return tuple(InstalledExtension(one.name, one.schema) for one in contents.extensions)


def place_of(table: SourceTable, source_schema: str | None, schema: str) -> str:
    """Return the schema that a table of the source is in once it is adopted."""
    return schema if table.schema == source_schema else table.schema


def _resolve(environment: Environment, at: str) -> Heads:
    plan = Plan.of(environment, "stamp", "base" if at == "base" else at)
    if plan.is_relative:
        raise ConfigurationError(f"{at!r} is relative: name the revision that the source is at")
    return frozenset() if at == "base" else plan.path_from(frozenset()).end


def _schema_of(expected: Catalogue, environment: Environment | None) -> str:
    """Return the schema that most tables of a revision are in."""
    table = "alembic_version" if environment is None else environment.options.get("version_table", "alembic_version")
    counts = Counter(
        key.name.partition(".")[0]
        for key in expected.objects
        if key.kind == "table" and key.name.rpartition(".")[2] != table
    )
    return counts.most_common(1)[0][0].strip('"') if counts else "public"


__all__ = ["Look", "Looking", "extensions_of", "place_of"]
