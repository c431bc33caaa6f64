"""``RunClaims``: what one process writes in the control database while it takes part in a run.

Everything that claims locks the run's row first, so that what all processes hold is counted by one of them at a time. A
process renews one claim for all its tenants. What it writes about a tenant names that claim: once others have released
it, nothing that it says counts any more.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.entries import insert_entry
from ..control.database import ControlDatabase
from ..control.models import migration_run_tenants, tenants
from ..control.notifications import CHANNEL, SCHEMA_CHANGED
from ..errors import JobLostError
from ..jobs import CLAIM_SECONDS, Claimant
from ..migrations.plan import Heads
from ..registry.revisions import RECORD_FINISHED
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..tenant import Tenant
from .beginnings import Beginning, Beginnings
from .records import RELEASE_LOST, RunState, lock_run, set_state
from .reversal import heads_of
from .starts import LIVE

GIVEN_UP = 3
"""A tenant that has lost its process or its server so often is not tried again: its migration may be what ends them."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A tenant that this process migrates next, as its row is now.

    ``target`` is the revision that it is brought to, where each tenant has its own. ``origin`` are the heads that it
    had before the run first began to change it, or from which its way was planned; None where that is not known.
    """

    tenant: Tenant
    target: str | None
    server: str
    losses: int
    origin: Heads | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a tenant's migration, or of the claim of one that was not begun.

    ``state`` is "done", "failed" or "skipped", and "waiting" for one that others may claim; that is skipped where the
    run has ended. Where ``has_read`` is not set, its revision was not read. Where ``is_granted`` is not set, the rights
    on what was committed are not: the registry keeps the former revision, so that whoever comes next sees to it.
    ``is_lost`` is whether its server was lost.
    """

    tenant_id: UUID
    state: str
    before: str | None = None
    after: str | None = None
    has_read: bool = False
    is_announced: bool = False
    is_granted: bool = True
    changed: bool = False
    seconds: float | None = None
    sqlstate: str | None = None
    error: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    counts: bool = True
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a process learns when it has written what it knows, and claimed more.

    ``has_gate`` is whether it is this process that opens the next wave or ends the run. ``pending`` is how many tenants
    up to this wave wait or are being migrated, where that was counted. ``unreached`` are the servers that no process
    reaches which takes part.
    """

    state: RunState
    wave: int
    reason: str | None
    claimed: tuple[Claimed, ...] = ()
    slots: Mapping[str, int] = field(default_factory=dict)
    has_gate: bool = False
    pending: int | None = None
    lost: frozenset[UUID] = frozenset()
    unreached: frozenset[str] = frozenset()


UNREACHED: Final = -1
"""What stands for a process's slots of a server that it does not reach."""

_LIVE_OTHERS = text(
    "SELECT p.id, p.slots, p.claimed_until < clock_timestamp() AS is_expired FROM tenancy.migration_run_processes p "
    "WHERE p.run = :run AND p.left_at IS NULL"
)
_SERVERS = text("SELECT DISTINCT server FROM tenancy.migration_run_tenants WHERE run = :run ORDER BY 1")
_RENEW = text(
    "UPDATE tenancy.migration_run_processes SET claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE run = :run AND id = :me AND left_at IS NULL RETURNING id"
)
_MARK_STARTED = text(
    "UPDATE tenancy.migration_run_tenants SET state = 'running', started_at = clock_timestamp() "
    # in the order in which beginnings are written
    "WHERE run = :run AND tenant_id IN (SELECT tenant_id FROM tenancy.migration_run_tenants WHERE run = :run "
    "AND tenant_id = ANY(CAST(:ids AS uuid[])) AND claim = :me AND state = 'waiting' "
    "ORDER BY tenant_id FOR NO KEY UPDATE)"
)
# The registry's revision with the outcome, and the notification that every process waits for: all or nothing.
_FINISH = text(
    "WITH given AS (SELECT * FROM jsonb_to_recordset(CAST(:finished AS jsonb)) AS g (tenant_id uuid, state text, "  # noqa: S608 - a constant
    "before text, after text, has_read boolean, is_announced boolean, is_granted boolean, changed boolean, "
    "seconds double precision, sqlstate text, error text, detail jsonb, counts boolean, is_lost boolean)), "
    "finished AS (UPDATE tenancy.migration_run_tenants t SET state = g.state, claim = NULL, "
    "attempts = t.attempts - (NOT g.counts)::integer, losses = t.losses + g.is_lost::integer, "
    "started_at = coalesce(t.started_at, clock_timestamp() - make_interval(secs => g.seconds)), "
    "ended_at = CASE WHEN g.state IN ('done', 'failed') THEN clock_timestamp() END, seconds = g.seconds, "
    "revision_before = CASE WHEN t.is_read OR NOT g.has_read THEN t.revision_before ELSE g.before END, "
    "revision_after = CASE WHEN g.has_read THEN g.after ELSE t.revision_after END, "
    "changed = t.changed OR g.changed OR (t.is_read AND g.has_read AND t.revision_before IS DISTINCT FROM g.after), "
    "sqlstate = g.sqlstate, error = g.error, detail = t.detail || g.detail "
    "FROM given g WHERE t.run = :run AND t.tenant_id = g.tenant_id AND t.claim = :me "
    "RETURNING t.tenant_id, g.after, g.has_read AND g.is_granted AS has_read, g.is_announced), " + RECORD_FINISHED + " "
    "SELECT f.tenant_id, CASE WHEN f.is_announced OR EXISTS (SELECT FROM recorded r WHERE r.id = f.tenant_id) THEN "
    "pg_notify(:channel, json_build_object('t', f.tenant_id, 'k', NULL, 'c', CAST(:kind AS text))::text) END "
    "FROM finished f"
)
_CLAIM = text(
    "WITH mine AS (UPDATE tenancy.migration_run_processes SET slots = CAST(:slots AS jsonb), "
    "claimed_until = clock_timestamp() + make_interval(secs => :seconds) WHERE run = :run AND id = :me), "
    "chosen AS (SELECT c.tenant_id FROM unnest(CAST(:servers AS text[]), CAST(:limits AS integer[])) AS s (name, n) "
    "CROSS JOIN LATERAL (SELECT t.tenant_id FROM tenancy.migration_run_tenants t WHERE t.run = :run "
    "AND t.state = 'waiting' AND t.claim IS NULL AND t.server = s.name AND t.wave <= :wave "
    "ORDER BY t.wave, t.position LIMIT s.n FOR UPDATE SKIP LOCKED) c) "
    "UPDATE tenancy.migration_run_tenants t SET claim = :me, host = :host, attempts = t.attempts + 1 FROM chosen c "
    "WHERE t.run = :run AND t.tenant_id = c.tenant_id RETURNING t.tenant_id, t.position, t.target, t.server, t.losses, "
    "CASE WHEN t.is_read THEN coalesce(t.revision_before, 'base') ELSE t.detail ->> 'origin' END AS origin"
)
# claimed by a transaction, and this process did not learn how it ended
_FORGET_UNKNOWN = text(
    "UPDATE tenancy.migration_run_tenants SET claim = NULL, attempts = attempts - 1 "
    "WHERE run = :run AND claim = :me AND state = 'waiting' AND NOT tenant_id = ANY(CAST(:known AS uuid[]))"
)
_PENDING = text(
    "SELECT count(*) FROM tenancy.migration_run_tenants WHERE run = :run AND wave <= :wave "
    "AND state IN ('waiting', 'running')"
)
_TAKE_GATE = text(
    "UPDATE tenancy.migration_runs r SET gate = :me WHERE r.id = :run AND (r.gate IS NULL OR r.gate = :me "  # noqa: S608 - a constant
    "OR NOT EXISTS (SELECT FROM tenancy.migration_run_processes p "
    f"WHERE p.run = r.id AND p.id = r.gate AND {LIVE})) RETURNING r.id"
)
_OPEN_WAVE = text(
    "UPDATE tenancy.migration_runs SET wave = :wave, gate = NULL "
    "WHERE id = :run AND gate = :me AND state = 'running' RETURNING id"
)
_SKIP_REST = text(
    "UPDATE tenancy.migration_run_tenants SET state = 'skipped' WHERE run = :run AND state = 'waiting' "
    "AND (claim IS NULL OR claim = :me)"
)
_OUTCOMES = text(
    "SELECT count(*) FILTER (WHERE state = 'failed') AS failed, "
    "count(*) FILTER (WHERE state = 'skipped' AND NOT detail ? 'gone') AS skipped, count(*) AS total "
    "FROM tenancy.migration_run_tenants WHERE run = :run"
)
_PAUSE_BEFORE = text(
    "UPDATE tenancy.migration_runs SET wave = :wave WHERE id = :run AND gate = :me AND state = 'running' RETURNING id"
)
_FAILED = text("SELECT count(*) FROM tenancy.migration_run_tenants WHERE run = :run AND state = 'failed'")
_LEAVE = text(
    "UPDATE tenancy.migration_run_processes SET left_at = clock_timestamp() WHERE run = :run AND id = :me "
    "AND left_at IS NULL"
)
_RELEASE = text(
    "UPDATE tenancy.migration_run_tenants SET claim = NULL, state = 'waiting', "
    "attempts = attempts - (state = 'waiting')::integer WHERE run = :run AND claim = :me "
    "AND state IN ('waiting', 'running')"
)
_ADD_MISSING = text(
    "INSERT INTO tenancy.migration_run_tenants (run, tenant_id, server, wave, position) "
    "SELECT :run, n.id, n.server, CAST(:wave AS integer), (SELECT max(position) FROM tenancy.migration_run_tenants "
    "WHERE run = :run) + row_number() OVER (ORDER BY n.id) FROM tenancy.tenants n "
    "WHERE n.status NOT IN ('provisioning', 'purged') AND n.purge_started_at IS NULL "
    "AND n.sealed_password IS NOT NULL AND NOT EXISTS "
    "(SELECT FROM tenancy.migration_run_tenants t WHERE t.run = :run AND t.tenant_id = n.id) RETURNING tenant_id"
)
_NOTE = text(
    "UPDATE tenancy.migration_run_tenants SET detail = detail || CAST(:detail AS jsonb) "
    "WHERE run = :run AND tenant_id = :tenant AND claim = :me"
)


class RunClaims:
    """One process's part in a run, in the control database.

    Args:
        control: The control database.
        run: The run's number.
        claimant: The process.
        held: Whether it brings tenants to a revision that they are not upgraded from by themselves.
    """

    def __init__(self, control: ControlDatabase, run: int, claimant: Claimant, *, held: bool) -> None:
        self._control = control
        self._held = held
        self.run = run
        self.claimant = claimant
        self._names: dict[str, Any] = {"run": run, "me": claimant.id}
        self._beginnings = Beginnings(control, run, claimant)

    async def servers(self) -> list[str]:
        """Return the servers that have tenants of the run."""
        async with self._control.connect() as connection:
            return list(await connection.scalars(_SERVERS, {"run": self.run}))

    async def tenants(self) -> list[Tenant]:
        """Return the tenants of the run, in the order in which they are migrated."""
        query = (
            select(*TENANT_COLUMNS)
            .join(migration_run_tenants, migration_run_tenants.c.tenant_id == tenants.c.id)
            .where(migration_run_tenants.c.run == self.run)
            .order_by(migration_run_tenants.c.wave, migration_run_tenants.c.position)
        )
        async with self._control.connect() as connection:
            return [tenant_from_row(row) for row in await connection.execute(query)]

    async def renew(self) -> bool:
        """Renew this process's claim; False if others have released it."""
        async with self._control.connect() as connection:
            values = {**self._names, "seconds": CLAIM_SECONDS}
            return await connection.scalar(_RENEW, values) is not None

    async def begin(
        self, tenant_id: UUID, before: str | None, *, target: str | None, seconds: float, again: bool = False
    ) -> None:
        """Record the revision that a tenant has before it is changed, and announce the change to every process.

        Args:
            tenant_id: The tenant.
            before: The revision that it has now.
            target: The revision that it is brought to.
            seconds: How long that can take at most.
            again: Whether this process has begun to change it already, and finishes that whatever the run's state is.

        Raises:
            JobLostError: another process may migrate it by now, or the run goes on no more.
            ControlUnavailableError: the control database does not answer.
        """
        await self._beginnings.record(Beginning(tenant_id, before, target, seconds, again))

    async def note(self, tenant_id: UUID, detail: Mapping[str, Any]) -> None:
        """Add ``detail`` to a tenant's record, unless others have it by now.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.connect() as connection:
            await connection.execute(_NOTE, {**self._names, "tenant": tenant_id, "detail": json.dumps(detail)})

    async def turn(
        self,
        finished: Sequence[Finished] = (),
        started: Sequence[UUID] = (),
        *,
        wanted: Mapping[str, int],
        holding: Mapping[str, int],
        concurrency: int,
        per_server: int,
        stop_on_failure: bool = False,
        max_failures: int | None = None,
        count: bool = False,
        known: Sequence[UUID] | None = None,
        unreached: Collection[str] = (),
    ) -> Turn:
        """Write what has ended and begun, renew the claim, and claim further tenants: one transaction.

        Args:
            finished: The tenants that have been migrated, or have failed.
            started: Those that are being migrated, and were not announced yet.
            wanted: How many tenants to claim of each server, at most.
            holding: How many tenants of each server this process may migrate at once until it has the answer.
            concurrency: How many this process migrates at once.
            per_server: How many all processes migrate at once on one server.
            stop_on_failure: End the run where one of ``finished`` has failed.
            max_failures: End the run where so many of its tenants have failed, one of ``finished`` among them.
            count: Count what is pending if nothing can be claimed, and take the gate where nothing is.
            known: All that this process has claimed, where it did not learn how its last turn ended.
            unreached: The servers that this process does not reach: their tenants are left to others, if any of these
                may reach them.

        Raises:
            JobLostError: others have released this process's claim; nothing was written.
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.transaction() as connection:
            run = await lock_run(connection, self.run)
            others = await self._others(connection)
            lost: frozenset[UUID] = frozenset()
            if finished:
                lost = await self._finish(connection, finished, run.state)
            if known is not None:
                await connection.execute(_FORGET_UNKNOWN, {**self._names, "known": list(known)})
            if started:
                await connection.execute(_MARK_STARTED, {**self._names, "ids": list(started)})
            state: RunState = run.state
            reason: str | None = run.reason
            stop = None
            if state == "running" and any(one.state == "failed" for one in finished):
                stop = await self._reason_to_stop(connection, stop_on_failure, max_failures)
            if stop is not None:
                state, reason = "failed", stop
                await connection.execute(_SKIP_REST, self._names)
                await set_state(connection, self.run, state, reason)
            slots = _share(wanted, others, concurrency, per_server)
            going = state == "running" and run.wave >= 0
            held = {server: max(number, holding.get(server, 0)) for server, number in slots.items()}
            held |= dict.fromkeys(unreached, UNREACHED)
            of_nobody = frozenset(s for s in unreached if all(one.get(s) == UNREACHED for one in others))
            mine = {s: number for s, number in wanted.items() if s not in unreached or s in of_nobody}
            claimed = await self._claim(connection, held, slots, mine if going else {}, run.wave)
            pending, has_gate = None, False
            if count and not claimed and state == "running":
                pending = int(await connection.scalar(_PENDING, {"run": self.run, "wave": run.wave}) or 0)
                if not pending:
                    has_gate = await connection.scalar(_TAKE_GATE, self._names) is not None
        return Turn(
            state=state,
            wave=run.wave,
            reason=reason,
            claimed=claimed,
            slots=slots,
            has_gate=has_gate,
            pending=pending,
            lost=lost,
            unreached=of_nobody,
        )

    async def _reason_to_stop(
        self, connection: AsyncConnection, stop_on_failure: bool, max_failures: int | None
    ) -> str | None:
        if stop_on_failure:
            return "stopped at the first failure"
        if max_failures is None:
            return None
        failed = int(await connection.scalar(_FAILED, {"run": self.run}) or 0)
        # those that are under way may fail as well
        return f"stopped after {max_failures} failures" if failed >= max_failures else None

    async def _others(self, connection: AsyncConnection) -> list[Mapping[str, int]]:
        """Return what the other processes hold, once the claims of lost ones are released."""
        rows = (await connection.execute(_LIVE_OTHERS, {"run": self.run})).all()
        mine = self.claimant.id
        if mine not in {row.id for row in rows}:
            raise JobLostError
        if any(row.is_expired and row.id != mine for row in rows):
            # its own is good for as long as nobody has released it
            await connection.execute(_RENEW, {**self._names, "seconds": CLAIM_SECONDS})
            await connection.execute(RELEASE_LOST, {"run": self.run})
        return [row.slots for row in rows if row.id != mine and not row.is_expired]

    async def _finish(
        self, connection: AsyncConnection, finished: Sequence[Finished], state: RunState
    ) -> frozenset[UUID]:
        # by the state under the lock: an operator may have let a cancelled run go on since this process has seen it
        waits = "skipped" if state in ("failed", "cancelled") else "waiting"
        given = [
            {**asdict(one), "tenant_id": str(one.tenant_id), "state": waits if one.state == "waiting" else one.state}
            for one in finished
        ]
        values = {"finished": json.dumps(given), "channel": CHANNEL, "kind": SCHEMA_CHANGED, "held": self._held}
        written = await connection.scalars(_FINISH, {**self._names, **values})
        return frozenset(one.tenant_id for one in finished) - frozenset(written)

    async def _claim(
        self,
        connection: AsyncConnection,
        held: Mapping[str, int],
        slots: Mapping[str, int],
        wanted: Mapping[str, int],
        wave: int,
    ) -> tuple[Claimed, ...]:
        limits = {server: number for server, number in wanted.items() if number > 0 and slots.get(server)}
        values = {
            "slots": json.dumps(dict(held)),
            "seconds": CLAIM_SECONDS,
            "servers": list(limits),
            "limits": list(limits.values()),
            "wave": wave,
            "host": self.claimant.host,
        }
        rows = (await connection.execute(_CLAIM, {**self._names, **values})).all()
        if not rows:
            return ()
        found = {row.tenant_id: row for row in rows}
        query = select(*TENANT_COLUMNS).where(tenants.c.id.in_(bindparam("ids", expanding=True)))
        current = {row.id: tenant_from_row(row) for row in await connection.execute(query, {"ids": list(found)})}
        return tuple(
            Claimed(
                current[row.tenant_id],
                row.target,
                row.server,
                row.losses,
                None if row.origin is None else heads_of(row.origin),
            )
            for row in sorted(rows, key=lambda row: row.position)
        )

    async def open_wave(self, wave: int) -> bool:
        """Let the processes claim the tenants of ``wave``; False if this process does not have the gate any more."""
        async with self._control.connect() as connection:
            return await connection.scalar(_OPEN_WAVE, {**self._names, "wave": wave}) is not None

    async def pause_before(self, wave: int, reason: str, *, actor: Actor = SYSTEM) -> RunState | None:
        """Pause the run between two waves; ``wave`` begins when it is resumed.

        Returns the state; None if this process does not have the gate any more.
        """
        async with self._control.transaction() as connection:
            await lock_run(connection, self.run)
            if await connection.scalar(_PAUSE_BEFORE, {**self._names, "wave": wave}) is None:
                return None
            await set_state(connection, self.run, "paused", reason)
            detail = {"run": self.run, "state": "paused", "reason": reason}
            await insert_entry(connection, action="migration.pause", actor=actor, detail=detail)
        return "paused"

    async def add_missing(self, wave: int) -> int:
        """Add the tenants that were created since the run was started; return how many."""
        async with self._control.transaction() as connection:
            await lock_run(connection, self.run)
            return len((await connection.execute(_ADD_MISSING, {"run": self.run, "wave": wave})).all())

    async def is_complete(self) -> bool:
        """Whether every tenant is done that has not been purged since."""
        async with self._control.connect() as connection:
            counts = (await connection.execute(_OUTCOMES, {"run": self.run})).one()
        return not counts.failed and not counts.skipped

    async def end(
        self, state: RunState | None = None, reason: str | None = None, *, actor: Actor = SYSTEM
    ) -> RunState | None:
        """End the run, or pause it; without a state it is "done" where all tenants are, and "failed" otherwise.

        Returns the state; None if this process does not have the gate any more.
        """
        async with self._control.transaction() as connection:
            run = await lock_run(connection, self.run)
            if run.gate != self.claimant.id or run.state != "running":
                return None
            if state in ("failed", "cancelled"):
                await connection.execute(_SKIP_REST, self._names)
            counts = (await connection.execute(_OUTCOMES, {"run": self.run})).one()
            if state is None:
                state = "failed" if counts.failed or counts.skipped else "done"
                if counts.failed:
                    reason = f"{counts.failed} of {counts.total} tenants failed"
            await set_state(connection, self.run, state, reason)
            detail = {"run": self.run, "state": state, "failed": counts.failed, "tenants": counts.total}
            action = "migration.pause" if state == "paused" else "migration.end"
            await insert_entry(connection, action=action, actor=actor, detail=detail)
        return state

    async def leave(self, finished: Sequence[Finished] = ()) -> None:
        """Write what has ended, and give back everything else that this process has claimed."""
        await self._beginnings.wait_until_written()
        async with self._control.transaction() as connection:
            run = await lock_run(connection, self.run)
            if finished:
                await self._finish(connection, finished, run.state)
            await connection.execute(_RELEASE, self._names)
            if run.state in ("failed", "cancelled"):
                await connection.execute(_SKIP_REST, self._names)
            await connection.execute(_LEAVE, self._names)


def _share(
    servers: Iterable[str], others: Sequence[Mapping[str, int]], concurrency: int, per_server: int
) -> dict[str, int]:
    """Return how many tenants of each server this process may migrate at once.

    That is an equal part of what a server takes. Whoever holds more gives it back as its tenants are done; until then
    who has come later has less.
    """
    slots = {}
    for server in servers:
        reaching = [number for held in others if (number := held.get(server, 0)) != UNREACHED]
        part = -(-per_server // (len(reaching) + 1))
        slots[server] = min(concurrency, part, max(0, per_server - sum(reaching)))
    return slots
