"""``RunRecords``: the rows of runs in the control database, as operators read and change them."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor, clean_text
from ..audit.entries import insert_entry
from ..control.database import ControlDatabase
from ..errors import RunConflictError, RunNotFoundError, RunStateError, counted
from ..jobs import CLAIM_SECONDS, Claimant
from .holds import hold_unreached
from .starts import LIVE, contradicting, find_to_join, lock_starts

RunState = Literal["running", "paused", "done", "failed", "cancelled"]
TenantRunState = Literal["waiting", "running", "done", "failed", "skipped"]

TENANT_STATES: Final[tuple[TenantRunState, ...]] = ("waiting", "running", "done", "failed", "skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run: who started it, what it does, and how far it is.

    ``wave`` is the wave that runs now, from 0; -1 while the run is prepared. ``tenants`` has the number of tenants in
    each state, ``processes`` how many take part now. ``gate`` is the process that
    opens the next wave, if one does now.
    """

    id: int
    command: str
    target: str
    undoes: int | None
    actor: Actor
    host: str
    package_version: str
    code_version: str | None
    fingerprint: str
    plan: Mapping[str, Any] = field(repr=False)
    state: RunState
    wave: int
    reason: str | None
    created_at: datetime
    ended_at: datetime | None
    tenants: Mapping[str, int]
    processes: int
    gate: UUID | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether it is to go on, and no process takes part any more."""
        return self.state == "running" and not self.processes


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRecord:
    """A tenant in a run.

    ``attempts`` is how often its migration was begun, ``losses`` how often that ended with its process, or with its
    server. Where ``is_read`` is set the run has begun to change it, and ``revision_before`` is from just before that.
    ``target`` is the revision that it is brought to, where each tenant has its own.
    """

    run: int
    tenant_id: UUID
    slug: str
    server: str
    wave: int
    position: int
    state: TenantRunState
    target: str | None
    host: str | None
    attempts: int
    losses: int
    revision_before: str | None
    is_read: bool
    revision_after: str | None
    changed: bool
    started_at: datetime | None
    ended_at: datetime | None
    seconds: float | None
    sqlstate: str | None
    error: str | None
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """A process that takes part in a run, or did.

    ``slots``: how many tenants at once it may migrate, by server; -1 where it does not reach the server. ``is_alive``:
    it takes part, and its claim has not run out.
    """

    id: UUID
    host: str
    pid: int
    slots: Mapping[str, int]
    joined_at: datetime
    left_at: datetime | None
    is_lost: bool
    is_alive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What is recorded of a run before it starts. ``seal`` returns what its plan gets as ``seal``, by its number."""

    command: str
    target: str
    plan: Mapping[str, Any]
    fingerprint: str
    actor: Actor = SYSTEM
    code_version: str | None = None
    undoes: int | None = None
    seal: Callable[[int], str | None] | None = field(default=None, repr=False)


class Way(NamedTuple):
    """The revision that a tenant of an undo is to leave, and the one that it is brought to; ``base`` for none."""

    origin: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTenant:
    """A tenant that a run is for.

    Where each has a ``target`` of its own, ``origin`` is the revision from which the way there was planned: no tenant
    that is elsewhere is brought there.
    """

    tenant_id: UUID
    server: str
    wave: int = 0
    target: str | None = None
    origin: str | None = None


_MOVES: Final = ("upgrade", "downgrade", "undo")  # commands that do not go past a run that is paused

# --- statements -------------------------------------------------------------------------------------------------------

_RUNS = f"""
SELECT r.*, coalesce(c.tenants, '{{}}') AS tenants, (
    SELECT count(*) FROM tenancy.migration_run_processes p WHERE p.run = r.id AND {LIVE}
) AS processes
FROM tenancy.migration_runs r
LEFT JOIN LATERAL (
    SELECT jsonb_object_agg(s.state, s.number) AS tenants FROM (
        SELECT t.state, count(*) AS number FROM tenancy.migration_run_tenants t WHERE t.run = r.id GROUP BY t.state
    ) s
) c ON true
"""  # noqa: S608 - a constant
_RUN = text(_RUNS + " WHERE r.id = :run")
_LATEST = text(
    _RUNS + " WHERE (CAST(:before AS bigint) IS NULL OR r.id < CAST(:before AS bigint))"
    " AND (CAST(:state AS text) IS NULL OR r.state = CAST(:state AS text)) ORDER BY r.id DESC LIMIT :limit"
)
_TENANTS = text(
    "SELECT t.*, n.slug FROM tenancy.migration_run_tenants t JOIN tenancy.tenants n ON n.id = t.tenant_id "
    "WHERE t.run = :run AND (CAST(:after AS uuid) IS NULL OR t.tenant_id > CAST(:after AS uuid)) "
    "AND (CAST(:states AS text[]) IS NULL OR t.state = ANY(CAST(:states AS text[]))) "
    "ORDER BY t.tenant_id LIMIT CAST(:limit AS bigint)"
)
_PROCESSES = text(
    f"SELECT p.*, {LIVE} AS is_alive FROM tenancy.migration_run_processes p WHERE p.run = :run ORDER BY joined_at, id"  # noqa: S608 - a constant
)
_INSERT = text(
    "INSERT INTO tenancy.migration_runs "
    "(command, target, undoes, actor_kind, actor_id, host, package_version, code_version, fingerprint, plan, gate) "
    "VALUES (:command, :target, :undoes, :actor_kind, :actor_id, :host, :package_version, :code_version, "
    ":fingerprint, CAST(:plan AS jsonb), :gate) RETURNING id"
)
_SEAL = text(
    "UPDATE tenancy.migration_runs SET plan = plan || jsonb_build_object('seal', CAST(:seal AS text)) WHERE id = :run"
)
_ADD_TENANTS = text(
    "INSERT INTO tenancy.migration_run_tenants (run, tenant_id, server, wave, target, position, detail) "
    "SELECT :run, g.tenant_id, g.server, g.wave, g.target, g.position, "
    "jsonb_strip_nulls(jsonb_build_object('origin', g.origin)) FROM unnest("
    "CAST(:ids AS uuid[]), CAST(:servers AS text[]), CAST(:waves AS integer[]), CAST(:targets AS text[]), "
    "CAST(:origins AS text[])) WITH ORDINALITY AS g (tenant_id, server, wave, target, origin, position)"
)
_ADD_PROCESS = text(
    "INSERT INTO tenancy.migration_run_processes (run, id, host, pid, claimed_until) "
    "VALUES (:run, :id, :host, :pid, clock_timestamp() + make_interval(secs => :seconds))"
)
# a run that goes on with the given tenants once somebody has decided so
_PAUSED = text(
    "SELECT r.id, r.command, r.target, r.reason, w.number FROM tenancy.migration_runs r CROSS JOIN LATERAL ("
    "SELECT count(*) AS number FROM tenancy.migration_run_tenants t WHERE t.run = r.id "
    "AND t.state IN ('waiting', 'running') AND t.tenant_id = ANY(CAST(:tenants AS uuid[]))) w "
    "WHERE r.state = 'paused' AND r.command = ANY(CAST(:moves AS text[])) "
    "AND r.id IS DISTINCT FROM CAST(:undoes AS bigint) AND r.id IS DISTINCT FROM CAST(:run AS bigint) "
    "AND w.number > 0 ORDER BY r.id LIMIT 1"
)
_STARTING = text(
    "SELECT tenant_id FROM tenancy.migration_run_tenants WHERE run = :run AND state IN ('waiting', 'running')"
)
LOCK_RUN = text("SELECT * FROM tenancy.migration_runs WHERE id = :run FOR NO KEY UPDATE")
_SET_STATE = text(
    "UPDATE tenancy.migration_runs SET state = CAST(:state AS text), reason = :reason, gate = NULL, "
    "ended_at = CASE WHEN CAST(:state AS text) IN ('done', 'failed', 'cancelled') THEN clock_timestamp() END "
    "WHERE id = :run"
)
# what a lost process has begun waits again; by the number of its losses it is known what ends its processes
RELEASE_LOST = text(
    "WITH lost AS (UPDATE tenancy.migration_run_processes p SET left_at = clock_timestamp(), is_lost = true "
    "WHERE p.run = :run AND p.left_at IS NULL AND p.claimed_until < clock_timestamp() RETURNING p.id) "
    "UPDATE tenancy.migration_run_tenants t SET claim = NULL, state = 'waiting', "
    "attempts = t.attempts - (t.state = 'waiting')::integer, losses = t.losses + (t.state = 'running')::integer "
    "FROM lost WHERE t.run = :run AND t.claim = lost.id AND t.state IN ('waiting', 'running')"
)
_SKIP_WAITING = text(
    "UPDATE tenancy.migration_run_tenants SET state = 'skipped' "
    "WHERE run = :run AND state = 'waiting' AND claim IS NULL"
)
# not those that were purged
_WAIT_AGAIN = text(
    "UPDATE tenancy.migration_run_tenants t SET state = 'waiting', claim = NULL, error = NULL, sqlstate = NULL, "
    "losses = 0 "
    "FROM tenancy.tenants n WHERE t.run = :run AND t.state = ANY(CAST(:states AS text[])) AND n.id = t.tenant_id "
    "AND n.status NOT IN ('provisioning', 'purged') AND n.purge_started_at IS NULL"
)
# a later run that is done has finished it
_UNFINISHED_DATA = text(
    "SELECT t.tenant_id, t.revision_after FROM tenancy.migration_run_tenants t "
    "WHERE t.state <> 'done' AND jsonb_path_exists(t.detail, '$.data.*.done ? (@ == false)') AND NOT EXISTS (SELECT "
    "FROM tenancy.migration_run_tenants l WHERE l.tenant_id = t.tenant_id AND l.run > t.run AND l.state = 'done') "
    "ORDER BY t.run"
)
_ANY_LIVE = text(f"SELECT EXISTS (SELECT FROM tenancy.migration_run_processes p WHERE p.run = :run AND {LIVE})")  # noqa: S608 - a constant
# a retry goes through waves with skipped tenants: when these wait again, their wave comes first, with its checks
_GO_BACK = text(
    "UPDATE tenancy.migration_runs r SET wave = least(r.wave, (SELECT min(t.wave) "
    "FROM tenancy.migration_run_tenants t WHERE t.run = r.id AND t.state = 'waiting')) WHERE r.id = :run"
)
_FORGET_SKIP_CHECKS = text("UPDATE tenancy.migration_runs SET plan = plan - 'skip_checks' WHERE id = :run")
# not those of a wave that is still to be migrated: nobody knows yet what they would say
_SKIP_CHECKS = text(
    "UPDATE tenancy.migration_runs r SET plan = plan || jsonb_build_object('skip_checks', wave) WHERE r.id = :run "
    "AND NOT EXISTS (SELECT FROM tenancy.migration_run_tenants t WHERE t.run = r.id AND t.wave <= r.wave "
    "AND t.state IN ('waiting', 'running'))"
)
_PRUNE = text(
    "DELETE FROM tenancy.migration_runs r "  # noqa: S608 - a constant
    "WHERE r.created_at < clock_timestamp() - make_interval(secs => :seconds) "
    "AND NOT EXISTS (SELECT FROM tenancy.migration_runs u WHERE u.undoes = r.id "
    "AND u.created_at >= clock_timestamp() - make_interval(secs => :seconds)) "
    f"AND NOT EXISTS (SELECT FROM tenancy.migration_run_processes p WHERE p.run = r.id AND {LIVE}) RETURNING r.id"
)


class RunRecords:
    """Reads and changes the records of runs.

    Args:
        control: The control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self.control = control

    # --- starting ---------------------------------------------------------------------------------------------------

    async def create(
        self, new: NewRun, tenants: Sequence[NewTenant], claimant: Claimant, *, join: bool = False, beside: bool = False
    ) -> int:
        """Record a run with its tenants, in which ``claimant`` takes part, and return its number.

        Args:
            new: The run.
            tenants: Its tenants, in the order in which they are migrated.
            claimant: The process that starts it.
            join: Return the run of the same command, target and code that is running, or paused, if there is one.
            beside: Go past runs that are paused.

        Raises:
            RunStateError: a run that is paused has some of the tenants left.
            RunConflictError: a run that is under way moves some of the tenants elsewhere.
        """
        async with self.control.transaction() as connection:
            await lock_starts(connection)
            if join:
                found = await find_to_join(connection, new.command, new.target, new.fingerprint)
                if found is not None:
                    if (await lock_run(connection, found)).state == "running":
                        await add_process(connection, found, claimant)
                    return found
            if not beside:
                await _refuse_to_pass(connection, new.command, [one.tenant_id for one in tenants], new.undoes)
            values = {**_new_values(new, beside=beside), "gate": claimant.id}
            run = int(await connection.scalar(_INSERT, values) or 0)
            if new.seal is not None and (seal := new.seal(run)) is not None:
                await connection.execute(_SEAL, {"run": run, "seal": seal})
            await add_tenants(connection, run, tenants)
            await _refuse_conflicts(connection, run, new.actor)
            await add_process(connection, run, claimant)
            detail = {"run": run, "command": new.command, "target": new.target, "tenants": len(tenants)}
            await insert_entry(connection, action="migration.start", actor=new.actor, detail=detail)
        return run

    async def check_paused(self, command: str, tenants: Iterable[UUID], *, undoes: int) -> None:
        """Refuse what ``create`` would, before anything else is done.

        Raises:
            RunStateError: another run that is paused has some of the tenants left.
        """
        async with self.control.connect() as connection:
            await _refuse_to_pass(connection, command, tenants, undoes)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, run: int) -> RunRecord:
        """Return a run.

        Raises:
            RunNotFoundError: there is none of that number.
        """
        async with self.control.connect() as connection:
            row = (await connection.execute(_RUN, {"run": run})).one_or_none()
        if row is None:
            raise RunNotFoundError(run)
        return _run_from_row(row)

    async def find_running(self, command: str, target: str, fingerprint: str) -> RunRecord | None:
        """Return the run that ``create`` would join; None if there is none."""
        async with self.control.connect() as connection:
            run = await find_to_join(connection, command, target, fingerprint)
            row = None if run is None else (await connection.execute(_RUN, {"run": run})).one_or_none()
        return None if row is None else _run_from_row(row)

    async def latest(
        self, *, state: RunState | None = None, limit: int = 20, before: int | None = None
    ) -> list[RunRecord]:
        """Return runs, the newest first; ``before`` continues after the last one of the previous page."""
        async with self.control.connect() as connection:
            rows = await connection.execute(_LATEST, {"state": state, "limit": limit, "before": before})
            return [_run_from_row(row) for row in rows]

    async def tenants(
        self,
        run: int,
        *,
        state: TenantRunState | Iterable[TenantRunState] | None = None,
        limit: int | None = None,
        after: UUID | None = None,
    ) -> list[TenantRecord]:
        """Return the tenants of a run, in order of their creation."""
        states = None if state is None else [state] if isinstance(state, str) else [*state]
        values = {"run": run, "states": states, "limit": limit, "after": after}
        async with self.control.connect() as connection:
            return [TenantRecord(**_without_claim(row)) for row in await connection.execute(_TENANTS, values)]

    async def with_unfinished_data(self) -> dict[UUID, str | None]:
        """Return the tenants with data migrations that a run has begun, and none has finished.

        With each is the revision that it was left at; None if its run goes on, or has lost its process.
        """
        async with self.control.connect() as connection:
            return {row.tenant_id: row.revision_after for row in await connection.execute(_UNFINISHED_DATA)}

    async def processes(self, run: int) -> list[ProcessRecord]:
        """Return the processes that take part in a run, or did, in the order in which they joined."""
        async with self.control.connect() as connection:
            rows = await connection.execute(_PROCESSES, {"run": run})
            return [
                ProcessRecord(
                    id=row.id,
                    host=row.host,
                    pid=row.pid,
                    slots=row.slots,
                    joined_at=row.joined_at,
                    left_at=row.left_at,
                    is_lost=row.is_lost,
                    is_alive=row.is_alive,
                )
                for row in rows
            ]

    # --- operators' commands ----------------------------------------------------------------------------------------

    async def cancel(self, run: int, *, to_undo: bool = False, hold: bool = False, actor: Actor = SYSTEM) -> RunRecord:
        """Skip the tenants of a run that wait; those that are being migrated are finished.

        With ``to_undo``, only a run in which no process takes part. With ``hold``, no process upgrades by itself what
        the run has not reached.

        Raises:
            RunNotFoundError: there is none of that number.
            RunStateError: it has ended; or a process takes part.
        """
        async with self.control.transaction() as connection:
            found = await lock_run(connection, run)
            if found.state not in ("running", "paused"):
                raise RunStateError(run, found.state, "cancelled")
            # somebody may have resumed it since its undo was planned
            if to_undo and found.state == "running" and await connection.scalar(_ANY_LIVE, {"run": run}):
                raise RunStateError(run, "running", "undone; cancel it first")
            await _cancel(connection, run, f"cancelled by {actor.id or actor.kind}", actor)
            if hold:
                await hold_unreached(connection, run)
        return await self.get(run)

    async def pause(self, run: int, *, actor: Actor = SYSTEM) -> RunRecord:
        """Let every process finish the tenants that it is migrating, and claim no others until the run is resumed.

        Raises:
            RunNotFoundError: there is none of that number.
            RunStateError: it is not running.
        """
        async with self.control.transaction() as connection:
            found = await lock_run(connection, run)
            if found.state != "running":
                raise RunStateError(run, found.state, "paused")
            await set_state(connection, run, "paused", f"paused by {actor.id or actor.kind}")
            await insert_entry(connection, action="migration.pause", actor=actor, detail={"run": run})
        return await self.get(run)

    async def reopen(
        self, run: int, claimant: Claimant, *, retry: bool = False, skip_checks: bool = False, actor: Actor = SYSTEM
    ) -> None:
        """Let a run go on, in which ``claimant`` takes part. One that is done stays as it is.

        Args:
            run: Its number.
            claimant: The process that goes on with it.
            retry: Try its failed tenants again, and no others; without it, go on with those that were not started.
            skip_checks: Begin the next wave, whatever the checks of the one that runs now say, if all of its tenants
                are at an end.
            actor: Who does this.

        Raises:
            RunNotFoundError: there is none of that number.
            RunStateError: to retry, it has not ended.
            RunConflictError: another run that is under way moves some of its tenants elsewhere.
            RunStateError: another run that is paused has some of its tenants left.
        """
        async with self.control.transaction() as connection:
            await lock_starts(connection)
            found = await lock_run(connection, run)
            if retry and found.state == "running":
                raise RunStateError(run, "not at its end", "retried; resume it first")
            if found.state == "done":
                return
            await connection.execute(RELEASE_LOST, {"run": run})
            if retry or found.state in ("failed", "cancelled"):
                states = ["failed"] if retry else ["skipped"]
                await connection.execute(_WAIT_AGAIN, {"run": run, "states": states})
                if not retry:
                    await connection.execute(_GO_BACK, {"run": run})
            if found.state != "running":
                await set_state(connection, run, "running", None)
                await connection.execute(_FORGET_SKIP_CHECKS, {"run": run})
            starting = (await connection.scalars(_STARTING, {"run": run})).all()
            if not found.plan.get("beside"):
                await _refuse_to_pass(connection, found.command, starting, found.undoes, run=run)
            await _refuse_conflicts(connection, run, actor)
            if skip_checks:
                await connection.execute(_SKIP_CHECKS, {"run": run})
            await add_process(connection, run, claimant)
            action = "migration.retry" if retry else "migration.resume"
            detail = {"run": run, **({"skip_checks": True} if skip_checks else {})}
            await insert_entry(connection, action=action, actor=actor, detail=detail)

    async def join(self, run: int, claimant: Claimant) -> None:
        """Add ``claimant`` to the processes of a run.

        Raises:
            RunNotFoundError: there is none of that number.
        """
        async with self.control.transaction() as connection:
            await lock_run(connection, run)
            await add_process(connection, run, claimant)

    async def fail_unstarted(self, run: int, reason: str, *, actor: Actor = SYSTEM) -> None:
        """End a run that could not be prepared, unless another process takes part in it."""
        async with self.control.transaction() as connection:
            found = await lock_run(connection, run)
            if found.state != "running" or found.wave >= 0 or await connection.scalar(_ANY_LIVE, {"run": run}):
                return
            await connection.execute(_SKIP_WAITING, {"run": run})
            await set_state(connection, run, "failed", reason)
            detail = {"run": run, "state": "failed", "reason": reason}
            await insert_entry(connection, action="migration.end", actor=actor, detail=detail)

    async def prune(self, *, older_than: float) -> int:
        """Remove the runs that were started more than ``older_than`` seconds ago; return how many."""
        async with self.control.transaction() as connection:
            return len((await connection.execute(_PRUNE, {"seconds": older_than})).all())


# --- within a transaction ---------------------------------------------------------------------------------------------


async def lock_run(connection: AsyncConnection, run: int) -> Row[*tuple[Any, ...]]:
    """Lock a run's row, which everything that claims does first, and return it.

    Raises:
        RunNotFoundError: there is none of that number.
    """
    row = (await connection.execute(LOCK_RUN, {"run": run})).one_or_none()
    if row is None:
        raise RunNotFoundError(run)
    return row


async def _refuse_to_pass(
    connection: AsyncConnection, command: str, tenants: Iterable[UUID], undoes: int | None, *, run: int | None = None
) -> None:
    """Refuse a run that goes past a paused one, where it starts or, as ``run``, goes on; after ``lock_starts``."""
    if command not in _MOVES:
        return
    values = {"tenants": list(tenants), "undoes": undoes, "moves": list(_MOVES), "run": run}
    other = (await connection.execute(_PAUSED, values)).one_or_none()
    if other is None:
        return
    end = f"end it (tenancy migrate cancel {other.id})"
    choice = (
        f"{end}, or start another run anyway with --beside (beside=True in Python, -x beside=true for alembic)"
        if run is None
        else f"or {end}, before run {run} goes on"
    )
    message = (
        f"run {other.id} ({other.command} {other.target}) is paused: {other.reason}. {counted(other.number)} of it are "
        f"still to be migrated; nothing was started. Continue it (tenancy migrate resume {other.id}), {choice}"
    )
    raise RunStateError(other.id, "paused", "passed by", message=message)


async def _refuse_conflicts(connection: AsyncConnection, run: int, actor: Actor) -> None:
    """Refuse a run that others contradict; one that no process works on any more is cancelled instead."""
    for other in await contradicting(connection, run):
        if other.is_live:
            raise RunConflictError(other.id, other.command, other.target)
        await lock_run(connection, other.id)
        await _cancel(connection, other.id, f"it was interrupted, and run {run} contradicts it", actor)


async def _cancel(connection: AsyncConnection, run: int, reason: str, actor: Actor) -> None:
    """Cancel a run that is locked."""
    await connection.execute(RELEASE_LOST, {"run": run})
    await connection.execute(_SKIP_WAITING, {"run": run})
    await set_state(connection, run, "cancelled", reason)
    await insert_entry(connection, action="migration.cancel", actor=actor, detail={"run": run, "reason": reason})


async def set_state(connection: AsyncConnection, run: int, state: RunState, reason: str | None) -> None:
    """Set the state of a run that is locked."""
    await connection.execute(_SET_STATE, {"run": run, "state": state, "reason": reason})


async def add_tenants(connection: AsyncConnection, run: int, tenants: Sequence[NewTenant]) -> None:
    """Add tenants to a run that is being created."""
    values = {
        "run": run,
        "ids": [one.tenant_id for one in tenants],
        "servers": [one.server for one in tenants],
        "waves": [one.wave for one in tenants],
        "targets": [one.target for one in tenants],
        "origins": [one.origin for one in tenants],
    }
    await connection.execute(_ADD_TENANTS, values)


async def add_process(connection: AsyncConnection, run: int, claimant: Claimant) -> None:
    """Add a process to a run that is locked."""
    values = {"run": run, "id": claimant.id, "host": claimant.host, "pid": claimant.pid, "seconds": CLAIM_SECONDS}
    await connection.execute(_ADD_PROCESS, values)


def _new_values(new: NewRun, *, beside: bool) -> dict[str, Any]:
    return {
        "command": new.command,
        "target": new.target,
        "undoes": new.undoes,
        "actor_kind": new.actor.kind,
        "actor_id": clean_text(new.actor.id),
        "host": socket.gethostname(),
        "package_version": version("tenancy-orm"),
        "code_version": clean_text(new.code_version),
        "fingerprint": new.fingerprint,
        "plan": json.dumps({**new.plan, "beside": True} if beside else dict(new.plan)),
    }


def _run_from_row(row: Row[*tuple[Any, ...]]) -> RunRecord:
    return RunRecord(
        id=row.id,
        command=row.command,
        target=row.target,
        undoes=row.undoes,
        actor=Actor(row.actor_kind, row.actor_id),
        host=row.host,
        package_version=row.package_version,
        code_version=row.code_version,
        fingerprint=row.fingerprint,
        plan=row.plan,
        state=row.state,
        wave=row.wave,
        reason=row.reason,
        created_at=row.created_at,
        ended_at=row.ended_at,
        tenants={state: row.tenants.get(state, 0) for state in TENANT_STATES},
        processes=row.processes,
        gate=row.gate,
    )


def _without_claim(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    return {name: value for name, value in row._mapping.items() if name != "claim"}
