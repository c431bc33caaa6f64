"""``Participation``: one process claims tenants of a run, migrates several at once, and writes what it did."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from uuid import UUID

from ..cancellation import run_to_completion
from ..errors import ControlUnavailableError, JobLostError
from ..migrations.failures import describe
from . import patience
from .claims import GIVEN_UP, Claimed, Finished, RunClaims, Turn
from .outages import Outages
from .patience import is_temporary
from .records import RunState

logger = logging.getLogger("tenancy_orm.migrations")

_HEARTBEAT = 1.0  # within this time a process learns that a run was cancelled
_FLUSH = 0.25  # how long an outcome waits for others that are written with it
_BATCH = 100  # or so many of them
_MARK = 0.2  # a tenant that takes longer is recorded as running
_AHEAD = 0.5  # for how many seconds tenants are claimed ahead
_MOST_AHEAD = 400  # or so many of them
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 2.0  # between attempts to reach the control database
_ASK_PAUSE = 1.0  # between two questions whether a server answers again
_LEAVE_SECONDS = 10.0


def _is_suspect(claimed: Claimed) -> bool:
    """Whether a tenant may be what has ended its process or its server, and is tried again."""
    return 0 < claimed.losses < GIVEN_UP


class Participation:
    """One process's part in a run.

    Args:
        claims: What it writes in the control database.
        prepare: Prepares this process, before it claims a tenant.
        migrate: Migrates one tenant and returns how that ended, also where it was cancelled.
        gate: Opens the wave after the given one, or ends the run; returns the run's state where it has ended.
        concurrency: How many tenants this process migrates at once.
        per_server: How many all processes migrate at once on one server.
        stop_on_failure: Whether the run ends at the first failure.
        max_failures: The run ends at so many failures.
        at_gate: The wave at the end of which this process has the gate already.
        outages: Which servers are down, as far as this process knows.
    """

    def __init__(
        self,
        claims: RunClaims,
        *,
        prepare: Callable[[], Awaitable[None]],
        migrate: Callable[[Claimed], Awaitable[Finished]],
        gate: Callable[[int], Awaitable[RunState | None]],
        concurrency: int,
        per_server: int,
        stop_on_failure: bool,
        max_failures: int | None = None,
        at_gate: int | None = None,
        outages: Outages,
    ) -> None:
        self._claims = claims
        self._prepare = prepare
        self._migrate = migrate
        self._gate = gate
        self._concurrency = concurrency
        self._per_server = per_server
        self._stop_on_failure = stop_on_failure
        self._max_failures = max_failures
        self._is_limited = stop_on_failure or max_failures is not None
        self._failures = 0  # here; others may have more
        self._queue: dict[str, deque[Claimed]] = {}  # claimed, and not begun, by server
        self._slots: dict[str, int] = {}
        self._busy: Counter[str] = Counter()
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._begun: dict[UUID, float] = {}  # not recorded as running yet
        self._finished: list[Finished] = []
        self._oldest = 0.0  # when the first of them has ended
        self._state: RunState = "running"
        self._outages = outages
        self._health = outages.health
        self._awaited: frozenset[str] = frozenset()  # the servers that are down and awaited, at the last turn
        self._asking: dict[str, asyncio.Task[None]] = {}  # whether they answer again
        self._alone: set[str] = set()  # where a tenant is migrated that has lost its process or its server before
        self._of_nobody: frozenset[str] = frozenset()  # the servers that no other process reaches either
        self._at_gate = at_gate  # the wave at the end of which this process has the gate
        self._failure: Exception | None = None
        self._failing_since: float | None = None  # since when the control database does not answer
        self._is_ready = False  # not before it is prepared
        self._has_begun = False
        self._has_more = True
        self._stopped = False
        self._done: Counter[str] = Counter()  # since the last turn, by server
        self._rates: dict[str, float] = {}  # tenants a second
        self._changed = asyncio.Event()  # for the body
        self._wake = asyncio.Event()  # for the keeper

    async def run(self) -> RunState:
        """Take part until the run ends or pauses, and return its state.

        Raises:
            JobLostError: this process was silent for so long that others have taken over its tenants.
            ControlUnavailableError: the control database does not answer.
        """
        for server in await self._claims.servers():
            self._queue[server] = deque()
        keeper = asyncio.create_task(self._keep())
        try:
            await self._work()
        finally:
            self._stopped = True
            keeper.cancel()
            await asyncio.wait([keeper])
            await self._stop_tasks([*self._asking.values(), *self._tasks.values()])
            await self._leave()
        return self._state

    async def _work(self) -> None:
        await self._prepare()
        self._is_ready = True
        self._wake.set()
        while self._failure is None:
            self._start()
            if not self._tasks:
                if self._state != "running":
                    return
                if self._at_gate is not None:
                    await self._pass_gate(self._at_gate)
                    continue
            self._changed.clear()
            await self._changed.wait()
        raise self._failure

    async def _pass_gate(self, wave: int) -> None:
        ended = await self._patiently(wave)
        self._at_gate = None
        if ended is not None:
            self._state = ended
        self._has_more = True
        self._wake.set()

    async def _patiently(self, wave: int) -> RunState | None:
        """Go through the gate once the control database answers.

        Not by ``patience.repeat``: at other errors the gate may have ended the run, and then a second attempt would
        hide the error. And what ends this process's part ends the wait.
        """
        deadline = time.monotonic() + patience.PATIENCE_SECONDS
        while True:
            try:
                return await self._gate(wave)
            except ControlUnavailableError:
                if time.monotonic() >= deadline or self._failure is not None:
                    raise
            await asyncio.sleep(_LONGEST_PAUSE)

    # --- tenants ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin what may be begun now, from each server in turn."""
        if self._state != "running" or self._failing_since is not None or self._stopped:
            return
        while len(self._tasks) < self._concurrency:
            awaited = self._health.awaited
            ready = [server for server in self._queue if server not in awaited and self._has_room(server)]
            if not ready:
                return
            claimed = self._queue[min(ready, key=lambda s: self._busy[s])].popleft()
            tenant = claimed.tenant
            self._has_begun = True
            self._busy[claimed.server] += 1
            if _is_suspect(claimed):
                self._alone.add(claimed.server)
            self._begun[tenant.id] = time.monotonic()
            name = f"tenancy-migrate-{tenant.slug}"
            self._tasks[tenant.id] = asyncio.create_task(self._bring(claimed), name=name)

    def _has_room(self, server: str) -> bool:
        waiting, busy = self._queue[server], self._busy[server]
        return bool(waiting) and busy < self._slots.get(server, 0) and not self._is_kept_free(server)

    def _is_kept_free(self, server: str) -> bool:
        """Whether nothing is begun there now: what may be what ends the server ends no neighbour's migration."""
        waiting = self._queue[server]
        return server in self._alone or bool(waiting and self._busy[server] and _is_suspect(waiting[0]))

    async def _bring(self, claimed: Claimed) -> None:
        tenant_id = claimed.tenant.id
        try:
            finished = await self._migrate(claimed)
            if not self._finished:
                self._oldest = time.monotonic()
            self._finished.append(finished)
            self._done[claimed.server] += finished.state != "waiting"
            self._failures += finished.state == "failed"
            most = 1 if self._stop_on_failure else self._max_failures
            if most is not None and self._failures >= most:
                self._stopped = True
        except Exception as exc:  # noqa: BLE001 - a mistake in the code ends the run
            self._failure = exc
        finally:
            self._busy[claimed.server] -= 1
            if _is_suspect(claimed):
                self._alone.discard(claimed.server)
            self._begun.pop(tenant_id, None)
            del self._tasks[tenant_id]
            self._changed.set()
            self._wake.set()

    @staticmethod
    async def _stop_tasks(tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            # a second cancellation would interrupt the clean-up that the first one has started
            if not task.cancelling():
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _leave(self) -> None:
        if isinstance(self._failure, JobLostError):
            return

        async def leave() -> None:
            try:
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self._claims.leave(self._finished)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it hides no other error
                logger.error(
                    "run %d: outcomes of this process could not be recorded (%s); continue with: "
                    "tenancy migrate resume %d",
                    self._claims.run,
                    describe(exc),
                    self._claims.run,
                )

        await run_to_completion(leave())

    # --- the control database ---------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Take turns: often enough to keep the claim, and whenever something is to be written or claimed."""
        # who has the gate has nothing to learn before it is passed
        last = 0.0 if self._at_gate is None else time.monotonic()
        pause = _FIRST_PAUSE
        try:
            while True:
                if last:
                    await self._until_due(last)
                began = time.monotonic()
                try:
                    await self._take_turn(began - last if last else 0.0)
                    last, pause, self._failing_since = began, _FIRST_PAUSE, None
                except Exception as exc:
                    if not is_temporary(exc):
                        raise
                    if self._give_up(exc, began):
                        return
                    await asyncio.sleep(pause)
                    pause = min(_LONGEST_PAUSE, 2 * pause)
                finally:
                    self._changed.set()
        except Exception as exc:  # noqa: BLE001 - the body raises it
            self._failure = exc
            self._changed.set()

    def _give_up(self, error: Exception, now: float) -> bool:
        if self._failing_since is None:
            self._failing_since = now
            logger.warning("run %d: the control database cannot be reached: %s", self._claims.run, describe(error))
        if self._tasks or now - self._failing_since < patience.PATIENCE_SECONDS:
            return False
        run = self._claims.run
        self._failure = ControlUnavailableError(
            f"the control database does not answer; once it does, look at run {run} with: tenancy migrate show {run}; "
            f"and continue with: tenancy migrate resume {run}"
        )
        self._failure.__cause__ = error
        return True

    async def _until_due(self, last: float) -> None:
        while not self._is_due():
            due = last + _HEARTBEAT
            if self._finished:
                due = min(due, self._oldest + _FLUSH)
            if (left := due - time.monotonic()) <= 0:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _is_due(self) -> bool:
        if len(self._finished) >= _BATCH or (self._stopped and self._finished):
            return True
        if self._is_limited and any(one.state == "failed" for one in self._finished):
            # others must know before they begin more
            return True
        if self._is_ready and self._at_gate is None and self._has_more:
            lacking = (s for s, number in self._wanted().items() if number > 0)
            return any(len(self._queue[s]) <= int(self._rates.get(s, 0.0) * _FLUSH) for s in lacking)
        # the last ones have ended: whether that is the end of a wave is known after a turn
        return not self._tasks and not any(self._queue.values()) and bool(self._finished)

    def _wanted(self) -> dict[str, int]:
        """Return how many tenants to claim of each server: for free slots, and ahead if they are done quickly.

        What is claimed ahead by a process that is slow would wait for it, although others are free.
        """
        free = self._concurrency - len(self._tasks)
        slots = {s: self._slots.get(s, self._concurrency) - self._busy[s] for s in self._queue}
        ahead = {s: min(_MOST_AHEAD, int(_AHEAD * rate)) for s, rate in self._rates.items()}
        # at first it is not known how long they take; what is too much is given back
        first = 0 if self._has_begun else self._concurrency
        awaited = self._health.awaited
        wanted = {s: max(0, min(free, slots[s])) + ahead.get(s, first) - len(self._queue[s]) for s in self._queue}
        return {s: 0 if s in awaited or self._is_kept_free(s) else number for s, number in wanted.items()}

    def _give_back_kept(self) -> None:
        """Let go of what would wait here for a tenant that is migrated alone."""
        for server, waiting in self._queue.items():
            if self._is_kept_free(server):
                # but the one that is to run alone
                self._let_go(waiting, len(waiting) - (server not in self._alone))

    def _give_back_excess(self) -> None:
        """Let go of what was claimed ahead when tenants were done more quickly than they are now."""
        for server, number in self._wanted().items():
            self._let_go(self._queue[server], -number - int(2 * _AHEAD * self._rates.get(server, 0.0)))

    async def _take_turn(self, seconds: float) -> None:
        if seconds > 0 and self._has_begun:
            for server in self._queue:
                now = self._done[server] / seconds
                self._rates[server] = 0.5 * self._rates.get(server, now) + 0.5 * now
            self._done.clear()
            self._give_back_excess()
        self._look_after_servers()
        unreached = self._health.unreached
        self._give_back(self._awaited | (unreached - self._of_nobody))
        self._give_back_kept()
        finished = list(self._finished)
        idle = not self._tasks and not any(self._queue.values())
        claiming = self._is_ready and self._state == "running" and self._at_gate is None and not self._stopped
        wanted = self._wanted() if claiming else dict.fromkeys(self._queue, 0)
        now = time.monotonic()
        started = [tenant_id for tenant_id, begun in self._begun.items() if now - begun >= _MARK]
        turn = await self._claims.turn(
            finished,
            started,
            wanted=wanted,
            holding={s: max(self._slots.get(s, 0), self._busy[s]) for s in self._queue},
            concurrency=self._concurrency,
            per_server=self._per_server,
            stop_on_failure=self._stop_on_failure,
            max_failures=self._max_failures,
            count=idle and claiming,
            known=self._known() if self._failing_since is not None else None,
            unreached=unreached,
        )
        del self._finished[: len(finished)]
        self._oldest = now
        for tenant_id in started:
            self._begun.pop(tenant_id, None)
        if any(number > 0 and turn.slots.get(server) for server, number in wanted.items()):
            self._has_more = bool(turn.claimed)
        await self._learn(turn, claiming=claiming)

    def _look_after_servers(self) -> None:
        """Ask whether the servers that are awaited answer again. Their tenants are left to whoever reaches them."""
        awaited, before = self._health.awaited, self._awaited
        self._awaited = awaited
        for server in awaited - before:
            logger.warning(
                "run %d: server %s does not answer any more; its tenants wait for it", self._claims.run, server
            )
        for server in before - awaited:
            self._has_more = True
            if self._health.has_gone(server):
                logger.error("run %d: server %s has not come back in time; its tenants fail", self._claims.run, server)
            else:
                logger.info("run %d: server %s answers again", self._claims.run, server)
        for server in awaited | self._health.unreached:
            if server not in self._asking:
                self._asking[server] = asyncio.create_task(self._ask(server), name=f"tenancy-reach-{server}")

    async def _ask(self, server: str) -> None:
        try:
            await self._outages.reach(server)
            if server not in self._health.awaited | self._health.unreached:
                self._has_more = True
                self._wake.set()
                return
            # what is quick on other servers must not ask this one more often
            await asyncio.sleep(_ASK_PAUSE)
        finally:
            del self._asking[server]

    async def _learn(self, turn: Turn, *, claiming: bool) -> None:
        self._slots = dict(turn.slots)
        self._state = turn.state
        self._of_nobody = turn.unreached
        for claimed in turn.claimed:
            self._queue[claimed.server].append(claimed)
        if turn.has_gate:
            self._at_gate = turn.wave
        if turn.pending and not turn.claimed and claiming:
            # of tenants that were created since, or of other servers
            for server in await self._claims.servers():
                self._queue.setdefault(server, deque())
        if turn.state != "running" or self._stopped:
            self._give_back(self._queue)

    def _give_back(self, servers: Iterable[str]) -> None:
        """Let go of what is claimed on servers and was not begun."""
        for waiting in [self._queue[server] for server in servers if server in self._queue]:
            self._let_go(waiting, len(waiting))

    def _let_go(self, waiting: deque[Claimed], number: int) -> None:
        """Let go of so many of the tenants that come last."""
        for _ in range(number):
            self._finished.append(Finished(tenant_id=waiting.pop().tenant.id, state="waiting", counts=False))

    def _known(self) -> list[UUID]:
        return [*self._tasks, *(one.tenant.id for waiting in self._queue.values() for one in waiting)]
