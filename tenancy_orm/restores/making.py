"""``Making``: makes the restored database, beside the one in use or as another tenant's."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import asyncpg

from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..drift.policy import RevisionPolicy, check_revision
from ..drift.reference import KeptCatalogues
from ..errors import OperationError
from ..migrations.beside import upgrade_beside
from ..migrations.connections import Connections
from ..migrations.scripts import Environment
from ..postgres import connections as postgres_connections
from ..postgres.errors import INVALID_CATALOG_NAME, NOT_IN_PREREQUISITE_STATE, describe, sqlstate_of
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.copies.database_properties import DatabaseProperties, find_properties
from ..provisioning.copies.empty_databases import InstalledExtension, read_extensions
from ..provisioning.copies.restoring import (
    Restored,
    check_rows,
    connected,
    extensions_in,
    programs_for,
    restore_archive,
)
from ..provisioning.creation.new_databases import NewDatabase
from ..runs import FleetMigrator
from ..tenant import Placement, Tenant, placement_of
from .sources import Archive, RestoreSource

# the database was dropped, or the DROP was interrupted; or it is closed
_LOST = (INVALID_CATALOG_NAME, NOT_IN_PREREQUISITE_STATE)
_READ_ONLY = "default_transaction_read_only"


class Making:
    """Brings archives into new databases, checks and upgrades them.

    Args:
        config: The configuration.
        migrations: Loads the migrations.
        connections: Connects to databases.
    """

    def __init__(self, config: TenancyConfig, migrations: FleetMigrator, connections: Connections) -> None:
        self._config = config
        self._migrations = migrations
        self._services = migrations.services
        self._provisioner = migrations.services.provisioner
        self._connections = connections
        self._kept = KeptCatalogues()

    async def make(
        self, tenant: Tenant, place: Placement, database: str, source: RestoreSource, *, accept: bool
    ) -> tuple[RevisionPolicy, Restored]:
        """Make the database beside the one in use, filled and handed over."""
        environment = await self.environment()
        async with source.open() as archive:
            policy = self.policy(environment, archive, accept=accept)
            self.check_archive(environment, archive)
            extensions = await self.extensions(tenant, archive)
            like = await self._properties(place)
            async with self._provisioner.new_databases.open(
                tenant,
                place.server,
                database,
                extensions_of=extensions,
                like=like,
                timeout=self._config.provisioning.timeout,
                valid_for=self._config.backup.timeout,
            ) as new:
                restored = await self.fill(new, archive, extensions)
                await new.hand_over(tenant, place.role, policy=policy)
                await new.shut_guests_out(place.role)
        return policy, restored

    def policy(self, environment: Environment | None, archive: Archive, *, accept: bool) -> RevisionPolicy:
        """Return what decides whether an archive's contents may become the tenant's."""
        return RevisionPolicy(
            self._services,
            self._connections,
            environment,
            accept=accept,
            tenant_owned=archive.tenant_owned,
            kept=self._kept,
        )

    @staticmethod
    def check_archive(environment: Environment | None, archive: Archive) -> None:
        """Refuse an archive that says to be newer than the code, before it is brought in.

        Raises:
            MigrationError: it is.
        """
        if environment is not None and archive.revision is not None:
            check_revision(environment, frozenset(archive.revision.split(",")))

    async def fill(self, new: NewDatabase, archive: Archive, extensions: tuple[InstalledExtension, ...]) -> Restored:
        """Bring an archive in, and compare the numbers of rows with those that were counted.

        Raises:
            OperationError: they differ, or it was not done within ``backup.timeout``.
            ProvisioningError: PostgreSQL refused something.
        """
        programs = await programs_for(self._config, new.server_version)
        bound = asyncio.timeout(self._config.backup.timeout)
        try:
            async with bound:
                restored = await restore_archive(new, programs, archive.path, extensions=extensions)
                async with connected(new, timeout=self._config.pool.connect_timeout) as connection:
                    if archive.rows:
                        await check_rows(connection, archive.rows)
                    # last: it evaluates expressions of the archive
                    await connection.execute("ANALYZE")
                return restored
        except TimeoutError as exc:
            if not bound.expired():
                raise
            raise OperationError(
                f"the contents were not restored within {self._config.backup.timeout:g} s; raise backup.timeout"
            ) from exc

    async def extensions(self, tenant: Tenant, archive: Archive) -> tuple[InstalledExtension, ...]:
        """The archive's extensions, as far as they are configured, or the tenant's database has or had them.

        Raises:
            OperationError, ServerUnavailableError: the tenant's database would say which, and cannot be read.
        """
        if archive.extensions is not None and archive.server_version is not None:
            # the source names them, so that the tenant's server need not be there any more
            present, version = archive.extensions, archive.server_version
        else:
            try:
                present, version = await self._present(placement_of(tenant))
            except SERVER_FAILURES as exc:
                raise OperationError(
                    f"the extensions of tenant {tenant.slug!r} cannot be read ({describe(exc)})"
                ) from exc
        programs = await programs_for(self._config, version)
        return await extensions_in(programs, archive.path, present | set(self._config.extensions))

    async def _present(self, place: Placement) -> tuple[frozenset[str], int]:
        """The extensions of the tenant's database, none where it is lost, and the version of its server."""
        connect = partial(self._provisioner.connect_admin, place.server, purpose="tenancy-restore")
        try:
            connection, is_lost = await connect(place.database), False
        except asyncpg.PostgresError as exc:
            if sqlstate_of(exc) not in _LOST:
                raise
            connection, is_lost = await connect(), True
        try:
            found = () if is_lost else await read_extensions(connection)
            return frozenset(one.name for one in found), postgres_connections.version(connection)
        finally:
            await run_to_completion(postgres_connections.close(connection))

    async def _properties(self, place: Placement) -> DatabaseProperties | None:
        """The locale and the settings of the database in use, which an archive lacks; None where that is lost."""
        connection = await self._provisioner.connect_admin(place.server, purpose="tenancy-restore")
        try:
            # without a setting that the administrator may not set, a tenant is restored all the same
            found = await find_properties(connection, place.database, required=False)
            if found is None:
                return None
            # who has stopped the writers of a broken database in this way wants them back with the restored one
            return replace(
                found, settings={name: value for name, value in found.settings.items() if name != _READ_ONLY}
            )
        finally:
            await run_to_completion(postgres_connections.close(connection))

    async def environment(self) -> Environment | None:
        """Load the migrations; None without any."""
        return None if self._config.migrations is None else await self._migrations.environment()

    async def upgrade(self, tenant: Tenant, place: Placement) -> str | None:
        """Run the revisions that a database of the tenant lacks, and return the one that it is at."""
        return await upgrade_beside(tenant, place, self._connections, await self.environment())


__all__ = ["Making"]
