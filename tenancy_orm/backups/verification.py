"""Verification of a backup: it is read, restored into a scratch database by a login without rights, and compared."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from ..audit.actor import Actor
from ..errors import (
    BackupDamagedError,
    BackupError,
    BackupNotFoundError,
    ConfigurationError,
    OperationError,
    ProvisioningError,
    TenancyError,
    TenantNotFoundError,
)
from ..events import BackupVerified
from ..migrations.failures import describe
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.copies.empty_databases import InstalledExtension
from ..provisioning.copies.restoring import check_rows, connected, programs_for, restore_archive
from ..provisioning.templates.scratch import ScratchDatabase
from .key_objects import check_store
from .making import BackupServices
from .manifest import Manifest
from .opening import BackupReader, OpenBackup
from .records import Backup, BackupRecords
from .sequences import read_sequences
from .sources import facts_of

logger = logging.getLogger("tenancy_orm.backups")

_LARGE_OBJECTS = "SELECT count(*) FROM pg_catalog.pg_largeobject_metadata"
# pg_restore does not say by its status why it has failed
_WRITE = "CREATE TEMPORARY TABLE probe AS SELECT pg_catalog.repeat('x', 1000) FROM pg_catalog.generate_series(1, 10000)"
# their roles are not on every server
_NOT_RESTORED = ("POLICY", "ROW SECURITY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of a verification.

    Attributes:
        backup: The backup.
        error: What is wrong with it; None where nothing is.
        restored: Whether it was restored into a scratch database and compared.
        tables: How many tables were compared.
        rows: How many rows these have.
        seconds: How long it took.
    """

    backup: Backup
    error: str | None
    restored: bool
    tables: int
    rows: int
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.error is None


class BackupVerifier:
    """Verifies backups.

    Args:
        services: What it uses.
        records: The rows of backups.
        reader: Reads backups.
    """

    def __init__(self, services: BackupServices, records: BackupRecords, reader: BackupReader) -> None:
        self._services = services
        self._records = records
        self._reader = reader

    async def verify(self, backup: Backup, *, restore: bool, server: str | None, actor: Actor) -> Verification:
        """Verify a backup, and record the result.

        Raises:
            TenancyError: it could not be verified now: a server or the store does not answer, say.
        """
        if backup.state != "done":
            raise BackupNotFoundError(f"the backup {backup.id} is {backup.state}")
        began, manifest, restored, error = time.monotonic(), None, False, None
        bound = asyncio.timeout(self._services.config.backup.timeout)
        try:
            async with bound:
                if restore:
                    async with self._reader.open(backup) as opened:
                        manifest = opened.manifest
                        await self._restore(opened, server or await self._server(manifest))
                        restored = True
                else:
                    manifest = await self._reader.check(backup)
        except BackupNotFoundError as exc:
            if (now := await self._records.get(backup.id)).state != "done":
                raise BackupNotFoundError(f"the backup {backup.id} is {now.state} now") from exc
            await check_store(self._services.stores.at(backup.store), self._services.control.installation)
            error = str(exc)
        except (BackupDamagedError, _DiffersError) as exc:
            error = str(exc)
        except TenancyError:
            raise
        except SERVER_FAILURES as exc:
            timeout = self._services.config.backup.timeout
            if bound.expired():
                raise BackupError(f"not verified within {timeout:g} s; raise backup.timeout") from exc
            raise BackupError(f"the backup {backup.id} cannot be verified now: {describe(exc)}") from exc
        seconds = time.monotonic() - began
        if error is not None:
            logger.error("the backup %s of %s is bad: %s", backup.id, backup.slug or "the control database", error)
        await self._records.note_verified(backup, error, restored=restored, actor=actor)
        self._services.events.emit(
            BackupVerified(
                tenant_id=backup.tenant_id, slug=backup.slug, backup_id=backup.id, error=error, seconds=seconds
            )
        )
        return Verification(
            backup=await self._records.get(backup.id),
            error=error,
            restored=restored,
            tables=0 if manifest is None else len(manifest.tables),
            rows=0 if manifest is None else manifest.rows,
            seconds=seconds,
        )

    async def _server(self, manifest: Manifest) -> str:
        """Return the server for the scratch database: the tenant's own, where there is one."""
        servers = self._services.servers
        if manifest.tenant_id is not None:
            try:
                place = (await self._services.registry.get(manifest.tenant_id)).placement
            except TenantNotFoundError:
                place = None
            if place is not None and place.server in servers:
                return place.server
        candidates: list[str | None] = [manifest.server, self._services.config.default_server, *servers]
        for name in candidates:
            if name is not None and name in servers:
                return name
        raise ConfigurationError("there is no server for a scratch database")

    async def _restore(self, opened: OpenBackup, server: str) -> None:
        """Restore it into a scratch database, and compare; a restore that fails is tried once more.

        Raises:
            _DiffersError: what was restored is not what was backed up.
            BackupError: it cannot be restored there: its server may lack something, or have too many connections.
        """
        try:
            await self._try(opened, server)
        except _FailedError as first:
            logger.warning("the backup %s was not restored, which is tried again: %s", opened.backup.id, first)
            try:
                await self._try(opened, server)
            except _FailedError as exc:
                raise BackupError(
                    f"the backup {opened.backup.id} could not be restored on server {server!r}, also when it was tried "
                    f"again: {exc}; nothing is recorded, since its checksums are right: verify it with --server on "
                    "another one, or correct what is missing there"
                ) from exc

    async def _try(self, opened: OpenBackup, server: str) -> None:
        config, manifest = self._services.config, opened.manifest
        extensions = [InstalledExtension(one.name, one.schema, one.version) for one in manifest.extensions]
        scratch = self._services.provisioner.scratch_databases
        async with scratch.open(server, extensions=extensions, seconds=config.backup.timeout) as database:
            programs = await programs_for(config, database.server_version)
            without = () if manifest.structure is not None else _NOT_RESTORED
            try:
                await restore_archive(database, programs, opened.directory, extensions=extensions, without=without)
            except ProvisioningError as exc:
                await self._check_server(database, exc, timeout=config.pool.connect_timeout)
                raise _FailedError(str(exc)) from exc
            try:
                async with connected(database, timeout=config.pool.connect_timeout) as connection:
                    await check_rows(connection, manifest.tables)
                    await self._compare(connection, database, manifest)
            except OperationError as exc:
                raise _DiffersError(str(exc)) from exc

    @staticmethod
    async def _check_server(database: ScratchDatabase, error: Exception, *, timeout: float) -> None:
        """Refuse to blame the backup for a server that was lost, or has no space left.

        Raises:
            BackupError: it was, or has none.
        """
        try:
            async with connected(database, timeout=timeout) as connection:
                await connection.execute(_WRITE)
        except SERVER_FAILURES as exc:
            raise BackupError(
                f"it cannot be verified on server {database.server!r} now: {describe(exc)}; before that: {error}"
            ) from exc

    async def _compare(self, connection: Connection, database: ScratchDatabase, manifest: Manifest) -> None:
        large_objects = await connection.fetchval(_LARGE_OBJECTS)
        if large_objects != manifest.large_objects:
            raise _DiffersError(f"there are {large_objects} large objects, not {manifest.large_objects}")
        if manifest.sequences:
            found = await read_sequences(connection, left_out=(), schemas=None)
            wrong = [
                f"{name} is at {found.get(name, 'no value')}, not {value}"
                for name, value in manifest.sequences.items()
                if found.get(name) != value
            ]
            if wrong:
                raise _DiffersError(f"sequences have other values: {'; '.join(wrong[:5])}")
        if manifest.structure is None:
            return
        facts = await facts_of(connection, owner=database.login.role, role=None)
        if facts.structure == manifest.structure:
            return
        made_on = int(manifest.server_version.split(".")[0])
        if made_on == database.server_version:
            raise _DiffersError("the schema that was restored is not the one that was backed up")
        # another version writes the same view, constraint or function in another way
        logger.warning(
            "the schema of the backup %s was not compared: it was made on PostgreSQL %d, and server %s is of %d",
            manifest.id,
            made_on,
            database.server,
            database.server_version,
        )


class _FailedError(Exception):
    """It could not be restored: that may be its fault, or that of the machine, or of the server."""


class _DiffersError(Exception):
    """What was restored is not what was backed up."""


__all__ = ["BackupVerifier", "Verification"]
