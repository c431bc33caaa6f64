"""The rows of backups in the control database: begun, claimed, ended, listed and pruned.

A backup that is made has a claim, which its process renews. One that is not renewed has been abandoned, and counts as
failed from then on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Row, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import BigInteger, Text, Uuid

from ..audit.actor import Actor
from ..audit.log import AuditLog
from ..cancellation import run_to_completion
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import BackupNotFoundError, BackupUnderWayError, ControlUnavailableError, JobLostError
from ..jobs import CLAIM_SECONDS, Claimant, keep_claims
from .manifest import Manifest
from .status import BackupStatus

logger = logging.getLogger("tenancy_orm.backups")

BackupState = Literal["running", "done", "failed", "pruned"]

_LONGEST_ERROR = 2_000
_REMEMBERED_SECONDS = 90 * 86_400.0  # for how long the row of a backup says that it was removed
_REMOVAL_SECONDS = 300.0  # after that long, others remove what a killed process was removing


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup's row.

    Attributes:
        id: Its id.
        tenant_id: The tenant; None: the control database.
        slug: The tenant's slug now; None: the control database.
        server: The name of the tenant's server then.
        state: "running", "done", "failed" or "pruned".
        store: The store.
        path: Where it is in there, a directory.
        key_id: The key that it is encrypted with.
        started_at: When it was begun.
        ended_at: When it ended.
        bytes: Its size in the store.
        manifest: What it has; None unless it is done.
        error: Why it failed.
        verified_at: When it was restored for a verification, or found to be bad.
        verify_error: What was wrong then.
        kept_until: Until when it is kept whatever the retention policy says.
        pruned_at: When the last of it was removed from the store.
        host: The machine that makes it, or has made it.
    """

    id: UUID
    tenant_id: UUID | None
    slug: str | None
    server: str | None
    state: BackupState
    store: str
    path: str
    key_id: str
    started_at: datetime
    ended_at: datetime | None
    bytes: int | None
    manifest: Manifest | None
    error: str | None
    verified_at: datetime | None
    verify_error: str | None
    kept_until: datetime | None
    pruned_at: datetime | None
    host: str | None

    @property
    def is_good(self) -> bool:
        """Whether it is done, and nothing wrong was found in it."""
        return self.state == "done" and self.verify_error is None

    @property
    def archive_path(self) -> str:
        """Where the encrypted dump is in the store."""
        return f"{self.path}/dump.tar.age"

    @property
    def manifest_path(self) -> str:
        """Where the signed manifest is in the store."""
        return f"{self.path}/manifest.json"


class BackupRecords:
    """Reads and writes the rows.

    Args:
        control: The control database.
        audit: Where changes are recorded.
    """

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    async def begin(
        self,
        backup_id: UUID,
        tenant_id: UUID | None,
        claimant: Claimant,
        *,
        server: str | None,
        at_most: int,
        store: str,
        path: str,
        key_id: str,
        kept_until: datetime | None,
        due: float | None,
    ) -> bool:
        """Write the row of a backup that begins; False while a server has its number of them under way.

        Args:
            backup_id: Its id.
            tenant_id: The tenant; None: the control database.
            claimant: Who makes it.
            server: The tenant's server.
            at_most: How many backups of one server are made at once.
            store: The store.
            path: Where it will be in there.
            key_id: The key that encrypts it.
            kept_until: Until when it is kept.
            due: Only if the last one was begun so many seconds ago; None: in any case.

        Raises:
            BackupUnderWayError: the tenant is being backed up, or was so recently.
        """
        values: dict[str, Any] = {"id": backup_id, "tenant": tenant_id, "server": server, "store": store, "path": path}
        values |= {"key": key_id, "kept_until": kept_until, "seconds": CLAIM_SECONDS}
        values |= {"claim": claimant.id, "host": claimant.host}
        try:
            async with self._control.transaction() as connection:
                await connection.execute(_LOCK, {"name": f"tenancy backups on {server}"})
                await connection.execute(_ABANDON)
                await self._refuse_recent(connection, tenant_id, due)
                running = await connection.scalar(_COUNT, {"server": server})
                if running is not None and running >= at_most and server is not None:
                    return False
                await connection.execute(_INSERT, values)
                # again: the one that was under way may have ended since, and would not be in the way of this row
                await self._refuse_recent(connection, tenant_id, due)
        except IntegrityError as exc:
            raise BackupUnderWayError from exc
        return True

    @staticmethod
    async def _refuse_recent(connection: AsyncConnection, tenant_id: UUID | None, due: float | None) -> None:
        if due is None:
            return
        values = {"tenant": tenant_id, "due": due, "retry": min(due, RETRY_SECONDS)}
        if (await connection.execute(_RECENT, values)).first():
            raise BackupUnderWayError

    async def renew(self, backup_id: UUID, claimant: Claimant) -> bool:
        """Extend a claim; False if it counts as abandoned by now."""
        values = {"id": backup_id, "claim": claimant.id, "seconds": CLAIM_SECONDS}
        async with self._control.transaction() as connection:
            return bool((await connection.execute(_RENEW, values)).rowcount)

    async def finish(self, manifest: Manifest, claimant: Claimant, *, stored_bytes: int, actor: Actor) -> Backup:
        """Record that a backup is done.

        Raises:
            JobLostError: it counts as abandoned by now.
        """
        values = {
            "id": manifest.id,
            "claim": claimant.id,
            "bytes": stored_bytes,
            "manifest": json.dumps(manifest.to_fields(), allow_nan=False),
        }
        async with self._control.transaction() as connection:
            if not (await connection.execute(_DONE, values)).rowcount:
                raise JobLostError
            await self._write_audit(
                connection,
                "backup.run",
                manifest.tenant_id,
                manifest.slug,
                actor,
                {"backup": manifest.id, "bytes": stored_bytes, "lsn": manifest.lsn, "key": manifest.key_id},
            )
        return await self.get(manifest.id)

    async def fail(self, backup_id: UUID, claimant: Claimant, error: str) -> bool:
        """Record that a backup has failed; tells whether what is in the store is this process's to remove.

        It is not where the backup is done, since what failed came after that; and where it counted as abandoned: then
        another process may have found it complete, or looks at it now. ``to_remove`` has it again.
        """
        values = {"id": backup_id, "claim": claimant.id, "error": _text(error)}
        async with self._control.transaction() as connection:
            if (await connection.execute(_FAILED, values)).rowcount:
                return True
            # another process may have removed it before the last of it was written
            await connection.execute(_LOOK_AGAIN, {"id": backup_id})
            return False

    async def take_up(self, manifest: Manifest, *, store: str, path: str, stored_bytes: int, actor: Actor) -> bool:
        """Write the row of a backup that is complete in a store, and has none or one that says that it failed.

        False where there is nothing to do: it is known, or its tenant is not.
        """
        values = {
            "id": manifest.id,
            "tenant": manifest.tenant_id,
            "server": manifest.server,
            "store": store,
            "path": path,
            "key": manifest.key_id,
            "began": manifest.snapshot_at,
            "ended": manifest.created_at,
            "bytes": stored_bytes,
            "manifest": json.dumps(manifest.to_fields(), allow_nan=False),
        }
        async with self._control.transaction() as connection:
            if not (await connection.execute(_TAKE_UP, values)).rowcount:
                return False
            detail = {"backup": manifest.id, "store": store}
            await self._write_audit(connection, "backup.take_up", manifest.tenant_id, manifest.slug, actor, detail)
        return True

    async def known(self) -> frozenset[UUID]:
        """Return the ids of the backups that are done or pruned, or that a process makes now."""
        async with self._control.connect() as connection:
            return frozenset(await connection.scalars(_KNOWN))

    async def get(self, backup_id: UUID) -> Backup:
        """Return a backup.

        Raises:
            BackupNotFoundError: there is none of this id.
            CrossTenantError: another tenant is bound.
        """
        async with self._control.connect() as connection:
            row = (await connection.execute(_GET, {"id": backup_id})).one_or_none()
        if row is None:
            raise BackupNotFoundError(f"there is no backup {backup_id}; list them with: tenancy backup list")
        if row.tenant_id is None:
            refuse_while_bound("backups of the control database")
        else:
            refuse_other_tenant(row.tenant_id)
        return _backup(row)

    async def list(
        self,
        *,
        tenant_id: UUID | None = None,
        control: bool = False,
        states: Iterable[BackupState] | None = None,
        limit: int | None = None,
        manifests: bool = True,
    ) -> tuple[Backup, ...]:
        """Return backups, the newest first.

        Args:
            tenant_id: Of this tenant.
            control: Those of the control database instead; with neither, those of all tenants.
            states: Of these states alone.
            limit: At most so many.
            manifests: Whether they come with their manifests, which have a line for each table.
        """
        if tenant_id is None:
            refuse_while_bound("listing backups")
        else:
            refuse_other_tenant(tenant_id)
        values = {
            "tenant": tenant_id,
            "control": control,
            "states": None if states is None else list(states),
            "limit": limit,
            "manifests": manifests,
        }
        async with self._control.connect() as connection:
            return tuple(_backup(row) for row in await connection.execute(_LIST, values))

    async def done_by_tenant(self) -> AsyncIterator[tuple[Backup, ...]]:
        """Yield the backups that are done, without their manifests: those of one tenant, then those of the next one."""
        refuse_while_bound("listing backups")
        group: tuple[Backup, ...] = ()
        async with self._control.transaction() as connection:
            async for row in await connection.stream(_DONE_BY_TENANT):
                if group and group[0].tenant_id != row.tenant_id:
                    yield group
                    group = ()
                group += (_backup(row),)
        if group:
            yield group

    async def note_verified(self, backup: Backup, error: str | None, *, restored: bool, actor: Actor) -> None:
        """Record the result of a verification. Only one with a restore shows that a backup is good."""
        async with self._control.transaction() as connection:
            if restored or error is not None:
                await connection.execute(_VERIFIED, {"id": backup.id, "error": None if error is None else _text(error)})
            await self._write_audit(
                connection,
                "backup.verify",
                backup.tenant_id,
                backup.slug,
                actor,
                {"backup": backup.id, "good": error is None, "restored": restored},
            )

    @asynccontextmanager
    async def reading(self, backup: Backup) -> AsyncIterator[None]:
        """Record that this process has a backup decrypted, while the body runs.

        What was recorded stays if the process is killed: it has left what it had decrypted.

        Raises:
            BackupNotFoundError: its row is gone.
            JobLostError: the control database has not answered for too long; the body was cancelled.
        """
        claimant = Claimant()
        reader = {"id": backup.id, "reader": str(claimant.id)}
        begun = {**reader, "host": claimant.host, "seconds": CLAIM_SECONDS}

        async def renew() -> bool:
            async with self._control.transaction() as connection:
                return bool((await connection.execute(_READING, begun)).rowcount)

        if not await renew():
            raise BackupNotFoundError(f"the backup {backup.id} does not exist any more")
        try:
            async with keep_claims(renew):
                yield
        finally:
            await run_to_completion(self._end_reading(reader))

    async def _end_reading(self, reader: dict[str, Any]) -> None:
        try:
            async with self._control.transaction() as connection:
                await connection.execute(_READ, reader)
        except ControlUnavailableError as exc:
            logger.warning("the end of the reading of the backup %s was not recorded: %s", reader["id"], exc)

    async def keep(self, backup: Backup, until: datetime | None, actor: Actor) -> Backup:
        """Set until when a backup is kept whatever the policy says.

        Raises:
            BackupNotFoundError: it has failed, or was removed.
        """
        async with self._control.transaction() as connection:
            if not (await connection.execute(_KEEP, {"id": backup.id, "until": until})).rowcount:
                state = await connection.scalar(_STATE, {"id": backup.id})
                raise BackupNotFoundError(f"the backup {backup.id} cannot be kept: it is {state or 'not there'}")
            detail = {"backup": backup.id, "kept_until": until}
            await self._write_audit(connection, "backup.keep", backup.tenant_id, backup.slug, actor, detail)
        return await self.get(backup.id)

    async def begin_pruning(self, backup: Backup, actor: Actor) -> bool:
        """Mark a backup as pruned, before anything of it is removed; False if it is kept by now.

        Whatever was found of others since it was chosen: there is a newer good one, unless nobody can read it any more.
        """
        async with self._control.transaction() as connection:
            # a verification that finds the newer one bad comes before this, or after it
            await connection.execute(_LOCK_DONE, {"tenant": backup.tenant_id})
            if not (await connection.execute(_PRUNE, {"id": backup.id})).rowcount:
                return False
            detail = {"backup": backup.id, "bytes": backup.bytes, "started_at": backup.started_at}
            await self._write_audit(connection, "backup.prune", backup.tenant_id, backup.slug, actor, detail)
        return True

    async def begin_removing(self, backup: Backup, claimant: Claimant) -> bool:
        """Claim what is left of a pruned or failed backup in the store; False if it is not to be removed any more.

        Another process may have taken it up as complete since it was listed, or removes it now.
        """
        values = {"id": backup.id, "state": backup.state, "claim": claimant.id, "seconds": _REMOVAL_SECONDS}
        async with self._control.transaction() as connection:
            return bool((await connection.execute(_REMOVE, values)).rowcount)

    async def finish_removing(self, backup: Backup, claimant: Claimant, *, removed: bool) -> None:
        """Record whether nothing of a pruned or failed backup is left in the store. Its manifest is not kept."""
        async with self._control.transaction() as connection:
            statement = _REMOVED if removed else _NOT_REMOVED
            await connection.execute(statement, {"id": backup.id, "claim": claimant.id})

    async def forget_removed(self) -> None:
        """Delete rows of backups that were removed from the store long ago.

        The newest of each tenant in each store stays: it says where keys of that tenant are.
        """
        async with self._control.transaction() as connection:
            await connection.execute(_FORGET, {"seconds": _REMEMBERED_SECONDS})

    async def to_remove(self) -> tuple[Backup, ...]:
        """Return the backups that are pruned or failed, of which something may be left in the store."""
        refuse_while_bound("pruning backups")
        async with self._control.transaction() as connection:
            await connection.execute(_ABANDON)
            return tuple(_backup(row) for row in await connection.execute(_TO_REMOVE))

    async def servers(self) -> tuple[str, ...]:
        """Return the servers with tenants that are backed up."""
        async with self._control.connect() as connection:
            return tuple(await connection.scalars(_SERVERS))

    async def due(self, server: str, *, every: float, but: Collection[UUID], limit: int) -> tuple[UUID, ...]:
        """Return the tenants of a server that are due: those with the oldest good backup first.

        Args:
            server: The server's name.
            every: Seconds since the beginning of the last one.
            but: Leave these out.
            limit: At most so many.
        """
        refuse_while_bound("listing tenants that are due")
        values = {"server": server, "every": every, "retry": min(every, RETRY_SECONDS), "but": list(but)}
        async with self._control.connect() as connection:
            return tuple(await connection.scalars(_DUE, {**values, "limit": limit}))

    async def status(self, *, overdue_after: float | None, listed: int) -> BackupStatus:
        """Return how old the newest backups are.

        Args:
            overdue_after: Seconds; None: none is overdue.
            listed: How many tenants at most are named.
        """
        refuse_while_bound("the status of backups")
        async with self._control.connect() as connection:
            row = (await connection.execute(_STATUS, {"overdue": overdue_after, "listed": listed})).one()
        return BackupStatus(**row._mapping, overdue_after=overdue_after)

    async def fingerprint(self) -> tuple[Any, ...]:
        """Return what differs once other backups are done, or something else is known of them."""
        async with self._control.connect() as connection:
            return tuple((await connection.execute(_FINGERPRINT)).one())

    async def lost(self) -> frozenset[UUID]:
        """Return the ids of the backups that are done and of no use: their tenant or their key is gone."""
        async with self._control.connect() as connection:
            return frozenset(await connection.scalars(_LOST))

    async def _write_audit(
        self,
        connection: AsyncConnection,
        action: str,
        tenant_id: UUID | None,
        slug: str | None,
        actor: Actor,
        detail: dict[str, Any],
    ) -> None:
        await self._audit.append(connection, action=action, tenant_id=tenant_id, slug=slug, actor=actor, detail=detail)


RETRY_SECONDS = 900.0
"""How long after a failure a tenant is due again."""


def _text(error: str) -> str:
    return error[:_LONGEST_ERROR].replace("\x00", "") or "unknown"


_IS_OF = "b.tenant_id IS NOT DISTINCT FROM CAST(:tenant AS uuid)"
_TENANT = bindparam("tenant", type_=Uuid)
_COLUMNS = (
    "b.id, b.tenant_id, t.slug, b.server, b.state, b.store, b.path, b.key_id, b.started_at, b.ended_at, b.bytes, "
    "b.manifest, b.error, b.verified_at, b.verify_error, b.kept_until, b.pruned_at, b.host"
)
_FROM = "FROM tenancy.backups b LEFT JOIN tenancy.tenants t ON t.id = b.tenant_id"

_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
_ABANDON = text(
    "UPDATE tenancy.backups SET state = 'failed', ended_at = clock_timestamp(), claim = NULL, "
    "error = 'the process that made it has died' "
    "WHERE state = 'running' AND claimed_until <= clock_timestamp()"
)
_COUNT = text("SELECT count(*) FROM tenancy.backups WHERE state = 'running' AND server = :server").bindparams(
    bindparam("server", type_=Text)
)
_RECENT = text(
    # one in which something wrong was found is none
    f"SELECT 1 FROM tenancy.backups b WHERE {_IS_OF} AND b.state IN ('done', 'failed') AND b.verify_error IS NULL "  # noqa: S608 - constants
    "AND b.started_at > clock_timestamp() - make_interval(secs => CASE b.state WHEN 'done' THEN CAST(:due AS float8) "
    "ELSE CAST(:retry AS float8) END)"
).bindparams(_TENANT)
_INSERT = text(
    "INSERT INTO tenancy.backups (id, tenant_id, server, store, path, key_id, claim, host, claimed_until, kept_until) "
    "VALUES (:id, :tenant, :server, :store, :path, :key, :claim, :host, "
    "clock_timestamp() + make_interval(secs => :seconds), :kept_until)"
).bindparams(
    bindparam("id", type_=Uuid),
    _TENANT,
    bindparam("server", type_=Text),
    bindparam("claim", type_=Uuid),
    bindparam("kept_until", type_=TIMESTAMP(timezone=True)),
)
_CLAIMED = "WHERE id = :id AND claim = :claim AND state = 'running'"
_IDS = (bindparam("id", type_=Uuid), bindparam("claim", type_=Uuid))
_RENEW = text(
    f"UPDATE tenancy.backups SET claimed_until = clock_timestamp() + make_interval(secs => :seconds) {_CLAIMED}"  # noqa: S608
).bindparams(*_IDS)
_DONE = text(
    "UPDATE tenancy.backups SET state = 'done', ended_at = clock_timestamp(), claim = NULL, claimed_until = NULL, "  # noqa: S608
    f"bytes = :bytes, manifest = CAST(:manifest AS jsonb) {_CLAIMED}"
).bindparams(*_IDS)
_FAILED = text(
    "UPDATE tenancy.backups SET state = 'failed', ended_at = clock_timestamp(), claim = NULL, claimed_until = NULL, "  # noqa: S608
    f"error = :error {_CLAIMED}"
).bindparams(*_IDS)
_LOOK_AGAIN = text(
    "UPDATE tenancy.backups SET pruned_at = NULL WHERE id = :id AND state = 'failed' AND pruned_at IS NOT NULL"
).bindparams(_IDS[0])
_TAKE_UP = text(
    "INSERT INTO tenancy.backups AS b (id, tenant_id, server, store, path, key_id, state, started_at, ended_at, bytes, "
    "manifest) SELECT :id, CAST(:tenant AS uuid), :server, :store, :path, :key, 'done', :began, :ended, :bytes, "
    "CAST(:manifest AS jsonb) "
    "WHERE CAST(:tenant AS uuid) IS NULL OR EXISTS (SELECT FROM tenancy.tenants WHERE id = CAST(:tenant AS uuid)) "
    "ON CONFLICT (id) DO UPDATE SET state = 'done', ended_at = excluded.ended_at, bytes = excluded.bytes, "
    "manifest = excluded.manifest, claim = NULL, claimed_until = NULL, error = NULL "
    # unless a process makes it now, or removes it
    "WHERE b.state IN ('failed', 'running') AND (b.claimed_until IS NULL OR b.claimed_until <= clock_timestamp())"
).bindparams(
    bindparam("id", type_=Uuid),
    _TENANT,
    bindparam("server", type_=Text),
    bindparam("store", type_=Text),
    bindparam("path", type_=Text),
    bindparam("key", type_=Text),
    bindparam("began", type_=TIMESTAMP(timezone=True)),
    bindparam("ended", type_=TIMESTAMP(timezone=True)),
    bindparam("bytes", type_=BigInteger),
    bindparam("manifest", type_=Text),
)
_KNOWN = text(
    "SELECT id FROM tenancy.backups WHERE state <> 'failed' AND NOT (state = 'running' AND claimed_until <= "
    "clock_timestamp())"
)
_GET = text(f"SELECT {_COLUMNS} {_FROM} WHERE b.id = :id").bindparams(bindparam("id", type_=Uuid))
_LIST = text(
    f"SELECT {_COLUMNS.replace('b.manifest', 'CASE WHEN :manifests THEN b.manifest END AS manifest')} {_FROM} "
    "WHERE (CASE WHEN :control THEN b.tenant_id IS NULL ELSE b.tenant_id IS NOT NULL END) "
    "AND (CAST(:tenant AS uuid) IS NULL OR b.tenant_id = CAST(:tenant AS uuid)) "
    "AND (:states IS NULL OR b.state = ANY (:states)) ORDER BY b.started_at DESC, b.id LIMIT CAST(:limit AS bigint)"
).bindparams(_TENANT, bindparam("states", type_=ARRAY(Text)))
_DONE_BY_TENANT = text(
    f"SELECT {_COLUMNS.replace('b.manifest', 'NULL AS manifest')} {_FROM} WHERE b.state = 'done' ORDER BY b.tenant_id"
)
_VERIFIED = text(
    "UPDATE tenancy.backups SET verified_at = clock_timestamp(), verify_error = :error WHERE id = :id"
).bindparams(bindparam("id", type_=Uuid), bindparam("error", type_=Text))
_READING = text(
    "UPDATE tenancy.backups SET readers = COALESCE(readers, '{}') || jsonb_build_object(CAST(:reader AS text), "
    "jsonb_build_object('host', CAST(:host AS text), 'until', clock_timestamp() + make_interval(secs => :seconds))) "
    "WHERE id = :id"
).bindparams(bindparam("id", type_=Uuid))
_READ = text(
    "UPDATE tenancy.backups SET readers = NULLIF(readers - CAST(:reader AS text), '{}') WHERE id = :id"
).bindparams(bindparam("id", type_=Uuid))
_KEEP = text(
    "UPDATE tenancy.backups SET kept_until = :until WHERE id = :id AND state IN ('running', 'done')"
).bindparams(bindparam("id", type_=Uuid), bindparam("until", type_=TIMESTAMP(timezone=True)))
_STATE = text("SELECT state FROM tenancy.backups WHERE id = :id").bindparams(bindparam("id", type_=Uuid))
_LOCK_DONE = text(
    f"SELECT b.id FROM tenancy.backups b WHERE {_IS_OF} AND b.state = 'done' ORDER BY b.id FOR UPDATE"  # noqa: S608
).bindparams(_TENANT)
# what is found in a store after an erasure has a key that no row tells of
_IS_LOST = (
    "(EXISTS (SELECT FROM tenancy.backup_keys k WHERE k.id = b.key_id AND k.destroyed_at IS NOT NULL) "
    "OR EXISTS (SELECT FROM tenancy.operations o WHERE o.tenant_id = b.tenant_id AND o.kind = 'erasure' "
    "AND o.state = 'done'))"
)
_PRUNE = text(
    "UPDATE tenancy.backups b SET state = 'pruned' WHERE b.id = :id AND b.state = 'done' "  # noqa: S608 - constants
    f"AND ({_IS_LOST} OR ((b.kept_until IS NULL OR b.kept_until <= clock_timestamp()) "
    "AND EXISTS (SELECT FROM tenancy.backups n WHERE n.tenant_id IS NOT DISTINCT FROM b.tenant_id "
    "AND n.state = 'done' AND n.verify_error IS NULL AND (n.started_at, n.id) > (b.started_at, b.id))))"
).bindparams(bindparam("id", type_=Uuid))
_REMOVE = text(
    "UPDATE tenancy.backups SET claim = :claim, claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = :id AND state = :state AND pruned_at IS NULL "
    "AND (claimed_until IS NULL OR claimed_until <= clock_timestamp())"
).bindparams(*_IDS)
_OWN_REMOVAL = "WHERE id = :id AND claim = :claim AND state IN ('pruned', 'failed')"
_REMOVED = text(
    "UPDATE tenancy.backups SET pruned_at = clock_timestamp(), manifest = NULL, claim = NULL, claimed_until = NULL "  # noqa: S608
    + _OWN_REMOVAL
).bindparams(*_IDS)
_NOT_REMOVED = text(f"UPDATE tenancy.backups SET claim = NULL, claimed_until = NULL {_OWN_REMOVAL}").bindparams(*_IDS)  # noqa: S608
_FORGET = text(
    "DELETE FROM tenancy.backups b WHERE b.state IN ('pruned', 'failed') "
    "AND b.pruned_at < clock_timestamp() - make_interval(secs => :seconds) "
    "AND EXISTS (SELECT FROM tenancy.backups n WHERE n.tenant_id IS NOT DISTINCT FROM b.tenant_id "
    "AND n.store = b.store AND (n.started_at, n.id) > (b.started_at, b.id))"
)
_TO_REMOVE = text(
    f"SELECT {_COLUMNS} {_FROM} WHERE b.state IN ('pruned', 'failed') AND b.pruned_at IS NULL ORDER BY b.started_at"
)
_BACKED_UP = "t.status IN ('trial', 'active', 'suspended', 'maintenance') AND t.database_name IS NOT NULL"
_SERVERS = text(f"SELECT DISTINCT t.server FROM tenancy.tenants t WHERE {_BACKED_UP}")  # noqa: S608
_DUE = text(
    f"""
SELECT t.id FROM tenancy.tenants t
  LEFT JOIN LATERAL (
    SELECT max(b.started_at) FILTER (WHERE b.state = 'done' AND b.verify_error IS NULL) AS done,
           max(b.started_at) FILTER (WHERE b.state = 'failed') AS failed,
           bool_or(b.state = 'running' AND b.claimed_until > clock_timestamp()) AS running
      FROM tenancy.backups b WHERE b.tenant_id = t.id AND b.state IN ('done', 'failed', 'running')
  ) b ON true
 WHERE {_BACKED_UP} AND t.server = :server AND t.id <> ALL (:but)
   AND (b.done IS NULL OR b.done <= clock_timestamp() - make_interval(secs => :every))
   AND (b.failed IS NULL OR b.failed <= clock_timestamp() - make_interval(secs => :retry))
   AND b.running IS NOT TRUE
 ORDER BY b.done NULLS FIRST, t.id LIMIT :limit
"""  # noqa: S608 - constants
).bindparams(bindparam("but", type_=ARRAY(Uuid)))
# a tenant that is new has no backup yet
_STATUS = text(
    f"""
WITH newest AS (
  SELECT t.slug, COALESCE(max(b.started_at), t.created_at) AS since, max(b.started_at) AS done,
         max(b.started_at) FILTER (WHERE b.verified_at IS NOT NULL) AS verified
    FROM tenancy.tenants t LEFT JOIN tenancy.backups b
      ON b.tenant_id = t.id AND b.state = 'done' AND b.verify_error IS NULL
   WHERE {_BACKED_UP} GROUP BY t.id
), late AS (
  SELECT slug, since FROM newest WHERE since <= clock_timestamp() - make_interval(secs => CAST(:overdue AS float8))
), control AS (
  SELECT max(started_at) AS done FROM tenancy.backups
   WHERE tenant_id IS NULL AND state = 'done' AND verify_error IS NULL
)
SELECT count(*) AS tenants, count(done) AS backed_up, count(verified) AS verified,
       EXTRACT(EPOCH FROM clock_timestamp() - min(done))::float8 AS oldest_seconds,
       EXTRACT(EPOCH FROM clock_timestamp() - min(verified))::float8 AS oldest_verified_seconds,
       (SELECT count(*) FROM late) AS overdue,
       ARRAY(SELECT slug FROM late ORDER BY since, slug LIMIT :listed) AS overdue_slugs,
       (SELECT EXTRACT(EPOCH FROM clock_timestamp() - done)::float8 FROM control) AS control_seconds,
       COALESCE((SELECT done FROM control), min(t.first)) <= clock_timestamp() - make_interval(
         secs => CAST(:overdue AS float8)) IS TRUE AS control_is_overdue
  FROM newest, (SELECT min(created_at) AS first FROM tenancy.tenants) t
"""  # noqa: S608 - constants
)
_FINGERPRINT = text(
    "SELECT count(*), sum(uuid_hash_extended(b.id, 0)), max(b.verified_at), "
    "count(*) FILTER (WHERE b.kept_until > clock_timestamp()), "
    "(SELECT count(*) FROM tenancy.backup_keys WHERE destroyed_at IS NOT NULL), "
    "(SELECT count(*) FROM tenancy.operations WHERE kind = 'erasure' AND state = 'done') "
    "FROM tenancy.backups b WHERE b.state = 'done'"
)
_LOST = text(f"SELECT b.id FROM tenancy.backups b WHERE b.state = 'done' AND {_IS_LOST}")  # noqa: S608


def _backup(row: Row[Any]) -> Backup:
    names = (
        "id tenant_id slug server state store path key_id started_at ended_at bytes error verified_at verify_error "
        "kept_until pruned_at host"
    )
    values: dict[str, Any] = {name: getattr(row, name) for name in names.split()}
    return Backup(**values, manifest=None if row.manifest is None else Manifest.from_fields(row.manifest))


__all__ = ["Backup", "BackupRecords", "BackupState"]
