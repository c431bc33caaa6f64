"""How the connections of a server are divided: never above the cap, fair, and nothing left unused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenancy_orm.connections.shares import LEAST, UNKNOWN_CAP, Claim, cap_of, decide, fair_shares
from tenancy_orm.connections.usage import tagged


def test_the_cap_is_the_row_s_or_what_the_server_has_left() -> None:
    """The server's row wins; otherwise others' connections and a margin are taken from what the server accepts."""
    assert cap_of(97, 10, 40) == 40
    assert cap_of(97, 10, None) == 97 - 10 - 10
    assert cap_of(97, None, None) == 97 - 10 - 10, "before the others were counted, there are as many as the margin"
    assert cap_of(17, 4, None) == 17 - 4 - 3
    assert cap_of(5, 50, None) == 1
    assert cap_of(None, None, None) == UNKNOWN_CAP


@given(st.integers(0, 200), st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_shares_are_fair(cap: int, wanted: list[int]) -> None:
    """Nobody gets more than it wants or less than its guaranteed part, and nothing that somebody wants is left."""
    shares = fair_shares(cap, wanted)
    assert sum(shares) == min(cap, sum(wanted))
    assert all(min(want, cap // len(wanted)) <= share <= want for share, want in zip(shares, wanted, strict=True))
    most = max(shares)
    assert all(share == want or share >= most - 1 for share, want in zip(shares, wanted, strict=True))


def test_one_busy_process_has_nearly_all_and_an_added_one_gets_its_part() -> None:
    """Idle processes keep one connection each; a new one that needs many is owed its share by those above theirs."""
    idle = Claim(LEAST, LEAST)
    claims = [Claim(5, 200), *[idle] * 7]
    assert decide(80, claims, 0).limit == 73
    claims = [Claim(73, 200), *[idle] * 6, Claim(1, 200)]
    added, busy = decide(80, claims, 7), decide(80, claims, 0)
    assert (added.limit, added.share, added.debtors) == (1, 37, (0,))
    assert (busy.limit, busy.share, busy.creditors) == (37, 37, (7,))
    claims[0] = Claim(37, 200)
    assert decide(80, claims, 7).limit == 37


def test_where_there_are_more_processes_than_connections_the_oldest_have_one() -> None:
    """An added process gets none, and takes none."""
    assert fair_shares(3, [1, 1, 1, 1, 1]) == [1, 1, 1, 0, 0]
    claims = [*[Claim(1, 9)] * 3, Claim(0, 1)]
    assert [decide(3, claims, own).limit for own in range(4)] == [1, 1, 1, 0]


def test_a_long_application_name_leaves_room_for_the_tag() -> None:
    """PostgreSQL cuts a name after 63 bytes, which must not be the tag's."""
    assert tagged("shop/tenancy", "0123456789ab") == "shop/tenancy/0123456789ab"
    name = tagged("ü" * 80, "0123456789ab")
    assert (len(name.encode()), name[-13:]) == (63, "/0123456789ab")


@dataclass
class Process:
    """What one process knows and holds. ``granted`` is in the row, ``limit`` its own, ``known`` what it was granted."""

    granted: int = 0
    limit: int = 0
    known: int = 0
    guaranteed: int = 0
    open: int = 0
    wanted: int = LEAST
    expired: bool = False
    cut: bool = False
    present: bool = False

    @property
    def allowed(self) -> int:
        if self.expired and not self.present:
            return 0
        limit = min(self.limit, self.known)
        return min(limit, self.guaranteed) if self.cut else limit


class CapMachine(RuleBasedStateMachine):
    """However processes open, close, ask, die, are cut off or stopped: they never have more than the cap together.

    A connection of a process that is stopped stays open until another process has ended it.
    """

    CAP, MOST = 12, 4

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process] = []
        self.start()
        self.start()

    def some(self, data: st.DataObject, *, reachable: bool | None = None) -> Process | None:
        found = [one for one in self.processes if reachable is None or reachable is not one.cut]
        return data.draw(st.sampled_from(found)) if found else None

    @precondition(lambda self: len(self.processes) < self.MOST)
    @rule()
    def start(self) -> None:
        free = self.CAP - sum(one.granted for one in self.processes)
        first = max(0, min(free, 5))
        part = self.CAP // (len(self.processes) + 1)
        self.processes.append(Process(granted=first, limit=first, known=first, guaranteed=part))

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        if (one := self.some(data)) is not None and one.open < one.allowed:
            one.open = one.allowed

    @rule(data=st.data(), left=st.integers(0, 3))
    def close(self, data: st.DataObject, left: int) -> None:
        if (one := self.some(data)) is not None:
            one.open = min(one.open, left)

    @rule(data=st.data(), wanted=st.sampled_from([LEAST, 4, 20]), lost=st.booleans())
    def change(self, data: st.DataObject, wanted: int, lost: bool) -> None:
        """Ask for more or give back; ``lost``: the answer does not arrive, and whether it was done is unknown."""
        one = self.some(data, reachable=True)
        if one is None or one.expired:
            return
        one.wanted = wanted
        claims = [
            Claim(other.granted, min(other.wanted, other.granted) if other.expired else other.wanted)
            for other in self.processes
        ]
        decision = decide(self.CAP, claims, self.processes.index(one))
        part = self.CAP // len(self.processes)
        one.guaranteed = min(one.guaranteed, part)
        one.limit = min(one.limit, decision.limit)
        one.granted = max(decision.limit, one.allowed, one.open)
        if not lost:
            one.known, one.limit, one.guaranteed = one.granted, decision.limit, part

    @rule(data=st.data(), expires=st.booleans(), proves=st.booleans())
    def cut_off(self, data: st.DataObject, expires: bool, proves: bool) -> None:
        """It cannot reach the control database. Its lease may expire, and it may have proved before that it lives."""
        if (one := self.some(data, reachable=True)) is not None:
            one.cut, one.expired, one.present = True, expires, expires and proves

    @rule(data=st.data(), returns=st.booleans())
    def reclaim(self, data: st.DataObject, returns: bool) -> None:
        """Another process looks after a lost one, and ends what that may not have; the lost one may return then."""
        one = self.some(data, reachable=False)
        if one is None:
            return
        if one.present:
            kept = min(one.granted, one.guaranteed)
            one.open, one.granted = min(one.open, kept), kept
        elif one.expired:
            self.processes.remove(one)
            return
        if returns:
            self.returned(one)

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """It renews its lease, before anybody has looked after it."""
        if (one := self.some(data, reachable=False)) is not None:
            self.returned(one)

    def returned(self, one: Process) -> None:
        """It reads in its row what it still has."""
        one.cut = one.expired = one.present = False
        one.known = min(one.known, one.granted)
        one.limit = min(one.limit, one.known)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if (one := self.some(data)) is not None:
            self.processes.remove(one)

    @invariant()
    def the_cap_holds(self) -> None:
        assert sum(one.granted for one in self.processes) <= self.CAP
        assert sum(max(one.open, one.allowed) for one in self.processes) <= self.CAP
        assert all(max(one.open, one.allowed) <= one.granted for one in self.processes)


CapMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestCapMachine: Any = pytest.mark.timeout(120)(CapMachine.TestCase)
