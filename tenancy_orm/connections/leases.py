"""``ConnectionLeases``: gets this process's part of each server's connections, renews it, and gives some back.

One task does that, and no request waits for it unless it needs more connections than this process has. Each process
renews its leases every ``RENEW_SECONDS``. One that does not for ``LEASE_SECONDS`` is lost, whatever the reason: killed,
stopped, or without a way to the control database. Before others get what it had:

- it goes back to its guaranteed part by itself, by its own clock, and proves that it lives by a lock on the server;
  another task looks at that clock, since the first one may be waiting for the control database;
- if it holds that lock, it keeps this part, and the others get what it had borrowed;
- if it does not, another process ends all its connections on the server, as the administrator, and then removes the
  lease. Should it go on after that, it opens nothing: its lease has expired by its own clock too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections import ChainMap
from collections.abc import Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any, cast
from uuid import UUID

from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.names import Names
from ..control.notifications import LeaseCall
from ..deadlines import clock
from ..errors import ControlUnavailableError
from ..events import ConnectionLeaseLost, ConnectionLeaseRestored, EventBus
from ..loops import HomeLoop
from ..postgres.connections import Connection
from ..postgres.errors import CONNECTION_DOES_NOT_EXIST, IDLE_IN_TRANSACTION, sqlstate_of
from ..postgres.locks import try_lock
from ..servers.server import Server
from . import rows, usage
from .care import FAILURES, Care
from .lease import CUT_OFF_SECONDS, END_SECONDS, Lease
from .rows import LEASE_SECONDS, ServerLeases
from .shares import LEAST, Claim, Decision, decide

logger = logging.getLogger("tenancy_orm.connections")

RENEW_SECONDS = LEASE_SECONDS / 4
"""How often a process renews its leases."""

RECALL_SECONDS = 30.0
"""For how long a process may go on using a connection that another one, with fewer than its share, waits for."""

FIRST = 5
"""How many connections a process gets when it opens, where they are free."""

_OPENING_ATTEMPTS = 3
_ATTEMPT_SECONDS = 1.5  # how long the control database may take
_CLOCK_SECONDS = 0.5  # how often a process looks whether its leases are about to expire
_END_SECONDS = 3.0  # how long the closing of a process waits for the end of what it has cut
_SHRINK_SECONDS = 0.03  # how often a process that gives back looks which connections have been closed
_FIRST_PAUSE = 0.02  # between two attempts to get more


class ConnectionLeases:
    """This process's parts of the connections to the servers.

    Args:
        control: The open control database.
        servers: The servers by name.
        events: Receives losses and reclaims.
        names: Those of this installation's roles.
        at_most: How many connections to one server this process may have at most; None is as many as there are.
    """

    def __init__(
        self,
        control: ControlDatabase,
        servers: Mapping[str, Server],
        events: EventBus,
        names: Names,
        *,
        at_most: int | None,
    ) -> None:
        self.home = HomeLoop()
        self._control = control
        self._replicas: dict[str, Server] = {}
        self._servers: Mapping[str, Server] = ChainMap(self._replicas, cast("dict[str, Server]", servers))
        self._events = events
        self._at_most = at_most
        self._host = socket.gethostname()
        self._leases: dict[str, Lease] = {}
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._care = Care(control, self._servers, events, names.tenant_stem, self._renew_soon)
        self._renew_at = 0.0
        self._failing = False
        self._proofs: dict[str, Connection] = {}

    # --- for the parts of a Tenancy ---------------------------------------------------------------------------------

    async def open(self, accepted: Mapping[str, int | None]) -> None:
        """Get a first part of each server's connections, and begin to renew it.

        Args:
            accepted: By server, how many connections it accepts, less those that it reserves; None if it is not known.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        for server in accepted:
            self.lease(server)
        for left in reversed(range(_OPENING_ATTEMPTS)):
            try:
                await self._register(accepted)
                break
            except ControlUnavailableError as exc:
                # this process was stopped for a moment, in the transaction: its session was ended, and others went on
                if not left or sqlstate_of(exc) not in (IDLE_IN_TRANSACTION, CONNECTION_DOES_NOT_EXIST):
                    raise
        self._begin()

    def open_like(self, former: ConnectionLeases) -> None:
        """Begin with a first part that is not asked for, as far as another ``ConnectionLeases`` knows the servers.

        For a short time, a test's: what goes beyond this part is asked for, and the first renewal registers it.
        """
        for server, known in former._leases.items():
            lease = self.lease(server, former._replicas.get(server))
            lease.learn(cap=known.cap, processes=known.processes, max_opening=known.max_opening)
            lease.granted = lease.limit = min(FIRST, lease.most)
            lease.renewed(clock())
            lease.apply()
        self._begin()

    def _begin(self) -> None:
        self._renew_at = clock() + RENEW_SECONDS * random.uniform(0.5, 1.0)
        loop = asyncio.get_running_loop()
        self._runner = loop.create_task(self._run(), context=Context())
        self._watcher = loop.create_task(self._watch(), context=Context())

    @property
    def processes(self) -> frozenset[UUID]:
        """The ids that this process has in its leases: another one in each."""
        return frozenset(lease.process for lease in self._leases.values())

    def lease(self, server: str, replica: Server | None = None) -> Lease:
        """Return this process's part of the connections of a server.

        Args:
            server: Its name, or a replica's.
            replica: The server itself, where ``servers`` may not have it.
        """
        if replica is not None and replica.is_replica:
            self._replicas[server] = replica
        found = self._leases.get(server)
        if found is None:
            found = self._leases[server] = Lease(server, at_most=self._at_most, on_need=lambda _: self._wake.set())
        return found

    def called(self, call: LeaseCall) -> None:
        """Look at a lease at once, since another process has called this one to.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("changing leases of connections")
        self.home.check()
        lease = self._leases.get(call.server)
        if lease is not None and lease.tag in call.called:
            lease.is_asking, lease.next_ask, lease.pause = True, 0.0, 0.0
            self._wake.set()

    async def renewed(self, lease: Lease, *, timeout: float) -> bool:
        """Wait until connections of a server may be opened, and return whether they may."""
        async with asyncio.timeout(timeout) as limit:
            try:
                while not lease.is_valid:
                    self._renew_soon()
                    await asyncio.sleep(_SHRINK_SECONDS)
            except asyncio.CancelledError:
                if not limit.expired():
                    raise
                limit.reschedule(None)
        return lease.is_valid

    async def read(self) -> list[ServerLeases]:
        """Return who has how many connections of which server, by the servers' names.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("reading leases of connections")
        return await read_leases(self._control)

    async def warn_of_cap(self, server: str) -> None:
        """Log where the processes that share a server's connections, without this one, are more than its cap.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        for found in await self.read():
            if found.server == server:
                others = sum(row.process not in self.processes for row in found.leases)
                _warn_of_cap(server, found.cap, others)

    async def close(self) -> None:
        """Give everything back. The connections are closed by now."""
        tasks = [task for task in (self._runner, self._watcher) if task is not None]
        self._runner = self._watcher = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._care.close()
        leases = [lease for lease in self._leases.values() if lease.is_registered]
        # PostgreSQL does not notice that a socket was cut while it runs a statement
        cut = [lease for lease in leases if lease.was_cut and lease.server in self._servers]
        ended = await asyncio.gather(*map(self._end_rest, cut))
        kept = [lease for lease, is_ended in zip(cut, ended, strict=True) if not is_ended]
        if removed := [lease.process for lease in leases if lease not in kept]:
            await self._within(self._remove(removed))

    async def _end_rest(self, lease: Lease) -> bool:
        """End what is left of connections that were cut; if it cannot, another process does, once the lease expires."""
        server = self._servers[lease.server]
        if server.is_pooled:
            return True
        try:
            async with asyncio.timeout(_END_SECONDS), usage.administration(server) as connection:
                await usage.end_tagged(connection, lease.tag, timeout=_END_SECONDS)
        except FAILURES as exc:
            logger.debug("connections to server %s cannot be ended: %s", lease.server, type(exc).__name__)
            return False
        return True

    async def _remove(self, processes: Sequence[UUID]) -> None:
        async with self._control.connect() as connection:
            await rows.close(connection, processes)

    # --- the tasks ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(max(0.0, self._due() - clock())):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._look()
            except Exception:
                logger.exception("the leases of connections cannot be kept")
                await asyncio.sleep(RENEW_SECONDS / 4)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_CLOCK_SECONDS)
            try:
                self._check_clock()
            except Exception:
                logger.exception("the clock of the leases of connections cannot be checked")

    async def _look(self) -> None:
        self._check_clock()
        now = clock()
        if now >= self._renew_at:
            # set first: what comes up during the renewal can have the next one sooner
            self._renew_at = now + RENEW_SECONDS
            self._failing = not await self._within(self._renew())
            if self._failing:
                self._renew_at = clock() + RENEW_SECONDS / 4
                self._check_clock()
        if self._failing:
            return  # each change would take as long, in vain
        for lease in self._leases.values():
            if lease.is_miscounted:
                lease.is_asking, lease.next_ask = True, 0.0
        for lease in sorted(filter(self._needs_change, self._leases.values()), key=lambda lease: lease.next_ask):
            if clock() >= self._renew_at:
                return  # a renewal keeps all of them, and those that are left are the first ones after it
            if not await self._within(self._change(lease)):
                lease.next_ask = clock() + RENEW_SECONDS / 4
                return

    def _due(self) -> float:
        due = self._renew_at
        if self._failing:
            return due
        for lease in self._leases.values():
            if lease.is_asking:
                due = min(due, max(lease.next_ask, clock() + 0.001))
            elif lease.shrinking_since is not None:
                due = min(due, clock() + _SHRINK_SECONDS)
        return due

    def _needs_change(self, lease: Lease) -> bool:
        if lease.is_asking:
            return clock() >= lease.next_ask
        return lease.shrinking_since is not None and lease.held < lease.granted

    async def _within(self, work: Coroutine[Any, Any, object]) -> bool:
        """Do something in the control database; False if it fails, or takes too long. What it cannot end is left."""
        task = asyncio.get_running_loop().create_task(work)
        try:
            await asyncio.wait([task], timeout=_ATTEMPT_SECONDS)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            task.cancel()
            task.add_done_callback(_ignore)
            return False
        if (error := task.exception()) is None:
            return True
        if not isinstance(error, FAILURES):
            logger.error("the leases of connections cannot be renewed", exc_info=error)
        elif not self._failing:
            logger.debug("the leases of connections cannot be renewed now: %s", type(error).__name__)
        return False

    def _renew_soon(self) -> None:
        self._renew_at = 0.0
        self._wake.set()

    def _look_after(self, leases: ServerLeases, lease: Lease, began: float) -> None:
        self._care.look_after(leases, lease.process, began=began, recount=lease.is_miscounted)
        lease.is_miscounted = False

    # --- registering, renewing, changing ----------------------------------------------------------------------------

    async def _register(self, accepted: Mapping[str, int | None]) -> None:
        """Insert leases of these servers. Nobody has to give anything back for what a process gets at first."""
        if not accepted:
            return
        began = clock()
        granted = {}
        async with self._control.transaction() as connection:
            await rows.save_caps(connection, accepted)
            found = await rows.read(connection, accepted)
            for server, leases in found.items():
                lease = self._leases[server]
                # its own is there where the answer to a former attempt was lost
                others = [row.granted for row in leases.leases if row.process != lease.process]
                parts = len(others) + 1
                first = FIRST if self._at_most is None else min(FIRST, self._at_most)
                free = leases.cap - sum(others)
                lease.learn(cap=leases.cap, processes=parts, max_opening=leases.max_opening)
                if leases.is_configured and leases.accepted is not None and leases.cap > leases.accepted:
                    logger.warning(
                        "the cap of server %s is %d connections, and the server accepts %d (its max_connections less "
                        "those that are reserved): lower the cap, or raise max_connections of the server",
                        server,
                        leases.cap,
                        leases.accepted,
                    )
                _warn_of_cap(server, leases.cap, parts)
                granted[server] = (lease.process, max(0, min(free, first)), leases.cap // parts, min(LEAST, first))
            added = await rows.add(connection, host=self._host, pid=os.getpid(), granted=granted)
        for server, (_, number, guaranteed, _) in granted.items():
            if server not in added:
                continue
            lease = self._leases[server]
            lease.granted = lease.limit = number
            lease.next_guaranteed = guaranteed
            lease.is_registered = True
            self._restored(lease, began)
            if number < LEAST or accepted[server] is None:
                lease.is_asking = True
                self._wake.set()

    def _restored(self, lease: Lease, began: float) -> None:
        """Record that a lease was renewed."""
        lease.renewed(began)
        if lease.is_cut_off:
            lease.is_cut_off = False
            logger.info("the leases of connections to server %s are renewed again", lease.server)
            self._events.emit(ConnectionLeaseRestored(server=lease.server, limit=lease.limit))
        if lease.is_present or lease.server in self._proofs:
            lease.is_present = False
            if (proof := self._proofs.pop(lease.server, None)) is not None:
                proof.terminate()
        lease.apply()

    async def _renew(self) -> None:
        unknown = {server: None for server, lease in self._leases.items() if not lease.is_registered}
        await self._register({server: None for server in unknown if server in self._servers})
        held = {server: lease for server, lease in self._leases.items() if lease.is_registered}
        if not held:
            return
        began = clock()
        wanted = {server: lease.wanted for server, lease in held.items()}
        demands = {server: lease.demand(wanted[server]) for server, lease in held.items()}
        async with self._control.transaction() as connection:
            renewed = await rows.renew(connection, demands)
            found = await rows.read(connection, held)
        for server, lease in held.items():
            if server not in renewed or (leases := found.get(server)) is None:
                continue
            position = leases.position(lease.process)
            assert position is not None  # noqa: S101 - for the type checker: it was just renewed
            # others have taken what it had borrowed, if it could not renew the lease in time
            lease.granted = min(lease.granted, leases.leases[position].granted)
            lease.limit = min(lease.limit, lease.granted)
            self._restored(lease, began)
            lease.learn(cap=leases.cap, processes=len(leases.leases), max_opening=leases.max_opening)
            decision = self._decide(lease, leases, position, keep=lease.remember(wanted[server]))
            if decision.limit < lease.limit or (decision.limit > lease.limit and lease.waits):
                lease.is_asking, lease.next_ask = True, 0.0
            lease.apply()
            self._look_after(leases, lease, began)
        if lost := [lease for server, lease in held.items() if server not in renewed]:
            await self._start_again(lost)

    def _decide(self, lease: Lease, leases: ServerLeases, position: int, *, keep: int | None = None) -> Decision:
        claims = leases.claims
        claims[position] = Claim(claims[position].granted, lease.wanted)
        if keep is not None:
            keep = max(keep, FIRST, lease.open)
        # while it renews, it gives back; it takes more when it is asked to
        take = lease.desired if keep is None else 0
        return decide(leases.cap, claims, position, keep=keep, take=take)

    async def _change(self, lease: Lease) -> None:
        """Get more connections of a server, or give some back, as the other processes' needs have it."""
        if not lease.is_registered:
            await self._register({lease.server: None})
            if not lease.is_registered:
                return
        try:
            await self._change_registered(lease)
        except _LostError:
            # not before the lock on the row of the cap is gone, which it takes again
            await self._start_again([lease])

    async def _change_registered(self, lease: Lease) -> None:
        began = clock()
        asked = False
        try:
            async with self._control.transaction() as connection:
                await rows.lock_cap(connection, lease.server)
                leases = (await rows.read(connection, [lease.server]))[lease.server]
                if (position := leases.position(lease.process)) is None:
                    raise _LostError
                lease.learn(cap=leases.cap, processes=len(leases.leases), max_opening=leases.max_opening)
                asked, lease.is_full = lease.is_full, False
                needs = asked or lease.waits
                decision = self._decide(lease, leases, position, keep=None if needs else lease.remember(lease.wanted))
                # first nothing is opened above the new limit, and then the row says so
                before = leases.leases[position].granted
                lease.limit = min(lease.limit, decision.limit)
                lease.apply()
                granted = max(decision.limit, lease.held)
                if not await rows.grant(connection, lease.server, granted, lease.demand(lease.wanted)):
                    raise _LostError
                called = decision.debtors if granted < decision.share else ()
                if granted < before:
                    called += decision.creditors
                if called:
                    await rows.call(connection, lease.server, [leases.leases[other].process for other in called])
        except BaseException:
            lease.is_full = lease.is_full or asked
            raise
        grown = granted > before
        lease.granted, lease.limit = granted, decision.limit
        self._restored(lease, began)
        self._after_change(lease, grown)
        self._look_after(leases, lease, began)

    def _after_change(self, lease: Lease, grown: bool) -> None:
        now = clock()
        if lease.limit >= lease.granted:
            lease.shrinking_since = None
        elif lease.shrinking_since is None:
            lease.shrinking_since = now
        elif now - lease.shrinking_since > RECALL_SECONDS and lease.open > lease.limit:
            lease.shrinking_since = now
            self._care.start("recall", lease.server, self._recall(lease))
        # who asked after this look had begun is served by the next one
        lease.is_asking = lease.waits or lease.is_full
        lease.pause = _FIRST_PAUSE if grown else min(max(_FIRST_PAUSE, lease.pause * 2), RENEW_SECONDS)
        lease.next_ask = now + lease.pause
        lease.apply()

    async def _start_again(self, lost: Sequence[Lease]) -> None:
        """Get leases under other ids: others were given what this process had, and have ended its connections."""
        for lease in lost:
            logger.warning(
                "this process did not renew its lease of connections to server %s in time; others have ended its "
                "connections",
                lease.server,
            )
            lease.lose()
        await self._register({lease.server: None for lease in lost})

    # --- this process is cut off ------------------------------------------------------------------------------------

    def _check_clock(self) -> None:
        """Go back to the guaranteed part before the leases expire, and to nothing if they have."""
        now = clock()
        for lease in self._leases.values():
            # one that was stopped for a while tries to renew its leases first
            lease.is_over = self._failing and not lease.is_valid
            if not lease.is_registered:
                continue
            since = now - (lease.valid_until - LEASE_SECONDS)
            if since < CUT_OFF_SECONDS:
                continue
            if not lease.is_cut_off:
                lease.is_cut_off = True
                kept = min(lease.granted, lease.guaranteed)
                logger.warning(
                    "the leases of connections to server %s cannot be renewed; this process keeps %d of %d",
                    lease.server,
                    kept,
                    lease.granted,
                )
                self._events.emit(ConnectionLeaseLost(server=lease.server, limit=kept))
            lease.apply()
            # after that others may have begun to end its connections, so the lock would prove nothing
            if lease.server not in self._proofs and now < lease.valid_until:
                self._care.start("proof", lease.server, self._prove(lease))
            if since > END_SECONDS and self._failing and lease.open > lease.allowed:
                self._care.start("recall", lease.server, self._recall(lease))

    async def _prove(self, lease: Lease) -> None:
        """Hold a lock on the server, which shows the others that this process lives while the leases expire."""
        async with usage.administration(self._servers[lease.server]) as connection:
            if not await try_lock(connection, usage.presence_key(lease.process)):
                return  # another process has found it, and ends its connections
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _: lost.set())
            if connection.is_closed() or not (lease.is_cut_off and clock() < lease.valid_until):
                return  # too late, or not necessary any more
            self._proofs[lease.server] = connection
            lease.is_present = True
            try:
                await lost.wait()
            finally:
                # unless `_restored` has ended it: then there may be another one
                if self._proofs.get(lease.server) is connection:
                    del self._proofs[lease.server]
                    lease.is_present = False
            self._check_clock()

    async def _recall(self, lease: Lease) -> None:
        """End connections of this process that are still in use above its limit."""
        server = self._servers[lease.server]
        async with usage.administration(server) as connection:
            await usage.end_tagged(connection, lease.tag, keep=lease.allowed, timeout=LEASE_SECONDS)


async def read_leases(control: ControlDatabase) -> list[ServerLeases]:
    """Return who has how many connections of which server, by the servers' names: for a tool without leases.

    Raises:
        ControlUnavailableError: the control database does not answer.
    """
    async with control.connect() as connection:
        return await rows.read_all(connection)


def _warn_of_cap(server: str, cap: int, processes: int) -> None:
    if cap < processes:
        logger.warning(
            "the cap of server %s is %d connections, and %d processes share it: some have none of their own, and "
            "borrow from the others; raise the cap (tenancy servers update --max-connections), or run fewer processes",
            server,
            cap,
            processes,
        )


class _LostError(Exception):
    """Ends a transaction: this process has no lease that it could change."""


def _ignore(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


__all__ = ["FIRST", "RECALL_SECONDS", "RENEW_SECONDS", "ConnectionLeases", "read_leases"]
