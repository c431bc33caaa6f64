"""``BackupManager``: encrypted backups of tenants' databases, and of the control database."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..audit.checkpoints import Signer
from ..audit.log import AuditLog
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import resolve_tenant_id
from ..control.names import Names
from ..errors import (
    BackupError,
    BackupNotFoundError,
    BackupUnderWayError,
    ConfigurationError,
    FleetBackupError,
    TenancyError,
    TenantNotFoundError,
)
from ..events import BackupCompleted, BackupFailed, EventBus
from ..jobs import Claimant, keep_claims
from ..loops import HomeLoop
from ..migrations.failures import describe
from ..migrations.selection import Selection
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..postgres.programs import Programs, find_programs
from ..provisioning import Provisioner
from ..registry.registry import Registry
from ..registry.rows import uuid7
from ..tenant import Tenant, TenantRef
from .archive import Digest, unpack
from .dump import Dump, Dumped, Scope, Source, in_thread
from .encryption import decrypt
from .keys import CONTROL, BackupKey, BackupKeys
from .manifest import Manifest
from .records import Backup, BackupRecords, BackupState
from .sources import CONTROL_SCOPE, TENANT_SCOPE, ControlSource, Facts, facts_of
from .spool import Spool
from .stores import Store, open_store

logger = logging.getLogger("tenancy_orm.backups")

_SLOT_SECONDS = 1.0  # between two looks for a slot of a server, more or less
_FAILURES = (TenancyError, *SERVER_FAILURES)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupServices:
    """The objects of an open ``Tenancy`` that backups use."""

    config: TenancyConfig
    control: ControlDatabase
    audit: AuditLog
    signer: Signer
    registry: Registry
    provisioner: Provisioner
    names: Names
    keys: BackupKeys
    events: EventBus


@dataclass(frozen=True, slots=True)
class OpenBackup:
    """A backup that is decrypted.

    Attributes:
        backup: Its row.
        manifest: What it has; its signature was verified.
        directory: The dump, which ``pg_restore --format=directory`` reads; its checksums were verified.
    """

    backup: Backup
    manifest: Manifest
    directory: Path


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a run over several tenants did: the backups that are done, and why others are not, by slug."""

    done: tuple[Backup, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise an error if a tenant could not be backed up.

        Raises:
            FleetBackupError: one could not.
        """
        if self.reasons:
            raise FleetBackupError(self.reasons, len(self.done))


class BackupManager:
    """Makes, lists and opens backups: ``tenancy.backups``.

    Attributes:
        keys: The keys that they are encrypted with.
    """

    def __init__(self, services: BackupServices) -> None:
        self._services = services
        self._config = services.config.backup
        self._records = BackupRecords(services.control, services.audit)
        self._home = HomeLoop()
        self._stores: dict[str, Store] = {}
        self.keys = services.keys

    @property
    def store(self) -> Store:
        """The store of new backups.

        Raises:
            ConfigurationError: ``backup.store`` is not set.
        """
        if self._config.store is None:
            raise ConfigurationError(
                "backup.store is not set: name a directory, as file:/var/backups/tenancy, or a bucket, as s3://bucket"
            )
        return self._store_at(self._config.store)

    def _store_at(self, url: str) -> Store:
        if url not in self._stores:
            own = url.partition(":")[0] == (self._config.store or "").partition(":")[0]
            self._stores[url] = open_store(url, self._config.store_options if own else {})
        return self._stores[url]

    # --- making -----------------------------------------------------------------------------------------------------

    async def run(
        self,
        tenants: Iterable[TenantRef],
        *,
        kept_until: datetime | None = None,
        due: float | None = None,
        progress: Callable[[Tenant, Backup | str], None] | None = None,
        actor: Actor = SYSTEM,
    ) -> BackupReport:
        """Back tenants up, ``backup.concurrency`` of each server at once; a failure does not stop the others.

        Args:
            tenants: Slugs, ids or tenants.
            kept_until: Until when the backups are kept, whatever the retention policy says.
            due: Leave out tenants with a backup that was begun less than so many seconds ago.
            progress: Called with each tenant and its backup, or why there is none.
            actor: Who does this.

        Raises:
            TenantNotFoundError, TenantProvisioningError: a tenant does not exist, or is being created; nothing was
                done.
            ConfigurationError: ``backup.store`` is not set.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("backing tenants up")
        self._home.check()
        store = self.store
        chosen = await Selection(self._services.registry).choose(tenants)
        done: list[Backup] = []
        reasons: dict[str, str] = {}
        skipped: list[str] = []

        async def work(queue: list[Tenant]) -> None:
            while queue:
                tenant = queue.pop(0)
                try:
                    made = await self._back_up(tenant, store, kept_until=kept_until, due=due, actor=actor)
                except (BackupUnderWayError, TenantNotFoundError) as exc:
                    if due is None:
                        reasons[tenant.slug] = str(exc)
                    else:
                        skipped.append(tenant.slug)
                    outcome: Backup | str = str(exc)
                except _FAILURES as exc:
                    outcome = reasons[tenant.slug] = describe(exc)
                else:
                    done.append(made)
                    outcome = made
                if progress is not None:
                    progress(tenant, outcome)

        by_server: dict[str, list[Tenant]] = {}
        for tenant in chosen:
            by_server.setdefault(tenant.placement.server if tenant.placement else "", []).append(tenant)
        async with asyncio.TaskGroup() as group:
            for queue in by_server.values():
                for _ in range(min(self._config.concurrency, len(queue))):
                    group.create_task(work(queue))
        return BackupReport(tuple(done), reasons, tuple(skipped))

    async def run_control(
        self, *, kept_until: datetime | None = None, due: float | None = None, actor: Actor = SYSTEM
    ) -> Backup:
        """Back the control database up: everything in it but the identities of backup keys, which are in the store.

        Raises:
            BackupError: it failed, or another process does it now.
            ConfigurationError: ``backup.store`` is not set.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("backing the control database up")
        self._home.check()
        return await self._make(None, self.store, kept_until=kept_until, due=due, actor=actor)

    async def _back_up(self, tenant: Tenant, store: Store, **options: Any) -> Backup:
        began = time.monotonic()
        try:
            return await self._make(tenant, store, **options)
        except (BackupUnderWayError, TenantNotFoundError):
            raise
        except _FAILURES as exc:
            error, seconds = describe(exc), time.monotonic() - began
            logger.error("tenant %s could not be backed up: %s", tenant.slug, error)
            self._services.events.emit(
                BackupFailed(tenant_id=tenant.id, slug=tenant.slug, error=error, seconds=seconds)
            )
            raise

    async def _make(
        self, tenant: Tenant | None, store: Store, *, kept_until: datetime | None, due: float | None, actor: Actor
    ) -> Backup:
        began = time.monotonic()
        tenant_id = None if tenant is None else tenant.id
        key = await self.keys.current(tenant_id, store, actor=actor)
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
        try:
            async with keep_claims(lambda: self._records.renew(backup_id, claimant)):
                async with asyncio.timeout(self._config.timeout):
                    if tenant is None:
                        manifest = await self._dump_control(backup_id, key, store, path)
                    else:
                        manifest = await self._dump_tenant(backup_id, key, store, path, tenant)
                signed = await self._sign(manifest)
                # the last: what has no manifest is no backup
                await store.put(f"{path}/manifest.json", signed)
            stored = manifest.archive_bytes + len(signed)
            done = await self._records.finish(manifest, claimant, stored_bytes=stored, actor=actor)
        except BaseException as exc:
            await run_to_completion(self._give_up(backup_id, claimant, store, path, exc))
            if isinstance(exc, TimeoutError):
                raise BackupError(f"not done within {self._config.timeout:g} s; raise backup.timeout") from exc
            raise
        slug = None if tenant is None else tenant.slug
        seconds = time.monotonic() - began
        logger.info("%s backed up in %.1f s: %d bytes", slug or "the control database", seconds, stored)
        self._services.events.emit(
            BackupCompleted(tenant_id=tenant_id, slug=slug, backup_id=backup_id, bytes=stored, seconds=seconds)
        )
        return done

    async def _give_up(
        self, backup_id: UUID, claimant: Claimant, store: Store, path: str, error: BaseException
    ) -> None:
        """Remove what was written, and record the failure; what cannot be removed now is removed by ``prune``."""
        try:
            await self._records.fail(
                backup_id, claimant, describe(error) if isinstance(error, Exception) else "stopped"
            )
            await store.delete(f"{path}/manifest.json", f"{path}/dump.tar.age")
        except _FAILURES as exc:
            logger.warning("the backup %s that failed could not be cleared away now: %s", backup_id, describe(exc))

    async def _dump_tenant(self, backup_id: UUID, key: BackupKey, store: Store, path: str, listed: Tenant) -> Manifest:
        # it may have moved while this waited
        tenant = await self._services.registry.get(listed.id)
        place, owner = tenant.placement, self._services.names.owner
        if place is None:
            raise TenantNotFoundError(tenant.slug)

        async def look(connection: Connection) -> Facts:
            return await facts_of(connection, owner=owner, role=place.role)

        async with self._services.provisioner.readers.open(tenant, seconds=self._config.timeout) as reader:
            dumped = await self._dump(reader, TENANT_SCOPE, store, path, [key.recipient], look)
        facts: Facts = dumped.found
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
            revision=tenant.schema_revision,
            fingerprint=facts.fingerprint,
            structure=facts.structure,
            tenant_owned=facts.tenant_owned,
        )

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
            programs=self._programs,
            spool=self._spool(),
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
            package_version=installed_version("tenancy-orm"),
            server_version=found.server_version,
            dump_version=dumped.dump_version,
            lsn=found.lsn,
            snapshot_at=found.snapshot_at,
            database_bytes=found.database_bytes,
            locale=found.locale,
            tables=found.tables,
            large_objects=found.large_objects,
            extensions=found.extensions,
            files=dumped.files,
            archive_bytes=dumped.archive_bytes,
            archive_sha256=dumped.archive_sha256,
            created_at=datetime.now(UTC),
            **values,
        )

    async def _sign(self, manifest: Manifest) -> bytes:
        return manifest.sign(self._services.signer)

    async def _programs(self, version: int) -> Programs:
        # in a thread: it looks at many directories, and starts the programs
        return await asyncio.to_thread(find_programs, version, self._services.config.provisioning.client_programs)

    def _spool(self) -> Spool:
        return Spool(self._config.directory, self._config.max_temporary_bytes)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, backup_id: UUID) -> Backup:
        """Return a backup.

        Raises:
            BackupNotFoundError: there is none of this id.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading backups")
        return await self._records.get(backup_id)

    async def list(
        self,
        tenant: TenantRef | None = None,
        *,
        control: bool = False,
        states: Iterable[BackupState] | None = ("running", "done", "failed"),
        limit: int | None = None,
    ) -> tuple[Backup, ...]:
        """Return backups, the newest first.

        Args:
            tenant: Of this tenant; None: of all tenants.
            control: Those of the control database instead.
            states: Of these states alone; all where None.
            limit: At most so many.

        Raises:
            TenantNotFoundError: there is no such tenant.
            CrossTenantError: another tenant is bound.
        """
        tenant_id = None if tenant is None else await resolve_tenant_id(self._services.control, tenant)
        return await self._records.list(tenant_id=tenant_id, control=control, states=states, limit=limit)

    async def manifest(self, backup: UUID | Backup) -> Manifest:
        """Read a backup's manifest from the store, and verify its signature, and that it is this backup's.

        Raises:
            BackupNotFoundError: there is no such backup, or the store does not have it any more.
            BackupDamagedError: it is not what was written.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading backups")
        found = backup if isinstance(backup, Backup) else await self.get(backup)
        if found.state != "done":
            raise BackupNotFoundError(f"the backup {found.id} is {found.state}")
        data = await self._store_at(found.store).get(found.manifest_path)
        manifest = Manifest.read(data, await self._services.audit.verifier())
        if (manifest.id, manifest.tenant_id, manifest.installation) != (
            found.id,
            found.tenant_id,
            self._services.control.installation,
        ):
            raise BackupNotFoundError(f"the store has another backup at {found.manifest_path}")
        return manifest

    @asynccontextmanager
    async def open(self, backup: UUID | Backup) -> AsyncIterator[OpenBackup]:
        """Decrypt a backup for the body, into temporary space; it is verified: signature, checksums and encryption.

        ```python
        async with tenancy.backups.open(backup_id) as opened:
            opened.directory  # for pg_restore --format=directory
        ```

        Raises:
            BackupNotFoundError: there is no such backup, or the store does not have it any more.
            BackupDamagedError: it is not what was written.
            BackupKeyDestroyedError: its key was destroyed.
            BackupError: the store does not answer, or there is not enough temporary space.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading backups")
        self._home.check()
        found = backup if isinstance(backup, Backup) else await self.get(backup)
        manifest = await self.manifest(found)
        store = self._store_at(found.store)
        identity = await self.keys.open(manifest.key_id, manifest.tenant_id, store)
        with self._spool().open(manifest.dump_bytes) as directory:
            await fetch(store, found.archive_path, manifest, identity, directory)
            yield OpenBackup(found, manifest, directory)


async def fetch(store: Store, path: str, manifest: Manifest, identity: str, directory: Path) -> None:
    """Read an archive, decrypt it and unpack it into a directory.

    Raises:
        BackupDamagedError: it is not what the manifest says.
        BackupError: the store does not answer.
    """
    stopped = False

    def work() -> None:
        def until_stopped() -> Any:
            for chunk in store.read(path):
                if stopped:
                    raise BackupError("the reading was stopped")
                yield chunk

        digest = Digest()
        unpack(decrypt(digest.passing(until_stopped()), identity), manifest, directory)
        digest.check(manifest)

    def stop() -> None:
        nonlocal stopped
        stopped = True

    await in_thread(work, stop)


__all__ = ["BackupManager", "BackupReport", "BackupServices", "OpenBackup"]
