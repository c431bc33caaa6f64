"""Databases as they should be, to compare tenants' with: at a revision, on a server, with a tenant's rights."""

from __future__ import annotations

import glob
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import MigrationError
from ..migrations import local
from ..migrations.connections import Connections, Health
from ..migrations.database import DatabaseMigration, Target, close
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.scripts import Environment
from ..migrations.services import FleetServices
from ..postgres.connections import Connection, finish, transaction
from ..postgres.quoting import quote_identifier
from ..provisioning.rights import grants
from ..provisioning.rights.tenant_rights import TenantRights, grant_statements
from . import catalogue
from .catalogue import Catalogue, Ignored


def ignored_at(heads: Heads, environment: Environment | None, ignored: Ignored) -> Ignored:
    """Return what is left out at ``heads``: at base also the version table, which only a downgraded database has."""
    if heads or environment is None:
        return ignored
    schema, table = environment.options.get("version_table_schema"), environment.options.get("version_table")
    names = [glob.escape(_quoted(name)) for name in (schema or "public", table or "alembic_version")]
    own = () if schema is None else (f"schema {names[0]}",)
    return Ignored((*ignored.patterns, f"table {'.'.join(names)}", *own))


def _quoted(name: str) -> str:
    """A name as PostgreSQL prints it."""
    return name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else quote_identifier(name)


_KEPT_SECONDS = 60.0


class KeptCatalogues:
    """The catalogues of templates, by server, each for a minute: several restores in a row compare with the same one.

    A complete template does not change, and has a name of its own, which no other one gets.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, float, Catalogue]] = {}

    def find(self, server: str, template: str) -> Catalogue | None:
        """Return the catalogue of a template, if it was kept not long ago."""
        name, until, found = self._kept.get(server, ("", 0.0, None))
        return found if name == template and time.monotonic() < until else None

    def keep(self, server: str, template: str, found: Catalogue) -> None:
        """Keep a catalogue."""
        self._kept[server] = template, time.monotonic() + _KEPT_SECONDS, found


class References:
    """Reads the catalogues of databases as they should be.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        environment: The migrations; None without any.
        ignored: What is left out of the catalogues.
        kept: What earlier ones have read, with nothing left out.
    """

    def __init__(
        self,
        services: FleetServices,
        connections: Connections,
        environment: Environment | None,
        ignored: Ignored,
        kept: KeptCatalogues | None = None,
    ) -> None:
        self._services = services
        self._connections = connections
        self._environment = environment
        self._ignored = ignored
        self._kept = kept

    async def read(self, server: str, heads: Heads) -> Catalogue:
        """Return the catalogue of a tenant's database at ``heads``.

        At the current head that is a clone of the template, which is built if it is missing. For others the revisions
        run in an empty database. Either is dropped afterwards.

        Raises:
            MigrationError: the migrations do not have this revision, or one of them fails.
            TemplateError, ServerUnavailableError: as ``Provisioner.scratch``.
        """
        # a hook may grant something else each time
        if self._kept is None or not self._is_head(heads) or self._services.config.provisioning.grants is not None:
            return await self._read_anew(server, heads)
        template = (await self._services.provisioner.scratch_template(server)).name
        found = self._kept.find(server, template)
        if found is None:
            found = await self._read_anew(server, heads)
            if (await self._services.provisioner.scratch_template(server)).name == template:
                self._kept.keep(server, template, found)
        return found

    def _is_head(self, heads: Heads) -> bool:
        return self._environment is None or heads == frozenset(self._environment.script.revision_map._real_heads)

    async def _read_anew(self, server: str, heads: Heads) -> Catalogue:
        async with self._database(server, heads) as database:
            return await self._read(server, database, ignored_at(heads, self._environment, self._ignored))

    @asynccontextmanager
    async def _database(self, server: str, heads: Heads) -> AsyncIterator[str]:
        provisioner, environment = self._services.provisioner, self._environment
        if environment is None or self._is_head(heads):
            async with provisioner.scratch(server) as database:
                yield database
            return
        # refused before anything is created
        plan = Plan.of(environment, "upgrade", tuple(sorted(heads))) if heads else None
        async with provisioner.scratch(server, empty=True) as database:
            if plan is not None:
                await self._migrate(plan, server, database, heads)
            yield database

    async def _migrate(self, plan: Plan, server: str, database: str, heads: Heads) -> None:
        local.install()
        connections = self._connections
        migration = DatabaseMigration(
            plan,
            Target(
                label=f"a database at {format_revision(heads)}",
                url=connections.url(server, database),
                connect=lambda: connections.connect(server, database, Health()),
            ),
            adapter=connections.adapter(server),
            limits=connections.limits,
        )
        await migration.run()
        if migration.after != heads:
            raise MigrationError(f"no database can be made that is at {format_revision(heads)}, and only there")

    async def _read(self, server: str, database: str, ignored: Ignored) -> Catalogue:
        """Read the catalogue with the rights of a tenant's role, which exists in this transaction alone."""
        names, role = self._services.names, self._services.names.scratch(secrets.token_hex(8))
        connection = await self._services.provisioner.connect_admin(server, database, purpose="tenancy-drift")
        begun = connection.transaction()
        await begun.start()
        try:
            await connection.execute(
                f"CREATE ROLE {quote_identifier(role)} NOLOGIN; SET LOCAL ROLE {quote_identifier(names.owner)}"
            )
            await self._grant(connection, database, role)
            return await catalogue.read(connection, owner=names.owner, role=role, ignored=ignored)
        finally:
            await finish(connection, begun.rollback)
            await close(connection)

    async def _grant(self, connection: Connection, database: str, role: str) -> None:
        owner = self._services.names.owner
        rights = TenantRights.of(self._services.config, owner)
        what = await grants.contents(connection, owner)
        async with transaction(connection):
            for statement in grant_statements(rights.wanted(what, database), role):
                await connection.execute(statement)
            await rights.run_hook(connection, database, role)


__all__ = ["KeptCatalogues", "References", "ignored_at"]
