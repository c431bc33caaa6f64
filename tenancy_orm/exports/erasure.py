"""``ErasureManager``: completes the erasure of purged tenants, and certifies it (``tenancy.erasures``).

A purge removes what this installation has of a tenant. Its backups may be copied to places that nobody remembers. They
become unreadable by the destruction of their keys, in the control database and in the stores, to all who have no older
copy of these. Only then a certificate is signed. Whatever is killed or does not answer, housekeeping repeats it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text

from ..audit.actor import SYSTEM, Actor
from ..audit.checkpoints import Signer, Verifier
from ..audit.log import AuditLog
from ..backups import Backup, BackupKeys, BackupManager, Store
from ..backups.keys import BackupKey
from ..backups.stores import Stores
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import ErasureError, OperationStateError, TenancyError
from ..jobs.claims import Claimant
from ..operations import Operation, Operations
from ..postgres.errors import describe
from ..postgres.failures import FAILURES
from ..registry.databases import FORGET_DATABASE
from ..registry.registry import Registry
from ..tenant import Status, Tenant, TenantRef
from .certificates import ErasureCertificate
from .remaining import copies_elsewhere, copy_of, interrupted_reading, lost_database, records

logger = logging.getLogger("tenancy_orm.exports")

_AT_ONCE = 100  # tenants of one run
_FORGOTTEN = 100  # databases that a certificate names
_LISTED = 10  # tenants that an error names

_REACHED = "its databases on the servers that exist"
_ERASED = (
    "its database, with every database beside it that a restore, a move or an adoption had left",
    "its role in PostgreSQL, with the password",
    "its API keys, members, invitations, domains, former slugs, metadata, quotas and measurements",
)
# what a purge must have removed before anything is certified
_LEFT = text("""
SELECT (SELECT count(*) FROM tenancy.api_keys WHERE tenant_id = :id)
     + (SELECT count(*) FROM tenancy.members WHERE tenant_id = :id)
     + (SELECT count(*) FROM tenancy.invitations WHERE tenant_id = :id)
     + (SELECT count(*) FROM tenancy.domains WHERE tenant_id = :id)
     + (SELECT count(*) FROM tenancy.tenant_databases WHERE tenant_id = :id)
     + (SELECT count(*) FROM tenancy.backup_keys WHERE tenant_id = :id AND sealed_identity IS NOT NULL)
     + (SELECT count(*) FROM tenancy.tenants WHERE id = :id AND (status <> 'purged' OR sealed_password IS NOT NULL))
""")
_USAGE = text(
    "SELECT count(*) AS count, count(*) FILTER (WHERE sent_at IS NULL) AS unsent, max(sent_at) AS sent_at "
    "FROM tenancy.usage_records WHERE tenant_id = :id"
)
# first those that have not been tried: what fails each time is in nobody's way
_PENDING = text("""
SELECT t.id FROM tenancy.tenants t
  LEFT JOIN LATERAL (SELECT bool_or(o.state = 'done') AS done FROM tenancy.operations o
                      WHERE o.tenant_id = t.id AND o.kind = 'erasure') tries ON true
 WHERE t.status = 'purged' AND t.id <> ALL(CAST(:tried AS uuid[])) AND tries.done IS NOT TRUE
 ORDER BY tries.done IS NOT NULL, random() LIMIT :limit
""")
# tenants that were made of this one's data, and of theirs
_COPIES = text("""
WITH RECURSIVE made AS (
  SELECT o.tenant_id, o.detail->>'of' AS origin FROM tenancy.operations o WHERE o.kind = 'clone'
   UNION SELECT c.id, c.copied_from::text FROM tenancy.tenants c WHERE c.copied_from IS NOT NULL
   -- of before there was that column
   UNION SELECT a.tenant_id, a.detail->>'of' FROM tenancy.audit_log a WHERE a.action = 'tenant.restored_as'),
copies AS (
  SELECT tenant_id FROM made WHERE origin = CAST(:id AS text)
   UNION SELECT made.tenant_id FROM made JOIN copies ON made.origin = copies.tenant_id::text)
SELECT t.slug, (SELECT max((o.detail->>'expires_at')::timestamptz) FROM tenancy.operations o
                 WHERE o.tenant_id = t.id AND o.kind = 'clone') AS expires_at
  FROM tenancy.tenants t JOIN copies ON copies.tenant_id = t.id WHERE t.status <> 'purged' ORDER BY t.id
""")
_READERS = text(
    "SELECT b.id, r.value->>'host' AS host, (r.value->>'until')::timestamptz > clock_timestamp() AS is_reading "
    "FROM tenancy.backups b CROSS JOIN LATERAL jsonb_each(b.readers) r WHERE b.tenant_id = :id ORDER BY b.id, 2"
)
_UPDATED = text("SELECT updated_at FROM tenancy.tenants WHERE id = :id")


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """What a run over purged tenants did: the slugs of those with a new certificate, and what failed."""

    completed: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class ErasureManager:
    """Completes erasures, and issues certificates.

    Args:
        config: ``backup``, ``erasure`` and ``retention`` are read from it.
        control: The control database.
        registry: The tenants.
        audit: Where erasures are recorded; knows the public keys.
        signer: Signs.
        backups: The backups, and their keys.
        operations: Where certificates are kept.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        control: ControlDatabase,
        registry: Registry,
        audit: AuditLog,
        signer: Signer,
        backups: BackupManager,
        operations: Operations,
    ) -> None:
        self._config = config
        self._control = control
        self._registry = registry
        self._audit = audit
        self._signer = signer
        self._backups = backups
        self._operations = operations
        self._stores = Stores(config.backup)

    async def complete(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> ErasureCertificate:
        """Destroy the keys of a purged tenant's backups, and return the certificate of its erasure.

        It is issued once: a later call returns the same one.

        Args:
            tenant: The tenant, by id, or by the slug that it had; or one that exists, by any of its names.
            actor: Who does this.

        Raises:
            ErasureError: it has not been purged; another process does this now; or several tenants have or had
                that slug.
            BackupError: a store of its backups cannot be reached; try again.
            TenantNotFoundError: no such tenant.
            CrossTenantError: a tenant is bound, as for all methods.
        """
        refuse_while_bound("erasing a tenant")
        found = await self._find(tenant)
        if found.status is not Status.PURGED:
            raise ErasureError(f"tenant {found.slug!r} has not been purged: delete and purge it first")
        known = await self._issued(found.id)
        return known or await self._complete(found, actor)

    async def certificate(self, tenant: TenantRef) -> ErasureCertificate:
        """Return the certificate of a tenant that was erased; it is named as in ``complete``.

        Raises:
            ErasureError: there is none yet; or several tenants have or had that slug.
            TenantNotFoundError: no such tenant.
        """
        refuse_while_bound("reading certificates of erasure")
        found = await self._find(tenant)
        known = await self._issued(found.id)
        if known is None:
            raise ErasureError(
                f"there is no certificate of {found.slug!r} yet: tenancy housekeeping issues it once the tenant is "
                "purged and the keys of its backups are destroyed"
            )
        return known

    async def verify(self, certificate: bytes, *, verifier: Verifier | None = None) -> ErasureCertificate:
        """Verify a certificate, and return what it says.

        Args:
            certificate: What ``ErasureCertificate.to_bytes`` returned.
            verifier: Knows the public keys; that of this installation's audit log where None.

        Raises:
            ErasureError: it is none, it was changed, or an unknown key has signed it.
        """
        refuse_while_bound("reading certificates of erasure")
        found = ErasureCertificate.from_bytes(certificate)
        found.verify(verifier or await self._audit.verifier())
        if verifier is None and found.installation != self._control.installation:
            raise ErasureError(f"the certificate was issued by another installation, {found.installation}")
        return found

    async def run(self, *, actor: Actor = SYSTEM) -> ErasureReport:
        """Complete the erasure of every purged tenant that has no certificate: for housekeeping.

        It ends after 100 tenants of which none could be completed, as if a store does not answer.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("erasing tenants")
        completed, errors, tried = list[str](), list[str](), list[UUID]()
        while pending := await self._pending(tried):
            before = len(completed)
            for tenant_id in pending:
                tried.append(tenant_id)
                try:
                    completed.append((await self.complete(tenant_id, actor=actor)).slug)
                except FAILURES as exc:
                    logger.error("the erasure of tenant %s is not complete: %s", tenant_id, describe(exc))
                    errors.append(f"{tenant_id}: {describe(exc)}")
            if len(completed) == before:
                break
        return ErasureReport(tuple(completed), tuple(errors))

    async def _pending(self, tried: Sequence[UUID]) -> list[UUID]:
        async with self._control.connect() as connection:
            found = await connection.execute(_PENDING, {"limit": _AT_ONCE, "tried": list(tried)})
            return list(found.scalars())

    # --- completing -------------------------------------------------------------------------------------------------

    async def _complete(self, tenant: Tenant, actor: Actor) -> ErasureCertificate:
        claimant = Claimant()
        operation = await self._begin(tenant, claimant, actor)
        try:
            async with self._operations.keep(operation, claimant):
                keys = await self._destroy_keys(tenant, actor)
                certificate = await self._sign(tenant, keys, await self._left_in_stores(tenant))
                written = certificate.to_bytes().decode()
                detail = {
                    "operation": operation.id,
                    "backup_keys": len(keys),
                    "certificate_sha256": hashlib.sha256(written.encode()).hexdigest(),
                }
                # first: what is certified is in the audit log
                await self._registry.record(tenant.id, "tenant.erase", detail=detail, actor=actor)
        except BaseException as exc:
            # not failed: housekeeping tries again each minute, on this one
            await run_to_completion(self._end(operation, claimant, "waiting", describe(exc)))
            raise
        await self._operations.finish(operation, claimant, "done", detail={"certificate": written})
        return certificate

    async def _begin(self, tenant: Tenant, claimant: Claimant, actor: Actor) -> Operation:
        """Record it, or take over what a killed process has left, or one that failed.

        Raises:
            ErasureError: another process does this now.
        """
        unfinished = await self._operations.list(tenant_id=tenant.id, kinds=("erasure",), states=("running", "waiting"))
        for other in unfinished:
            if other.is_claimed:
                raise self._busy(tenant, other)
            try:
                return await self._operations.claim(other.id, claimant)
            except OperationStateError as exc:
                raise self._busy(tenant, other) from exc
        operation = await self._operations.begin("erasure", tenant.id, step="keys", claimant=claimant, actor=actor)
        for other in await self._operations.list(tenant_id=tenant.id, kinds=("erasure",), states=("running",)):
            if other.id < operation.id and other.is_claimed:
                # both have begun at once: the first one goes on
                await self._end(operation, claimant, "failed", "another process was faster")
                raise self._busy(tenant, other)
        return operation

    @staticmethod
    def _busy(tenant: Tenant, other: Operation) -> ErasureError:
        return ErasureError(f"operation {other.id}, the erasure of tenant {tenant.slug!r}, is under way")

    async def _end(
        self, operation: Operation, claimant: Claimant, state: Literal["waiting", "failed"], reason: str
    ) -> None:
        try:
            await self._operations.finish(operation, claimant, state, error=reason)
        except TenancyError as exc:
            logger.warning("the end of operation %d was not recorded: %s", operation.id, exc)

    async def _destroy_keys(self, tenant: Tenant, actor: Actor) -> tuple[BackupKey, ...]:
        """Destroy the keys of all backups, in every store, and return them."""
        made = await self._backups.list(tenant.id, states=None)
        urls = dict.fromkeys(one.store for one in made)
        if self._config.backup.store is not None:
            urls.setdefault(self._config.backup.store)
        keys: BackupKeys = self._backups.keys
        known = await keys.of(tenant.id)
        # else an earlier attempt has removed them from each store
        if {key.id for key in known if key.destroyed_at is None} or (
            {one.key_id for one in made} - {key.id for key in known}
        ):
            for url in urls:
                kept = [one for one in made if one.store == url and one.state == "done" and one.pruned_at is None]
                await self._check_store(tenant, self._stores.at(url), kept)
        # those that a control database does not know since it was restored: nobody would remove them
        await self._backups.scan(tenant.id, actor=actor)
        return await keys.destroy(tenant.id, actor=actor)

    async def _left_in_stores(self, tenant: Tenant) -> int:
        """Return how many backups are in stores still, and delete what no prune would."""
        prunable = {str(one.id) for one in await self._backups.list(tenant.id, states=None) if one.pruned_at is None}
        left = 0
        for store in await self._backups.keys.stores_of(tenant.id):
            below = f"{self._control.installation}/{tenant.id}/"
            found: dict[str, list[str]] = {}
            for one in await store.list(below.rstrip("/")):
                found.setdefault(one.path.removeprefix(below).partition("/")[0], []).append(one.path)
            for name, paths in found.items():
                if name in prunable:
                    left += 1
                else:
                    # parts without a manifest, or what came late
                    await store.delete(*paths)
        return left

    async def _check_store(self, tenant: Tenant, store: Store, kept: Sequence[Backup]) -> None:
        """Refuse a store that looks empty: a directory that is not mounted, or a bucket of another installation.

        The keys in the real one would open the backups still.

        Args:
            tenant: The tenant.
            store: The store.
            kept: The tenant's backups that are in there, as their rows say.
        """
        keys = f"{self._control.installation}/keys"
        expected = [f"{keys}/{tenant.id}", *(one.path for one in kept[:1])]
        # without backups of the tenant, what another tenant has there shows that it is the right one
        for prefix in expected if kept else [*expected, keys]:
            if await store.list(prefix):
                return
        raise ErasureError(
            f"the store {store.url} has nothing of tenant {tenant.slug!r}, so that it may not be the one with the "
            "keys of its backups; mount it, or correct backup.store"
        )

    async def _sign(self, tenant: Tenant, keys: tuple[BackupKey, ...], backups: int) -> ErasureCertificate:
        async with self._control.connect() as connection:
            left = await connection.scalar(_LEFT, {"id": tenant.id})
            usage = (await connection.execute(_USAGE, {"id": tenant.id})).one()
            updated_at = await connection.scalar(_UPDATED, {"id": tenant.id})
            copies = (await connection.execute(_COPIES, {"id": str(tenant.id)})).all()
            readers = (await connection.execute(_READERS, {"id": tenant.id})).all()
        if left:
            raise ErasureError(f"the purge of tenant {tenant.slug!r} has left something: run tenancy reconcile")
        if reading := [row for row in readers if row.is_reading]:
            raise ErasureError(
                f"backup {reading[0].id} of tenant {tenant.slug!r} is decrypted on {reading[0].host}, by a "
                "verification for example; its key is destroyed, and housekeeping issues the certificate once that has "
                "ended"
            )
        entries = await self._audit.events(tenant=tenant.id, action="tenant.purge", limit=1)
        forgotten = await self._audit.events(tenant=tenant.id, action=FORGET_DATABASE, limit=_FORGOTTEN)
        lost = [entry.detail for entry in forgotten if entry.detail is not None]
        purged_at: datetime = entries[0].occurred_at if entries else updated_at
        return ErasureCertificate.sign(
            self._signer,
            installation=self._control.installation,
            tenant_id=tenant.id,
            slug=tenant.slug,
            purged_at=purged_at,
            erased=(_REACHED, *_ERASED[1:]) if lost else _ERASED,
            backup_keys={key.id: key.destroyed_at for key in keys if key.destroyed_at is not None},
            remains=(
                *map(lost_database, lost),
                *map(copy_of, copies),
                *map(interrupted_reading, readers),
                *copies_elsewhere(self._config, purged_at, keys, backups=backups),
                *records(self._config, purged_at, usage),
            ),
        )

    # --- finding ----------------------------------------------------------------------------------------------------

    async def _issued(self, tenant_id: UUID) -> ErasureCertificate | None:
        done = await self._operations.list(tenant_id=tenant_id, kinds=("erasure",), states=("done",), limit=1)
        return _certificate(done[0].detail) if done else None

    async def _find(self, tenant: TenantRef) -> Tenant:
        found = await self._registry.find_with_purged(tenant)
        if len(found) > 1:
            # a certificate of one would pass for that of another
            listed = ", ".join(f"{one.id} ({one.status})" for one in found[:_LISTED])
            raise ErasureError(f"several tenants have or had the slug {str(tenant)!r}; name one by its id: {listed}")
        return found[0]


def _certificate(detail: Mapping[str, Any]) -> ErasureCertificate:
    return ErasureCertificate.from_bytes(str(detail["certificate"]).encode())


__all__ = ["ErasureManager", "ErasureReport"]
