"""The audit log: who did what to which tenant, in one hash chain that cannot fork.

Each entry carries the SHA-256 of its own content and of the entry before it. The head of the chain is one row; the
database function ``tenancy.audit_append`` locks it, numbers, times, hashes and inserts the entry, and moves the head:
no client can choose a sequence number, a time, a hash or the database role that is recorded. The log takes part in the
caller's transaction: a change that is rolled back leaves no entry, and one whose entry fails does not commit.

``verify`` recomputes the chain. It finds any entry that was changed, removed or inserted, except that whoever can
rewrite the whole table can also rewrite every hash from some entry on: against that, keep checkpoints elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..context import current_tenant_or_none, refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import ask_tenant_id
from ..errors import AuditError, TenantNotFoundError
from ..postgres.quoting import quote_identifier
from ..tenant import Tenant
from .actor import SYSTEM, Actor, ActorKind, clean_text
from .chain import Chain, VerifyReport
from .checkpoints import Checkpoint, Signer, Verifier, Voucher

_BATCH = 500  # entries hashed between two waits for the server, so that the event loop is never held for long
_LOCK_WAIT = 0.2  # seconds that retention waits for a lock while it holds up everybody who appends
_PAUSE = 0.1  # ... and lets them go on before it tries again


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One entry of the log. ``before``, ``after`` and ``detail`` are JSON objects or None."""

    sequence: int
    occurred_at: datetime
    action: str
    tenant_id: UUID | None
    slug: str | None
    actor: Actor
    before: Mapping[str, Any] | None = field(repr=False)
    after: Mapping[str, Any] | None = field(repr=False)
    detail: Mapping[str, Any] | None = field(repr=False)
    database_role: str = field(repr=False)
    hash: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """How many entries of one action, by one kind of actor, one day (UTC) has, and for how many tenants."""

    day: date
    action: str
    actor_kind: ActorKind
    entries: int
    tenants: int


_APPEND = text(
    "SELECT tenancy.audit_append(:action, CAST(:tenant_id AS uuid), :slug, :actor_kind, :actor_id, "
    "CAST(:before AS jsonb), CAST(:after AS jsonb), CAST(:detail AS jsonb), :request_id, :source)"
)

_COLUMNS = (
    "sequence, occurred_at, action, tenant_id, slug, actor_kind, actor_id, before, after, detail, request_id, "
    "source, database_role, hash"
)


class AuditLog:
    """Appends to the log and reads it; ``tenancy.audit``."""

    def __init__(self, control: ControlDatabase, signer: Signer | None = None) -> None:
        """Use ``control``; ``signer`` signs checkpoints and cuts, which need it."""
        self._control = control
        self._signer = signer or Signer({})
        self._kept: frozenset[str] = frozenset()  # ids of the keys that the newest one has vouched for

    async def append(
        self,
        conn: AsyncConnection,
        *,
        action: str,
        tenant_id: UUID | None = None,
        slug: str | None = None,
        actor: Actor = SYSTEM,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one entry in the transaction of ``conn`` and return its sequence number.

        The chain's head stays locked until that transaction ends: make this its last statement. It also keeps the
        order of locks the same everywhere (rows first, the head last), which is what rules out deadlocks.

        Args:
            conn: An open transaction on the control database, READ COMMITTED.
            action: What was done, as ``noun.verb``: lower case letters, digits, dots and underscores.
            tenant_id: Whom it was done to.
            slug: ... as it was called then.
            actor: Who did it.
            before: The changed fields before the change. Never a secret; ``bytes`` are refused.
            after: ... and after it.
            detail: Anything else worth keeping.

        Raises:
            TypeError: a value is not JSON; datetimes, UUIDs and enums are written as text.
            CrossTenantError: another tenant is bound.
        """
        if (named := tenant_id or slug) is not None:
            refuse_other_tenant(named)
        parameters = {
            "action": action,
            "tenant_id": tenant_id,
            "slug": slug,
            "actor_kind": actor.kind,
            "actor_id": clean_text(actor.id),
            "before": _encode(before),
            "after": _encode(after),
            "detail": _encode(detail),
            "request_id": clean_text(actor.request_id),
            "source": clean_text(actor.source),
        }
        sequence = await conn.scalar(_APPEND, parameters)
        return int(sequence)

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
                were made under it: to operators all of them, while a tenant is bound its own.
            actor: Only this actor's: an ``Actor`` (its kind and, where given, its id), or the id alone.
            action: Only this action, or these; one that ends in ``.`` stands for all that begin so.
            since: Not before this time, an aware datetime.
            until: Before this time.
            limit: How many at most.
            after: Continue a page after this entry, or this sequence number.

        Raises:
            CrossTenantError: another tenant is bound, or one is and ``tenant`` is None.
        """
        if tenant is None:
            refuse_while_bound("reading the audit log of all tenants")
        whose = None if tenant is None else await self._whose(tenant)
        bound = current_tenant_or_none()
        reader = bound.id if bound is not None else whose
        query, parameters = _query(whose, actor, action, since, until, limit, after)
        # Row-level security shows a tenant's rows alone: those of the bound tenant, whatever it asked for. Only
        # operators read everybody's, and the entries under a slug that is nobody's any more.
        reading = self._control.viewing(reader) if isinstance(reader, UUID) else self._control.connect()
        async with reading as conn:
            rows = (await conn.execute(text(query), parameters)).all()
        return [_event(row) for row in rows]

    async def _whose(self, tenant: str | UUID | Tenant) -> UUID | str:
        """The id of the tenant that has this name now, or else the slug under which entries were made."""
        try:
            return await ask_tenant_id(self._control, tenant)
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
        async with self._control.connect() as conn:
            rows = (await conn.execute(query, {"since": since, "until": until})).all()
        return [AuditSummary(*row) for row in rows]

    # --- proof ------------------------------------------------------------------------------------------------------

    async def verify(
        self,
        checkpoints: Checkpoint | Iterable[Checkpoint] = (),
        *,
        since: Checkpoint | None = None,
        verifier: Verifier | None = None,
    ) -> VerifyReport:
        """Recompute the chain in order, in bounded memory and one snapshot, up to the first entry that does not hold.

        Args:
            checkpoints: Exported earlier and kept elsewhere: the log must agree with each. This is what detects a
                rewrite of the whole chain, and a tail that was cut off.
            since: Begin after this checkpoint instead of at the start: what precedes it is taken as verified.
            verifier: Who judges signatures, alone; where None, what ``verifier()`` returns.

        Raises:
            AuditError: a checkpoint's signature is not valid, or it is another installation's.
        """
        refuse_while_bound("verifying the audit log")
        given = [checkpoints] if isinstance(checkpoints, Checkpoint) else list(checkpoints)
        judge = verifier or await self.verifier()
        for checkpoint in (*given, *([since] if since else [])):
            self._admit(checkpoint, judge)
        async with self._control.transaction() as conn:
            await conn.execute(_SNAPSHOT)
            chain = Chain(await self._cuts(conn), given, judge, since)
            if await _follow(conn, chain, since.occurred_at if since else None):
                await _finish(conn, chain)
        return chain.report()

    async def export_checkpoint(self) -> Checkpoint:
        """Sign where the chain is now. Keep the result (``to_json``) where the database's operators cannot change it.

        Raises:
            AuditError: the log is empty.
            ConfigurationError: there is no key to sign with.
        """
        refuse_while_bound("signing the audit log")
        async with self._control.connect() as conn:
            head = (await conn.execute(_HEAD)).one_or_none()
        if head is None or head.sequence == 0:
            raise AuditError("the audit log is empty; there is nothing to sign")
        return self._signer.sign(
            "checkpoint",
            installation=self._control.installation,
            sequence=head.sequence,
            digest=head.hash,
            occurred_at=head.occurred_at,
        )

    def _admit(self, checkpoint: Checkpoint, judge: Verifier) -> None:
        if checkpoint.installation != self._control.installation:
            raise AuditError(f"the {checkpoint.kind} is of installation {checkpoint.installation}, not of this one")
        judge.verify(checkpoint)

    # --- keys -------------------------------------------------------------------------------------------------------

    @property
    def public_keys(self) -> dict[str, str]:
        """The public keys, in base64 by id, of the keys that are configured: for ``checkpoints.Verifier``."""
        return self._signer.public_keys

    async def verifier(self) -> Verifier:
        """Return who judges this log's signatures: the configured keys, and the retired ones that they vouch for.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.connect() as conn:
            rows = (await conn.execute(_VOUCHERS)).all()
        return self._signer.including(Voucher(installation=self._control.installation, **row._mapping) for row in rows)

    async def renew_keys(self, keys: Mapping[str, bytes]) -> None:
        """Sign with the last of these keys from now on, and keep the public keys of the others.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        self._signer.renew(keys)
        await self.keep_public_keys()

    async def keep_public_keys(self) -> None:
        """Have the newest key vouch for the others, so that what they signed still verifies when they are retired.

        With one key there is nothing to do. Repeating it does nothing.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        signer = self._signer
        if signer.current is None or set(signer.public_keys) <= {signer.current, *self._kept}:
            return
        # those that an older key has vouched for too: that key's word ends with it
        known = (await self.verifier()).public_keys
        due = [key_id for key_id in known if key_id != signer.current]
        async with self._control.transaction() as conn:
            for key_id in due:
                voucher = signer.vouch(
                    installation=self._control.installation,
                    key_id=key_id,
                    public_key=base64.b64decode(known[key_id]),
                )
                await conn.execute(_KEEP, {name: getattr(voucher, name) for name in _VOUCHER_COLUMNS})
        self._kept = frozenset(due)

    async def _cuts(self, conn: AsyncConnection) -> dict[int, Checkpoint]:
        rows = (await conn.execute(text("SELECT * FROM tenancy.audit_cuts"))).all()
        return {
            row.sequence: Checkpoint(
                kind="cut",
                installation=self._control.installation,
                sequence=row.sequence,
                hash=row.hash,
                occurred_at=row.occurred_at,
                signed_at=row.cut_at,
                key_id=row.key_id,
                signature=row.signature,
            )
            for row in rows
        }

    # --- upkeep -----------------------------------------------------------------------------------------------------

    async def ensure_partitions(self, months: int = 3) -> int:
        """Make the partitions of this month and the next ``months``; returns how many were missing.

        Appending makes them too, a month ahead of need; with this it never has to.
        """
        refuse_while_bound("extending the audit log")
        async with self._control.transaction() as conn:
            made = await conn.scalar(text("SELECT tenancy.audit_ensure_partitions(:months)"), {"months": months})
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

        What is removed is verified first, up to the entry that continues it. The cut keeps the hash that this entry
        continues, so that what remains still verifies, and is itself an entry of the log. Run it as the owner of the
        tables: the application's role may not.

        Args:
            before: An aware datetime; a month is removed when it ended by then. The current month never is.
            detach: Leave the months behind as tables of their own, to be dumped elsewhere, instead of dropping them.
            actor: Who does this.
            lock_timeout: How long to try to get ahead of readers of the log, in seconds. Those who append wait for a
                fraction of a second at a time.
            verifier: Who judges the signature of the cut before, as in ``verify``.

        Raises:
            AuditChainError: what would be removed does not hold: it is evidence, and stays.
            AuditError: this role does not own the tables; readers held them for longer than ``lock_timeout``; or the
                months are not what was verified any more.
            ConfigurationError: there is no key to sign with.
        """
        refuse_while_bound("removing audit entries")
        removal = await self._removal(before, verifier or await self.verifier())
        if removal is None:
            return None
        deadline = time.monotonic() + lock_timeout
        while True:
            try:
                return await self._cut(removal, detach, actor, min(lock_timeout, _LOCK_WAIT))
            except DBAPIError as exc:
                state = getattr(exc.orig, "sqlstate", None) or ""
                if state not in _REFUSED:
                    raise
                if state not in _BUSY or time.monotonic() >= deadline:
                    raise AuditError(f"old months of the audit log were not removed: {_REFUSED[state]}") from exc
            await asyncio.sleep(_PAUSE)

    async def _cut(self, removal: _Removal, detach: bool, actor: Actor, lock_wait: float) -> Checkpoint | None:
        async with self._control.transaction() as conn:
            await conn.execute(
                text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": f"{int(lock_wait * 1000)}ms"}
            )
            # the head first and the tables after it: the order in which every append locks them
            await conn.execute(text("SELECT 1 FROM tenancy.audit_head FOR UPDATE"))
            names = await _ended(conn, removal.until)
            if not names:
                return None  # another process was faster
            newest = (await conn.execute(_NEWEST, {"until": removal.until})).one_or_none()
            if newest is None or (newest.sequence, newest.hash) != (removal.last.sequence, removal.last.hash):
                raise AuditError("the old months of the audit log have changed since they were verified; try again")
            cut = await self._record_cut(conn, removal.last, names, actor)
            for name in names:
                table = f"tenancy.{quote_identifier(name)}"
                await conn.exec_driver_sql(
                    f"ALTER TABLE tenancy.audit_log DETACH PARTITION {table}" if detach else f"DROP TABLE {table}"
                )
        return cut

    async def _removal(self, before: datetime, judge: Verifier) -> _Removal | None:
        """Verify what retention would remove; returns None if there is nothing."""
        # a transaction of its own: its cursor keeps the tables in use to the end
        async with self._control.transaction() as conn:
            await conn.execute(_SNAPSHOT)
            names = await _ended(conn, before)
            if not names:
                return None
            until = max(map(_month_end, names))
            chain = Chain(await self._cuts(conn), [], judge, None)
            holds = await _follow(conn, chain, None, until)
            last = chain.previous
            if holds:
                await _follow_on(conn, chain, until)
        chain.report().raise_if_bad()
        return None if last is None else _Removal(until, last)

    async def _record_cut(self, conn: AsyncConnection, last: Any, names: Sequence[str], actor: Actor) -> Checkpoint:
        cut = self._signer.sign(
            "cut",
            installation=self._control.installation,
            sequence=last.sequence,
            digest=last.hash,
            occurred_at=last.occurred_at,
        )
        await conn.execute(
            text(
                "INSERT INTO tenancy.audit_cuts (sequence, occurred_at, hash, cut_at, key_id, signature) "
                "VALUES (:sequence, :occurred_at, :hash, :cut_at, :key_id, :signature)"
            ),
            {
                "sequence": cut.sequence,
                "occurred_at": cut.occurred_at,
                "hash": cut.hash,
                "cut_at": cut.signed_at,
                "key_id": cut.key_id,
                "signature": cut.signature,
            },
        )
        detail = {"sequence": cut.sequence, "hash": cut.hash.hex(), "months": list(names)}
        await self.append(conn, action="audit.cut", actor=actor, detail=detail)
        return cut


@dataclass(frozen=True, slots=True)
class _Removal:
    """What retention has verified: the months that ended by ``until``, whose last entry is ``last``."""

    until: datetime
    last: Any


_REFUSED = {
    "42501": "only the owner of the control tables may; run it as the role that ran tenancy init",
    "55P03": "a transaction that reads the log held it for too long; try again",
    "40P01": "a transaction that reads the log waits to append to it; try again",
}
_BUSY = ("55P03", "40P01")
_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
_HEAD = text("SELECT sequence, occurred_at, hash FROM tenancy.audit_head")
_VOUCHER_COLUMNS = ("key_id", "public_key", "signed_by", "signature")
_VOUCHERS = text("SELECT key_id, public_key, signed_by, signature FROM tenancy.audit_keys")
_KEEP = text(
    "INSERT INTO tenancy.audit_keys (key_id, public_key, signed_by, signature) "
    "VALUES (:key_id, :public_key, :signed_by, :signature) ON CONFLICT DO NOTHING"
)
_PARTITIONS = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
    "WHERE i.inhparent = 'tenancy.audit_log'::regclass ORDER BY c.relname"
)
# by the clock that entries are timed with; an application's own may be ahead of it
_THIS_MONTH = text("SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'")
_NEWEST = text(
    "SELECT sequence, hash FROM tenancy.audit_log WHERE occurred_at < :until "
    "ORDER BY occurred_at DESC, sequence DESC LIMIT 1"
)
_SELECT_ENTRIES = (
    "SELECT sequence, occurred_at, action, tenant_id, slug, actor_kind, actor_id, before::text AS before, "
    "after::text AS after, detail::text AS detail, request_id, source, database_role, previous_hash, hash "
    "FROM tenancy.audit_log WHERE occurred_at >= :since AND occurred_at < :until ORDER BY occurred_at, sequence"
)
_ENTRIES = text(_SELECT_ENTRIES)
_FIRST_ENTRY = text(f"{_SELECT_ENTRIES} LIMIT 1")
# between these every time is one that Python has, in any time zone
_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
_STRAY = text(
    "SELECT sequence FROM tenancy.audit_log WHERE occurred_at < :earliest OR occurred_at >= :latest "
    "ORDER BY sequence LIMIT 1"
)


async def _follow(conn: AsyncConnection, chain: Chain, since: datetime | None, until: datetime | None = None) -> bool:
    """Follow the entries of a stretch of time to the first that does not hold, and return whether all do."""
    async for batch in _stream(conn, since, until):
        if not all(chain.follow(row) for row in batch):
            return False
    return True


async def _follow_on(conn: AsyncConnection, chain: Chain, until: datetime) -> None:
    """Follow the first entry that is kept, or to the head: what is gone before it shows there alone."""
    kept = (await conn.execute(_FIRST_ENTRY, {"since": until, "until": _LATEST})).one_or_none()
    if kept is None:
        await _finish(conn, chain)
    else:
        chain.follow(kept)


async def _finish(conn: AsyncConnection, chain: Chain) -> None:
    """After the last entry: compare the head, and look for entries at times that none can have."""
    stray = await conn.scalar(_STRAY, {"earliest": _EARLIEST, "latest": _LATEST})
    if stray is not None:
        chain.reject(stray, "its time is outside of the years 1 to 9999")
    head = (await conn.execute(_HEAD)).one_or_none()
    if head is None:
        chain.reject(chain.sequence + 1, "the head of the chain is gone")
    else:
        chain.finish(head.sequence, head.hash)


async def _stream(
    conn: AsyncConnection, since: datetime | None, until: datetime | None
) -> AsyncIterator[Sequence[Any]]:
    """Yield entries in the chain's order, a batch at a time, through a server-side cursor."""
    parameters = {"since": since or _EARLIEST, "until": until or _LATEST}
    options = {"yield_per": _BATCH}
    async with conn.stream(_ENTRIES, parameters, execution_options=options) as result:
        async for batch in result.partitions(_BATCH):
            yield batch


async def _ended(conn: AsyncConnection, before: datetime) -> list[str]:
    """The partitions of the months that ended by ``before``, and before the current month."""
    until = min(before, await conn.scalar(_THIS_MONTH))
    return [name for name in await conn.scalars(_PARTITIONS) if _month_end(name) <= until]


def _month_end(partition: str) -> datetime:
    """When the month of ``audit_log_y2026m11`` is over."""
    try:
        first = datetime.strptime(partition, "audit_log_y%Ym%m").replace(tzinfo=UTC)
        return (first + timedelta(days=31)).replace(day=1)
    except (ValueError, OverflowError) as exc:
        raise AuditError(f"table {partition!r} is a part of the audit log that this package did not make") from exc


def _query(
    tenant: str | UUID | None,
    actor: Actor | str | None,
    action: str | Sequence[str] | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    after: int | AuditEvent | None,
) -> tuple[str, dict[str, Any]]:
    conditions: list[str] = []
    parameters: dict[str, Any] = {"limit": limit}

    def where(condition: str, **values: Any) -> None:
        conditions.append(condition)
        parameters.update(values)

    if isinstance(tenant, UUID):
        where("tenant_id = :tenant_id", tenant_id=tenant)
    elif tenant is not None:
        where("slug = :slug", slug=tenant)
    if actor is not None:
        # every kind where it is not said: the index begins with it
        kinds = [actor.kind] if isinstance(actor, Actor) else list(get_args(ActorKind))
        where("actor_kind = ANY(:actor_kinds)", actor_kinds=kinds)
    actor_id = actor.id if isinstance(actor, Actor) else actor
    if actor_id is not None:
        where("actor_id = :actor_id", actor_id=actor_id)
    if action is not None:
        actions = [action] if isinstance(action, str) else list(action)
        prefixes = [name for name in actions if name.endswith(".")]
        where(
            "(action = ANY(:actions) OR EXISTS (SELECT 1 FROM unnest(CAST(:prefixes AS text[])) AS p "
            "WHERE starts_with(action, p)))"
            if prefixes
            else "action = ANY(:actions)",
            actions=actions,
            **({"prefixes": prefixes} if prefixes else {}),
        )
    if since is not None:
        where("occurred_at >= :since", since=since)
    if until is not None:
        where("occurred_at < :until", until=until)
    if after is not None:
        where("sequence < :after", after=after.sequence if isinstance(after, AuditEvent) else after)
    filters = f"WHERE {' AND '.join(conditions)} " if conditions else ""
    query = f"SELECT {_COLUMNS} FROM tenancy.audit_log {filters}ORDER BY occurred_at DESC, sequence DESC LIMIT :limit"  # noqa: S608 - every part is a constant above, every value a parameter
    return query, parameters


def _event(row: Any) -> AuditEvent:
    return AuditEvent(
        sequence=row.sequence,
        occurred_at=row.occurred_at,
        action=row.action,
        tenant_id=row.tenant_id,
        slug=row.slug,
        actor=Actor(row.actor_kind, row.actor_id, row.request_id, row.source),
        before=row.before,
        after=row.after,
        detail=row.detail,
        database_role=row.database_role,
        hash=row.hash,
    )


def _plain(value: Any) -> Any:
    """Return ``value`` with text that jsonb can keep, and without types that JSON does not have."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    # bytes above all: what is not text is likely a secret
    raise TypeError(f"the audit log keeps JSON values, not {type(value).__name__}")


def _encode(value: Mapping[str, Any] | None) -> str | None:
    if value is None:
        return None
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)
