"""The audit log: who did what to which tenant, in one hash chain that cannot fork.

Each entry carries the SHA-256 of its own content and of the entry before it. The head of the chain is one row; the
database function ``tenancy.audit_append`` locks it, numbers, times, hashes and inserts the entry, and moves the head:
no client can choose the sequence number, time, hash or database role that is recorded. Entries are written in the
caller's transaction: a change that is rolled back leaves no entry, and a change without its entry does not commit.

``verify`` recomputes the chain. It finds any entry that was changed, removed or inserted. A role that can rewrite the
whole table can also rewrite every hash from some entry on: to detect that, keep checkpoints elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import current_tenant_or_none, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import resolve_tenant_id
from ..errors import AuditError, TenantNotFoundError
from ..tenant import Tenant
from .actor import SYSTEM, Actor
from .chain import ChainCheck, VerifyReport
from .checkpoints import Checkpoint, Signer, Verifier, Voucher
from .entries import AuditEvent, AuditSummary, event_from_row, events_query, insert_entry
from .retention import Retention
from .verification import HEAD, SNAPSHOT, check_end, check_entries, read_cuts


class AuditLog:
    """Appends to the log and reads it; ``tenancy.audit``."""

    def __init__(self, control: ControlDatabase, signer: Signer | None = None) -> None:
        """Use ``control``; checkpoints and cuts need a ``signer``."""
        self._control = control
        self._signer = signer or Signer({})
        self._retention = Retention(control, self._signer)
        self._vouched_for: frozenset[str] = frozenset()  # ids of the keys that the newest one has vouched for

    async def append(
        self,
        connection: AsyncConnection,
        *,
        action: str,
        tenant_id: UUID | None = None,
        slug: str | None = None,
        actor: Actor = SYSTEM,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one entry in the transaction of ``connection`` and return its sequence number.

        The chain's head stays locked until that transaction ends, so make this its last statement. That also keeps one
        order of locks everywhere (rows first, the head last), which rules out deadlocks.

        Args:
            connection: An open transaction on the control database, READ COMMITTED.
            action: What was done, as ``noun.verb``: lower case letters, digits, dots and underscores.
            tenant_id: The id of the tenant that it was done to.
            slug: The tenant's slug at that time.
            actor: Who did it.
            before: The changed fields before the change. Never a secret; ``bytes`` are refused.
            after: The changed fields after it.
            detail: Anything else worth recording.

        Raises:
            TypeError: a value is not JSON; datetimes, UUIDs and enums are written as text.
            CrossTenantError: another tenant is bound.
        """
        return await insert_entry(
            connection,
            action=action,
            tenant_id=tenant_id,
            slug=slug,
            actor=actor,
            before=before,
            after=after,
            detail=detail,
        )

    # --- reading ----------------------------------------------------------------------------------------------------

    async def events(
        self,
        *,
        tenant: str | UUID | Tenant | None = None,
        actor: Actor | str | None = None,
        action: str | Sequence[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
        after: int | AuditEvent | None = None,
    ) -> list[AuditEvent]:
        """Return entries, newest first.

        Args:
            tenant: Only this tenant's, by any of its names. A slug that no tenant has any more finds the entries that
                were made under it: all of them for operators, its own for a bound tenant.
            actor: Only this actor's: an ``Actor`` (its kind and, if it has one, its id), or the id alone.
            action: Only this action, or these; one that ends in ``.`` means all actions with that prefix.
            since: Only from this time on, an aware datetime.
            until: Only before this time.
            limit: The largest number of entries.
            after: Continue after this entry, or this sequence number: the last of the previous page.

        Raises:
            CrossTenantError: another tenant is bound, or one is and ``tenant`` is None.
        """
        if tenant is None:
            refuse_while_bound("reading the audit log of all tenants")
        owner = None if tenant is None else await self._resolve_tenant(tenant)
        bound = current_tenant_or_none()
        reader = bound.id if bound is not None else owner
        query, parameters = events_query(owner, actor, action, since, until, limit, after)
        # Row-level security shows one tenant's rows alone: those of the bound tenant, whatever it asked for. Only
        # operators read all rows, and the entries under a slug that no tenant has any more.
        reading = self._control.viewing(reader) if isinstance(reader, UUID) else self._control.connect()
        async with reading as connection:
            rows = (await connection.execute(text(query), parameters)).all()
        return [event_from_row(row) for row in rows]

    async def _resolve_tenant(self, tenant: str | UUID | Tenant) -> UUID | str:
        """Return the id of the tenant that has this name now, or else the slug that entries were made under."""
        try:
            return await resolve_tenant_id(self._control, tenant)
        except TenantNotFoundError:
            return str(tenant)

    async def summary(self, *, since: date | None = None, until: date | None = None) -> list[AuditSummary]:
        """Count entries by day (UTC), action and kind of actor, newest day first.

        Args:
            since: From this day on.
            until: Before this day.
        """
        refuse_while_bound("reading the audit log of all tenants")
        query = text(
            "SELECT day, action, actor_kind, entries, tenants FROM tenancy.audit_summary "
            "WHERE (CAST(:since AS date) IS NULL OR day >= :since) AND (CAST(:until AS date) IS NULL OR day < :until) "
            "ORDER BY day DESC, entries DESC, action, actor_kind"
        )
        async with self._control.connect() as connection:
            rows = (await connection.execute(query, {"since": since, "until": until})).all()
        return [AuditSummary(*row) for row in rows]

    # --- proof ------------------------------------------------------------------------------------------------------

    async def verify(
        self,
        checkpoints: Checkpoint | Iterable[Checkpoint] = (),
        *,
        since: Checkpoint | None = None,
        verifier: Verifier | None = None,
    ) -> VerifyReport:
        """Recompute the chain in order, in bounded memory and one snapshot, up to the first entry that is not valid.

        Args:
            checkpoints: Exported earlier and kept elsewhere; the log must agree with each. They detect a rewrite of the
                whole chain, and entries that were removed from its end.
            since: Begin after this checkpoint instead of at the start; earlier entries are not verified again.
            verifier: The only verifier of signatures; None: what ``verifier()`` returns.

        Raises:
            AuditError: a checkpoint's signature is not valid, or it is another installation's checkpoint.
        """
        refuse_while_bound("verifying the audit log")
        given = [checkpoints] if isinstance(checkpoints, Checkpoint) else list(checkpoints)
        verifier = verifier or await self.verifier()
        for checkpoint in (*given, *([since] if since else [])):
            self._check_checkpoint(checkpoint, verifier)
        async with self._control.transaction() as connection:
            await connection.execute(SNAPSHOT)
            chain = ChainCheck(await read_cuts(connection, self._control.installation), given, verifier, since)
            if await check_entries(connection, chain, since.occurred_at if since else None):
                await check_end(connection, chain)
        return chain.report()

    async def export_checkpoint(self) -> Checkpoint:
        """Sign the chain's current head. Keep the result (``to_json``) where the database's operators cannot change it.

        Raises:
            AuditError: the log is empty.
            ConfigurationError: there is no key to sign with.
        """
        refuse_while_bound("signing the audit log")
        async with self._control.connect() as connection:
            head = (await connection.execute(HEAD)).one_or_none()
        if head is None or head.sequence == 0:
            raise AuditError("the audit log is empty; there is nothing to sign")
        return self._signer.sign(
            "checkpoint",
            installation=self._control.installation,
            sequence=head.sequence,
            digest=head.hash,
            occurred_at=head.occurred_at,
        )

    def _check_checkpoint(self, checkpoint: Checkpoint, verifier: Verifier) -> None:
        if checkpoint.installation != self._control.installation:
            raise AuditError(f"the {checkpoint.kind} belongs to another installation, {checkpoint.installation}")
        verifier.verify(checkpoint)

    # --- keys -------------------------------------------------------------------------------------------------------

    @property
    def public_keys(self) -> dict[str, str]:
        """The public keys of the configured keys, in base64 by id, for ``checkpoints.Verifier``."""
        return self._signer.public_keys

    async def verifier(self) -> Verifier:
        """Return the verifier of this log's signatures: the configured keys, and the retired keys that they vouch for.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.connect() as connection:
            rows = (await connection.execute(_VOUCHERS)).all()
        return self._signer.including(Voucher(installation=self._control.installation, **row._mapping) for row in rows)

    async def add_keys(self, keys: Mapping[str, bytes]) -> None:
        """Sign with the last of these keys from now on, and vouch for the public keys of the others.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        self._signer.add_keys(keys)
        await self.vouch_for_keys()

    async def vouch_for_keys(self) -> None:
        """Have the newest key vouch for the others, so that their signatures stay valid when they are retired.

        Does nothing with one key, or where that was done before.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        signer = self._signer
        if signer.current is None or set(signer.public_keys) <= {signer.current, *self._vouched_for}:
            return
        # also those that an older key has vouched for: its vouchers do not count once it is retired
        known = (await self.verifier()).public_keys
        due = [key_id for key_id in known if key_id != signer.current]
        async with self._control.transaction() as connection:
            for key_id in due:
                voucher = signer.vouch(
                    installation=self._control.installation,
                    key_id=key_id,
                    public_key=base64.b64decode(known[key_id]),
                )
                await connection.execute(_INSERT_VOUCHER, {name: getattr(voucher, name) for name in _VOUCHER_COLUMNS})
        self._vouched_for = frozenset(due)

    # --- upkeep -----------------------------------------------------------------------------------------------------

    async def ensure_partitions(self, months: int = 3) -> int:
        """Create the partitions of this month and the next ``months``; returns how many were missing.

        ``append`` creates them too, a month ahead; after this it does not have to.
        """
        refuse_while_bound("extending the audit log")
        async with self._control.transaction() as connection:
            made = await connection.scalar(text("SELECT tenancy.audit_ensure_partitions(:months)"), {"months": months})
        return int(made)

    async def prune(
        self,
        *,
        before: datetime,
        detach: bool = False,
        actor: Actor = SYSTEM,
        lock_timeout: float = 5.0,
        verifier: Verifier | None = None,
    ) -> Checkpoint | None:
        """Remove the whole months that ended by ``before``; returns the signed cut, or None if there were none.

        The months are verified first, up to the first entry after them. The cut records the hash that this entry
        continues, so that the rest of the log stays verifiable; the removal is itself an entry. Run it as the owner of
        the tables: the application's role may not.

        Args:
            before: An aware datetime; months that ended by then are removed. The current month never is.
            detach: Detach the months as separate tables, to be dumped elsewhere, instead of dropping them.
            actor: Who does this.
            lock_timeout: Seconds to try to lock the log against its readers. Appends wait for a fraction of a second at
                a time.
            verifier: The verifier of the previous cut's signature, as in ``verify``.

        Raises:
            AuditChainError: the chain is broken in these months; they are evidence, and stay.
            AuditError: this role does not own the tables; readers locked them for longer than ``lock_timeout``; or the
                months have changed since they were verified.
            ConfigurationError: there is no key to sign with.
        """
        refuse_while_bound("removing audit entries")
        verifier = verifier or await self.verifier()
        return await self._retention.prune(
            before=before, detach=detach, actor=actor, lock_timeout=lock_timeout, verifier=verifier
        )


_VOUCHER_COLUMNS = ("key_id", "public_key", "signed_by", "signature")
_VOUCHERS = text("SELECT key_id, public_key, signed_by, signature FROM tenancy.audit_keys")
_INSERT_VOUCHER = text(
    "INSERT INTO tenancy.audit_keys (key_id, public_key, signed_by, signature) "
    "VALUES (:key_id, :public_key, :signed_by, :signature) ON CONFLICT DO NOTHING"
)
