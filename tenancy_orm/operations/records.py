"""``Operations``: the records of restores, clones, adoptions, moves, exports and erasures (``tenancy.operations``).

An operation names each step before it begins. A process claims it and renews the claim while it works; once a claim has
run out, another process may take the operation over, and looks at the step and at what exists.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from ..audit.actor import SYSTEM, Actor
from ..context import refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import JobLostError, OperationConflictError, OperationNotFoundError, OperationStateError
from ..jobs.claims import CLAIM_SECONDS, Claimant, keep_claims
from ..postgres.errors import constraint_of

OperationKind = Literal["restore", "clone", "adopt", "move", "export", "erasure"]
OperationState = Literal["running", "waiting", "done", "failed", "undone"]

_LONGEST_ERROR = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An operation on one tenant, as its row says.

    Attributes:
        id: Its number.
        kind: What is done.
        tenant_id: The tenant.
        slug: The tenant's slug, as it is now.
        state: "running", "waiting" for an operator's decision, "done", "failed" or "undone".
        step: The step that was begun last.
        detail: What the steps need and have found. It has no secrets.
        actor: Who has begun it.
        host: Where the process is that does it, or did.
        pid: That process's id.
        is_claimed: Whether a process does it now.
        error: Why it failed.
        created_at: When it was begun.
        ended_at: When it ended.
    """

    id: int
    kind: OperationKind
    tenant_id: UUID
    slug: str
    state: OperationState
    step: str
    detail: Mapping[str, Any]
    actor: Actor
    host: str | None
    pid: int | None
    is_claimed: bool
    error: str | None
    created_at: datetime
    ended_at: datetime | None

    @property
    def is_abandoned(self) -> bool:
        """Whether it is under way and no process does it: another one may take it over."""
        return self.state == "running" and not self.is_claimed


_SELECT = """
SELECT o.*, t.slug, o.claim IS NOT NULL AND o.claimed_until > clock_timestamp() AS is_claimed
  FROM tenancy.operations o JOIN tenancy.tenants t ON t.id = o.tenant_id
"""
_GET = text(_SELECT + " WHERE o.id = :id")
_LIST = text(
    _SELECT + " WHERE (CAST(:tenant AS uuid) IS NULL OR o.tenant_id = CAST(:tenant AS uuid)) "
    "AND (CAST(:kinds AS text[]) IS NULL OR o.kind = ANY(CAST(:kinds AS text[]))) "
    "AND (CAST(:states AS text[]) IS NULL OR o.state = ANY(CAST(:states AS text[]))) "
    "AND (CAST(:before AS bigint) IS NULL OR o.id < CAST(:before AS bigint)) ORDER BY o.id DESC LIMIT :limit"
)
# of two that begin at once, the one with the lower number is seen by the other
_IN_ORDER = text("SELECT pg_advisory_xact_lock(hashtextextended('tenancy.operations:' || CAST(:tenant AS text), 0))")
_BEGIN = text(
    "INSERT INTO tenancy.operations "
    "(kind, tenant_id, step, detail, actor_kind, actor_id, claim, host, pid, claimed_until) "
    "VALUES (:kind, :tenant, :step, CAST(:detail AS jsonb), :actor_kind, :actor_id, :claim, :host, :pid, "
    "clock_timestamp() + make_interval(secs => :seconds)) RETURNING id"
)
# repeated, or by two processes at once: one row
_RECORD_AGAIN = text(
    "INSERT INTO tenancy.operations (kind, tenant_id, state, step, detail, actor_kind, actor_id, ended_at) "
    "SELECT CAST(:kind AS text), CAST(:tenant AS uuid), 'done', CAST(:step AS text), CAST(:detail AS jsonb), "
    "CAST(:actor_kind AS text), CAST(:actor_id AS text), clock_timestamp() WHERE NOT EXISTS "
    "(SELECT FROM tenancy.operations WHERE tenant_id = CAST(:tenant AS uuid) AND kind = CAST(:kind AS text))"
)
_CLAIM = text(
    "UPDATE tenancy.operations SET claim = :claim, host = :host, pid = :pid, state = 'running', "
    "claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = :id AND state IN ('running', 'waiting') "
    "AND (claimed_until IS NULL OR claimed_until <= clock_timestamp())"
)
_RENEW = text(
    "UPDATE tenancy.operations SET claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE id = :id AND claim = :claim"
)
_ADVANCE = text(
    "UPDATE tenancy.operations SET step = :step, detail = detail || CAST(:detail AS jsonb) "
    "WHERE id = :id AND claim = :claim"
)
_FINISH = text(
    "UPDATE tenancy.operations SET state = CAST(:state AS text), error = :error, claim = NULL, claimed_until = NULL, "
    "detail = detail || CAST(:detail AS jsonb), "
    "ended_at = CASE WHEN CAST(:state AS text) IN ('done', 'failed', 'undone') THEN clock_timestamp() END "
    "WHERE id = :id AND claim = :claim"
)


class Operations:
    """Begins, claims and ends operations.

    Args:
        control: The open control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def begin(
        self,
        kind: OperationKind,
        tenant_id: UUID,
        *,
        step: str,
        claimant: Claimant,
        detail: Mapping[str, Any] | None = None,
        actor: Actor = SYSTEM,
    ) -> Operation:
        """Record an operation before it starts, claimed by this process.

        Raises:
            OperationConflictError: another operation moves the tenant's data now, or waits for a decision.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        values = {
            "kind": kind,
            "tenant": tenant_id,
            "step": step,
            "detail": _json(detail),
            "actor_kind": actor.kind,
            "actor_id": actor.id,
            **_claim(claimant),
        }
        try:
            async with self._control.transaction() as connection:
                await connection.execute(_IN_ORDER, {"tenant": str(tenant_id)})
                number = int((await connection.execute(_BEGIN, values)).scalar_one())
        except IntegrityError as exc:
            if constraint_of(exc) != "operations_unfinished_key":
                raise
            other = await self._unfinished(tenant_id)
            raise OperationConflictError(other.slug, other.kind, other.id, other.state) from exc
        return await self.get(number)

    async def record_again(
        self,
        kind: OperationKind,
        tenant_id: UUID,
        *,
        step: str,
        detail: Mapping[str, Any],
        actor: Actor = SYSTEM,
    ) -> None:
        """Record an operation that was done, and that a lost control database knew; repeating it changes nothing.

        Raises:
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant_id)
        values = {
            "kind": kind,
            "tenant": str(tenant_id),
            "step": step,
            "detail": _json(detail),
            "actor_kind": actor.kind,
            "actor_id": actor.id,
        }
        async with self._control.transaction() as connection:
            await connection.execute(_IN_ORDER, {"tenant": str(tenant_id)})
            await connection.execute(_RECORD_AGAIN, values)

    async def _unfinished(self, tenant_id: UUID) -> Operation:
        found = await self.list(
            tenant_id=tenant_id, states=("running", "waiting"), kinds=("restore", "adopt", "move"), limit=1
        )
        if not found:  # it has ended since
            raise OperationStateError("another operation has just ended; try again")
        return found[0]

    async def get(self, number: int) -> Operation:
        """Return an operation.

        Raises:
            OperationNotFoundError: there is none of this number.
        """
        async with self._control.connect() as connection:
            row = (await connection.execute(_GET, {"id": number})).one_or_none()
        if row is None:
            raise OperationNotFoundError(number)
        refuse_other_tenant(row.tenant_id)
        return _operation(row)

    async def list(
        self,
        *,
        tenant_id: UUID | None = None,
        kinds: Iterable[OperationKind] | None = None,
        states: Iterable[OperationState] | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[Operation, ...]:
        """Return operations, the newest first."""
        if tenant_id is None:
            refuse_while_bound("listing operations")
        else:
            refuse_other_tenant(tenant_id)
        values = {
            "tenant": tenant_id,
            "kinds": None if kinds is None else list(kinds),
            "states": None if states is None else list(states),
            "limit": limit,
            "before": before,
        }
        async with self._control.connect() as connection:
            return tuple(_operation(row) for row in await connection.execute(_LIST, values))

    async def claim(self, number: int, claimant: Claimant) -> Operation:
        """Take over an operation that waits, or that no process does any more.

        Raises:
            OperationNotFoundError: there is none of this number.
            OperationStateError: it has ended, or a process does it now.
        """
        operation = await self.get(number)
        async with self._control.transaction() as connection:
            claimed = (await connection.execute(_CLAIM, {"id": number, **_claim(claimant)})).rowcount
        if not claimed:
            found = await self.get(number)
            doing = f"a process on {found.host} does it now" if found.is_claimed else f"it is {found.state}"
            raise OperationStateError(f"operation {number} ({operation.kind} of {found.slug!r}): {doing}")
        return await self.get(number)

    @asynccontextmanager
    async def keep(self, operation: Operation, claimant: Claimant) -> AsyncIterator[None]:
        """Renew the claim while the body runs, and cancel the body before another process may take over.

        Raises:
            JobLostError: the claim could not be renewed in time.
        """

        async def renew() -> bool:
            return await self._write(_RENEW, operation, claimant, seconds=CLAIM_SECONDS)

        async with keep_claims(renew):
            yield

    async def advance(
        self, operation: Operation, claimant: Claimant, step: str, *, detail: Mapping[str, Any] | None = None
    ) -> Operation:
        """Record the step that begins next, and add to the details.

        Raises:
            JobLostError: another process has the operation by now.
        """
        if not await self._write(_ADVANCE, operation, claimant, step=step, detail=_json(detail)):
            raise JobLostError
        return await self.get(operation.id)

    async def finish(
        self,
        operation: Operation,
        claimant: Claimant,
        state: Literal["waiting", "done", "failed", "undone"],
        *,
        error: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Record the end of an operation, or that it waits for a decision.

        Raises:
            JobLostError: another process has the operation by now.
        """
        error = None if error is None else error[:_LONGEST_ERROR].replace("\x00", "")
        if not await self._write(_FINISH, operation, claimant, state=state, error=error, detail=_json(detail)):
            raise JobLostError

    async def _write(self, statement: Any, operation: Operation, claimant: Claimant, **values: Any) -> bool:
        refuse_other_tenant(operation.tenant_id)
        async with self._control.transaction() as connection:
            given = {"id": operation.id, "claim": claimant.id, **values}
            return bool((await connection.execute(statement, given)).rowcount)


def _claim(claimant: Claimant) -> dict[str, Any]:
    return {"claim": claimant.id, "host": claimant.host, "pid": claimant.pid, "seconds": CLAIM_SECONDS}


def _json(detail: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(detail or {}), allow_nan=False, default=str)


def _operation(row: Any) -> Operation:
    names = ("id", "kind", "tenant_id", "slug", "state", "step", "detail", "host", "pid", "is_claimed", "error")
    return Operation(
        **{name: getattr(row, name) for name in names},
        actor=Actor(row.actor_kind, row.actor_id),
        created_at=row.created_at,
        ended_at=row.ended_at,
    )


__all__ = ["Operation", "OperationKind", "OperationState", "Operations"]
