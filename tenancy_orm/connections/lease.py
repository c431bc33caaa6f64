"""``Lease``: this process's part of the connections to one server, and the budgets that it is the limit of.

State alone, in one event loop. A checkout looks at its budget's own limit and at nothing here.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Protocol
from uuid import UUID, uuid4
from weakref import ReferenceType, ref

from ..deadlines import clock
from .rows import LEASE_SECONDS, Demand, tag_of
from .shares import HEADROOM, LEAST

CUT_OFF_SECONDS = LEASE_SECONDS / 2
"""How long a process goes on without renewing its lease before it goes back to its guaranteed part."""

END_SECONDS = LEASE_SECONDS * 0.7
"""After how long it ends connections in use above that part: before the lease expires, when others may get them."""

MAX_OPENING = 16
"""How many connections one process opens at once to a server that has no bound of its own."""

IN_VAIN_SECONDS = 0.2
"""The pause between two attempts to get more connections after which it is known that there are none now."""

_LOOK_SECONDS = 0.02  # the pause between two looks at whether it has got some

_REMEMBERED = 5  # renewals, over which the need of a process is remembered


class Limited(Protocol):
    """What a lease needs of a budget."""

    limit: int
    reachable: int
    open: int
    idle: int
    closing: int
    on_full: Callable[[], None] | None

    @property
    def wanted(self) -> int:
        """How many more connections its waiters could use."""

    def resize(self, limit: int, *, max_opening: int | None = None) -> None:
        """Change its limit, and how many connections may be opened at once."""


class Lease:
    """This process's part of the connections to one server.

    Args:
        server: The server's name.
        at_most: How many of them this process may have at most; None is all.
        on_need: Called when waiters need more than it has.

    Attributes:
        process: The id of this process in the lease. It has another one in each: two servers may be one cluster by two
            names, and there the connections to one are none of the other's.
        cap: How many all processes may have, as far as is known.
        processes: How many processes share them.
        granted: How many this process was granted.
        limit: How many of them it uses: fewer, while it is giving some back.
        guaranteed: How many of them it keeps while it cannot reach the control database.
        valid_until: When the lease expires, in seconds of ``clock``: not later than it does by the database's clock.
        is_cut_off: Whether it could not be renewed for some time.
        is_present: Whether this process proves on the server itself that it lives.
        is_over: Whether it has expired, and could not be renewed since: nobody waits for a connection.
        was_cut: Whether connections in use were cut: PostgreSQL may still run their statements.
    """

    def __init__(self, server: str, *, at_most: int | None, on_need: Callable[[Lease], None]) -> None:
        self.server = server
        self.process: UUID = uuid4()
        self.at_most = at_most
        self.cap = 0
        self.processes = 1
        self.granted = 0
        self.limit = 0
        self.guaranteed = 0
        self.next_guaranteed = 0  # written with the next renewal, and in force after it
        self.max_opening: int | None = None  # of all processes
        self.valid_until = -math.inf
        self.is_registered = False
        self.is_cut_off = False
        self.is_present = False
        self.is_over = False
        self.was_cut = False
        self.is_asking = False
        self.is_full = False
        self.is_miscounted = False
        self.next_ask = 0.0
        self.pause = 0.0
        self.shrinking_since: float | None = None
        self._on_need = on_need
        # the last is in use; the earlier ones are of replaced servers, and may have connections left
        self._budgets: list[ReferenceType[Limited]] = []
        self._wanted: deque[int] = deque(maxlen=_REMEMBERED)

    # --- what a connector asks --------------------------------------------------------------------------------------

    @property
    def tag(self) -> str:
        """What the ``application_name`` of the connections that are opened now ends in."""
        return tag_of(self.process)

    @property
    def is_valid(self) -> bool:
        """Whether connections may be opened now."""
        return self.is_present or clock() < self.valid_until

    @property
    def most(self) -> int:
        """How many connections this process may have if the others need none."""
        return self.cap if self.at_most is None else min(self.cap, self.at_most)

    @property
    def borrowed(self) -> int:
        """How many it has beyond its guaranteed part."""
        return max(0, self.granted - self.guaranteed)

    def attach(self, budget: Limited) -> None:
        """Be the limit of a budget from now on; the budgets before it keep what they have open."""
        budget.on_full = self._full
        self._budgets.append(ref(budget))
        self.apply()

    async def ask(self, *, timeout: float) -> bool:
        """Ask for further connections that are free, and return whether there were some; others give none back."""
        before = self.limit
        self._full()
        deadline = clock() + timeout
        while self.limit <= before:
            if not self.is_asking or clock() >= deadline:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    def recount(self) -> None:
        """Have the connections of others counted soon: the server accepts fewer than the cap says."""
        if not self.is_miscounted:
            self.is_miscounted = True
            self._on_need(self)

    def explain(self, limit: int) -> str:
        """Say which setting to change where the ``limit`` of a budget is too small."""
        if self.at_most is not None and limit >= self.at_most:
            return "pool.max_connections"
        cap = f"the cap of server {self.server!r}, which is {self.cap} connections for all processes together"
        if self.is_cut_off:
            return f"{cap}; this process is cut off from the control database, and gets no more until that answers"
        if limit or self.processes <= self.cap:
            return f"{cap} (tenancy servers connections shows them)"
        return f"{cap}, or start fewer: there are {self.processes} processes (tenancy servers connections shows them)"

    def _full(self) -> None:
        self.is_full = True
        if not self.is_asking:
            self.is_asking = True
            self._on_need(self)

    # --- what is open and needed ------------------------------------------------------------------------------------

    @property
    def budgets(self) -> list[Limited]:
        """The budgets that still exist, the one in use last."""
        found = [(known, budget) for known in self._budgets if (budget := known()) is not None]
        self._budgets = [known for known, _ in found]
        return [budget for _, budget in found]

    @property
    def open(self) -> int:
        """How many connections are open, being opened or being closed."""
        return sum(budget.open for budget in self.budgets)

    @property
    def held(self) -> int:
        """How many connections there may be until the limit is changed again."""
        return max(self.allowed, self.open)

    @property
    def in_use(self) -> int:
        """How many connections are in use or being opened."""
        return sum(budget.open - budget.idle - budget.closing for budget in self.budgets)

    @property
    def waits(self) -> bool:
        """Whether somebody waits for a connection that this process does not have."""
        return any(budget.wanted > budget.limit - budget.open + budget.closing for budget in self.budgets)

    @property
    def wanted(self) -> int:
        """How many connections this process needs now."""
        need = max(LEAST, self.in_use + sum(budget.wanted for budget in self.budgets))
        return need if self.at_most is None else min(need, self.at_most)

    @property
    def desired(self) -> int:
        """How many it takes if they are free: idle connections spare logins."""
        most = max(self.wanted + HEADROOM, self.open + max(HEADROOM, self.open // 2))
        return most if self.at_most is None else min(most, self.at_most)

    def remember(self, wanted: int) -> int:
        """Note what is needed, and return the most that was needed lately."""
        self._wanted.append(wanted)
        return max(self._wanted)

    def demand(self, wanted: int) -> Demand:
        """What this process says of itself when it renews the lease."""
        return Demand(self.process, self.next_guaranteed, wanted, self.in_use)

    # --- the limit --------------------------------------------------------------------------------------------------

    @property
    def allowed(self) -> int:
        """How many connections this process may have now."""
        if not self.is_valid:
            return 0
        limit = min(self.limit, self.granted)
        if self.is_cut_off:
            limit = min(limit, self.guaranteed)
        return limit if self.at_most is None else min(limit, self.at_most)

    def apply(self) -> None:
        """Bring the budgets' limits in line."""
        budgets = self.budgets
        if not budgets:
            return
        left = self.allowed
        opening = self.max_opening
        share = MAX_OPENING if opening is None else max(1, opening // max(1, self.processes))
        for former in budgets[:-1]:
            limit = min(left, former.open + former.wanted)
            left -= max(limit, former.open)
            former.resize(limit, max_opening=share)
        # where it was asked for in vain for some time, there are no more
        in_vain = self.is_cut_off or self.pause > IN_VAIN_SECONDS
        budgets[-1].reachable = 0 if in_vain else self.most
        budgets[-1].resize(max(0, left), max_opening=share)

    def renewed(self, began: float) -> None:
        """Record that the control database has renewed the lease; the statement was sent at ``began``."""
        self.valid_until = max(self.valid_until, began + LEASE_SECONDS)
        self.is_over = False
        self.guaranteed = self.next_guaranteed

    def learn(self, *, cap: int, processes: int, max_opening: int | None) -> None:
        """Take over what is known of all processes. A guaranteed part that is smaller is in force at once."""
        self.cap, self.processes, self.max_opening = cap, max(1, processes), max_opening
        self.next_guaranteed = cap // self.processes
        self.guaranteed = min(self.guaranteed, self.next_guaranteed)

    def lose(self) -> None:
        """Record that others may have what this process had. What it gets from now on, it has under another id."""
        self.process = uuid4()
        self.granted = self.limit = self.guaranteed = 0
        self.valid_until = -math.inf
        self.is_registered = self.is_present = False
        self.apply()


__all__ = ["CUT_OFF_SECONDS", "END_SECONDS", "MAX_OPENING", "Lease", "Limited"]
