"""``BackupMaker``: makes one backup, whole or not at all."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version as installed_version
from typing import Any
from uuid import UUID

from ..audit.actor import Actor
from ..audit.checkpoints import Signer
from ..audit.log import AuditLog
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..control.names import Names
from ..errors import BackupError, BackupUnderWayError, TenancyError, TenantNotFoundError
from ..events import BackupCompleted, BackupFailed, EventBus
from ..jobs import Claimant, keep_claims
from ..migrations.failures import describe
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..provisioning import Provisioner
from ..provisioning.copies.restoring import programs_for
from ..registry.registry import Registry
from ..registry.rows import uuid7
from ..runs import FleetMigrator
from ..servers import Servers
from ..tenant import Tenant
from .dump import Dump, Dumped, Scope, Source
from .key_objects import CONTROL
from .keys import BackupKey, BackupKeys
from .manifest import Manifest
from .records import Backup, BackupRecords
from .sources import CONTROL_SCOPE, TENANT_SCOPE, ControlSource, Facts, facts_of
from .spool import Spool
from .stores import MANIFEST_BYTES, Store, Stores

logger = logging.getLogger("tenancy_orm.backups")

_EXISTS = "SELECT pg_catalog.to_regclass($1)"
_REVISION = """SELECT pg_catalog.string_agg(version_num, ',' ORDER BY version_num COLLATE "C") FROM {table}"""
_SLOT_SECONDS = 1.0  # between two looks for a slot of a server, more or less
FAILURES = (TenancyError, *SERVER_FAILURES)
"""What a server or a store may answer, or fail to; a mistake in the code is none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupServices:
    """The objects of an open ``Tenancy`` that backups use."""

    config: TenancyConfig
    control: ControlDatabase
    audit: AuditLog
    signer: Signer
    registry: Registry
    servers: Servers
    provisioner: Provisioner
    names: Names
    keys: BackupKeys
    stores: Stores
    migrations: FleetMigrator
    events: EventBus


class BackupMaker:
    """Makes backups.

    Args:
        services: What it uses.
        records: The rows of backups.
    """

    def __init__(self, services: BackupServices, records: BackupRecords) -> None:
        self._services = services
        self._config = services.config.backup
        self._records = records
        self._keys = services.keys

    async def make(
        self, tenant: Tenant | None, store: Store, *, kept_until: datetime | None, due: float | None, actor: Actor
    ) -> Backup:
        """Make a backup of a tenant, or of the control database where None, and announce it.

        Raises:
            BackupUnderWayError: another process makes one, or it is not due any more.
            TenantNotFoundError: it has been purged.
            BackupError: the store or the temporary space does not take it, or it was not done in time.
            ProvisioningError, ServerUnavailableError: it cannot be dumped.
        """
        began = time.monotonic()
        try:
            return await self._make(tenant, store, kept_until=kept_until, due=due, actor=actor)
        except (BackupUnderWayError, TenantNotFoundError):
            raise
        except FAILURES as exc:
            error, seconds = describe(exc), time.monotonic() - began
            slug = None if tenant is None else tenant.slug
            logger.error("%s could not be backed up: %s", slug or "the control database", error)
            failed = BackupFailed(
                tenant_id=None if tenant is None else tenant.id, slug=slug, error=error, seconds=seconds
            )
            self._services.events.emit(failed)
            raise

    async def _make(
        self, tenant: Tenant | None, store: Store, *, kept_until: datetime | None, due: float | None, actor: Actor
    ) -> Backup:
        began = time.monotonic()
        tenant_id = None if tenant is None else tenant.id
        key = await self._keys.current(tenant_id, store, actor=actor)
        backup_id, claimant = uuid7(), Claimant()
        path = f"{self._services.control.installation}/{tenant_id or CONTROL}/{backup_id}"
        begin = partial(
            self._records.begin,
            backup_id,
            tenant_id,
            claimant,
            server=None if tenant is None or tenant.placement is None else tenant.placement.server,
            at_most=self._config.concurrency,
            store=store.url,
            path=path,
            key_id=key.id,
            kept_until=kept_until,
            due=due,
        )
        while not await begin():  # noqa: ASYNC110 - the slots are those of other processes too
            await asyncio.sleep(_SLOT_SECONDS * random.uniform(0.5, 1.5))
        bound = asyncio.timeout(self._config.timeout)
        try:
            async with keep_claims(lambda: self._records.renew(backup_id, claimant)):
                async with bound:
                    if tenant is None:
                        manifest = await self._dump_control(backup_id, key, store, path)
                    else:
                        manifest = await self._dump_tenant(backup_id, key, store, path, tenant)
                signed = manifest.sign(self._services.signer)
                if len(signed) > MANIFEST_BYTES:
                    raise BackupError(
                        f"the manifest, with {len(manifest.files):,} tables and large objects, is larger than the "
                        f"{MANIFEST_BYTES:,} bytes that are read of one; keep fewer large objects"
                    )
                # the last: what has no manifest is no backup
                await store.put(f"{path}/manifest.json", signed)
            stored = manifest.archive_bytes + len(signed)
            done = await self._records.finish(manifest, claimant, stored_bytes=stored, actor=actor)
        except BaseException as exc:
            await run_to_completion(self._give_up(backup_id, claimant, store, path, exc))
            if isinstance(exc, TimeoutError) and bound.expired():
                raise BackupError(f"not done within {self._config.timeout:g} s; raise backup.timeout") from exc
            raise
        slug = None if tenant is None else tenant.slug
        seconds = time.monotonic() - began
        logger.info("%s backed up in %.1f s: %d bytes", slug or "the control database", seconds, stored)
        if manifest.dump_bytes > self._config.max_temporary_bytes:
            logger.error(
                "the backup %s of %s is done, and can be neither restored nor verified: that needs %d bytes of "
                "temporary space, and backup.max_temporary_bytes is %d; raise it",
                backup_id,
                slug or "the control database",
                manifest.dump_bytes,
                self._config.max_temporary_bytes,
            )
        self._services.events.emit(
            BackupCompleted(tenant_id=tenant_id, slug=slug, backup_id=backup_id, bytes=stored, seconds=seconds)
        )
        return done

    async def _give_up(
        self, backup_id: UUID, claimant: Claimant, store: Store, path: str, error: BaseException
    ) -> None:
        """Remove what was written, and record the failure; what cannot be removed now is removed by ``prune``.

        A backup that is done stays: a cancellation, or the loss of the connection, may come after the commit.
        """
        try:
            reason = describe(error) if isinstance(error, Exception) else "stopped"
            if await self._records.fail(backup_id, claimant, reason):
                await store.delete(f"{path}/manifest.json", f"{path}/dump.tar.age")
        except FAILURES as exc:
            logger.warning("the backup %s that failed could not be cleared away now: %s", backup_id, describe(exc))

    async def _dump_tenant(self, backup_id: UUID, key: BackupKey, store: Store, path: str, listed: Tenant) -> Manifest:
        # it may have moved while this waited
        tenant = await self._services.registry.get(listed.id)
        place, owner = tenant.placement, self._services.names.owner
        if place is None:
            raise TenantNotFoundError(tenant.slug)

        table = await self._version_table()

        async def look(connection: Connection) -> tuple[Facts, str | None]:
            facts = await facts_of(connection, owner=owner, role=place.role)
            if table is None or await connection.fetchval(_EXISTS, table) is None:
                return facts, tenant.schema_revision
            # in the snapshot: a migration may have ended since the tenant was looked up
            return facts, await connection.fetchval(_REVISION.format(table=table))

        async with self._services.provisioner.readers.open(tenant, seconds=self._config.timeout) as reader:
            dumped = await self._dump(reader, TENANT_SCOPE, store, path, [key.recipient], look)
        facts, revision = dumped.found
        return self._manifest(
            backup_id,
            key,
            dumped,
            slug=tenant.slug,
            tier=tenant.tier,
            region=tenant.region,
            server=place.server,
            database=place.database,
            role=place.role,
            owner=owner,
            revision=revision,
            fingerprint=facts.fingerprint,
            structure=facts.structure,
            tenant_owned=facts.tenant_owned,
        )

    async def _version_table(self) -> str | None:
        if self._services.config.migrations is None:
            return None
        try:
            return (await self._services.migrations.environment()).quoted_version_table
        except TenancyError as exc:
            # no reason to have no backup
            logger.warning("the migrations cannot be loaded, so that backups have the recorded revision: %s", exc)
            return None

    async def _dump_control(self, backup_id: UUID, key: BackupKey, store: Store, path: str) -> Manifest:
        control = self._services.control
        dsn = self._services.config.listen_dsn or control.dsn

        async def look(connection: Connection) -> str | None:
            found: str | None = await connection.fetchval("SELECT version_num FROM tenancy.alembic_version")
            return found

        recipients = [key.recipient, *self._config.control_recipients]
        dumped = await self._dump(ControlSource(dsn), CONTROL_SCOPE, store, path, recipients, look)
        return self._manifest(
            backup_id,
            key,
            dumped,
            slug=None,
            tier=None,
            region=None,
            server=None,
            database=dsn.database,
            role=None,
            owner=None,
            revision=dumped.found,
            fingerprint=None,
            structure=None,
        )

    async def _dump(
        self, source: Source, scope: Scope, store: Store, path: str, recipients: list[str], look: Any
    ) -> Dumped:
        return await Dump(
            source,
            programs=partial(programs_for, self._services.config),
            spool=Spool(self._config.directory, self._config.max_temporary_bytes),
            store=store,
            path=f"{path}/dump.tar.age",
            recipients=recipients,
            compression=self._config.compression,
            scope=scope,
            look=look,
            connect_timeout=self._services.config.pool.connect_timeout,
        ).run()

    def _manifest(self, backup_id: UUID, key: BackupKey, dumped: Dumped, **values: Any) -> Manifest:
        found = dumped.snapshot
        return Manifest(
            id=backup_id,
            installation=self._services.control.installation,
            tenant_id=key.tenant_id,
            key_id=key.id,
            package_version=_package_version(),
            server_version=found.server_version,
            dump_version=dumped.dump_version,
            lsn=found.lsn,
            snapshot_at=found.snapshot_at,
            database_bytes=found.database_bytes,
            locale=found.locale,
            tables=found.tables,
            sequences=dumped.sequences,
            large_objects=found.large_objects,
            extensions=found.extensions,
            files=dumped.files,
            archive_bytes=dumped.archive_bytes,
            archive_sha256=dumped.archive_sha256,
            created_at=datetime.now(UTC),
            **values,
        )


@cache
def _package_version() -> str:
    return installed_version("tenancy-orm")  # reads and parses a file


__all__ = ["FAILURES", "BackupMaker", "BackupServices"]
