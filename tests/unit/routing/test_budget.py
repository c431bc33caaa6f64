"""The budget: never more slots than there are, fair between tenants, and the least valuable connection goes first."""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenancy_orm.routing.budget import KEEP_SECONDS, Budget, Share


class Seat:
    """A waiter without an event loop."""

    def __init__(self) -> None:
        self.served: list[str | None] = []
        self.left = False

    def done(self) -> bool:
        return bool(self.served) or self.left

    def set_result(self, item: str | None, /) -> None:
        assert not self.done(), "served twice, or after it left"
        self.served.append(item)

    def set_exception(self, error: BaseException, /) -> None:
        raise AssertionError(error)


class Clock:
    """Tells what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(limit: int = 3, per_tenant: int = 3, clock: Clock | None = None) -> tuple[Budget[str], list[str]]:
    evicted: list[str] = []

    def evict(share: Share[str], item: str) -> None:
        budget.discard(share)
        evicted.append(item)

    budget: Budget[str] = Budget(limit, per_tenant, evict, clock=clock or Clock())
    return budget, evicted


def share_of(budget: Budget[str], number: int) -> Share[str]:
    return budget.share(UUID(int=number))


def connect(budget: Budget[str], share: Share[str]) -> None:
    assert budget.reserve(share)
    budget.opened()


def seat(budget: Budget[str], share: Share[str]) -> Seat:
    waiter = Seat()
    budget.wait(share, waiter)
    return waiter


def test_there_are_no_more_slots_than_the_limit() -> None:
    """When all slots are taken, every tenant is refused another one."""
    budget, _ = make(limit=2)
    a, b = share_of(budget, 1), share_of(budget, 2)
    connect(budget, a)
    connect(budget, b)
    assert not budget.reserve(a)
    assert not budget.reserve(share_of(budget, 3))


def test_a_tenant_gets_no_more_than_its_part() -> None:
    """A tenant at its own limit gets no slot, even if the server has free ones."""
    budget, _ = make(limit=5, per_tenant=2)
    a = share_of(budget, 1)
    connect(budget, a)
    connect(budget, a)
    assert not budget.reserve(a)
    assert budget.reserve(share_of(budget, 2))


def test_two_pools_of_one_tenant_have_one_part() -> None:
    """While a tenant's engine is replaced, the connections of both engines count."""
    budget, _ = make(limit=5, per_tenant=2)
    old, new = share_of(budget, 1), share_of(budget, 1)
    connect(budget, old)
    connect(budget, new)
    assert not budget.reserve(old)
    assert not budget.reserve(new)


def test_the_connection_that_came_to_rest_last_is_taken_first() -> None:
    """The connection returned last is reused, so that unneeded ones expire."""
    budget, _ = make()
    a = share_of(budget, 1)
    connect(budget, a)
    connect(budget, a)
    budget.put(a, "first", 1.0)
    budget.put(a, "second", 2.0)
    assert budget.take(a) == (2.0, "second")
    assert budget.take(a) == (1.0, "first")
    assert budget.take(a) is None


def test_a_returned_connection_serves_the_own_tenant_in_order_of_arrival() -> None:
    """A tenant's waiters are served in the order in which they came."""
    budget, _ = make(limit=1)
    a = share_of(budget, 1)
    connect(budget, a)
    first, second = seat(budget, a), seat(budget, a)
    budget.put(a, "c", 1.0)
    assert (first.served, second.served) == (["c"], [])
    budget.put(a, "c", 2.0)
    assert second.served == ["c"]


def test_an_idle_connection_of_another_tenant_makes_room() -> None:
    """A waiter gets the slot of another tenant's idle connection once its socket is closed, and not before."""
    budget, evicted = make(limit=1)
    a, b = share_of(budget, 1), share_of(budget, 2)
    connect(budget, a)
    budget.put(a, "a's", 1.0)
    waiter = seat(budget, b)
    assert evicted == ["a's"]
    assert waiter.served == []
    budget.closed(a)
    assert waiter.served == [None]
    assert budget.statistics().evictions == 1


def test_one_waiter_costs_one_connection() -> None:
    """Nothing is closed for a waiter that another closing connection will serve."""
    budget, evicted = make(limit=3)
    a, b = share_of(budget, 1), share_of(budget, 2)
    for name in ("x", "y", "z"):
        connect(budget, a)
        budget.put(a, name, 1.0) if name != "z" else None
    budget.put(a, "z", 1.0)
    seat(budget, b)
    assert len(evicted) == 1
    seat(budget, b)
    assert len(evicted) == 2


def test_the_tenant_with_the_fewest_recent_checkouts_gives_way() -> None:
    """A tenant that was used once does not evict one that is used all the time."""
    budget, evicted = make(limit=2)
    busy, rare, new = (share_of(budget, number) for number in (1, 2, 3))
    for _ in range(5):
        budget.touch(busy)
    connect(budget, busy)
    budget.put(busy, "busy", 1.0)
    budget.touch(rare)
    connect(budget, rare)
    budget.put(rare, "rare", 2.0)  # used last: by age alone the busy one would go
    budget.touch(new)
    seat(budget, new)
    assert evicted == ["rare"]


def test_old_checkouts_count_for_less() -> None:
    """The connection of a tenant that was busy long ago is evicted before that of one that is busy now."""
    budget, evicted = make(limit=2)
    past, present, new = (share_of(budget, number) for number in (1, 2, 3))
    for _ in range(50):
        budget.touch(past)
    for _ in range(1_000):
        budget.touch(present)
        budget.touch(share_of(budget, 9))
    for share, name in ((past, "past"), (present, "present")):
        connect(budget, share)
        budget.put(share, name, 1.0)
    seat(budget, new)
    assert evicted == ["past"]


def test_a_second_connection_is_worth_less_than_a_first() -> None:
    """A tenant twice as busy, with three connections, loses one before another loses its only one."""
    budget, evicted = make(limit=4)
    many, one, new = (share_of(budget, number) for number in (1, 2, 3))
    for _ in range(2):
        budget.touch(many)
    budget.touch(one)
    for _ in range(3):
        connect(budget, many)
    for name in ("m1", "m2", "m3"):
        budget.put(many, name, 1.0)
    connect(budget, one)
    budget.put(one, "one", 0.0)
    seat(budget, new)
    assert evicted == ["m1"]


def test_who_holds_less_is_served_first() -> None:
    """A single request is not delayed by another tenant's many requests."""
    budget, evicted = make(limit=2)
    loud, quiet = share_of(budget, 1), share_of(budget, 2)
    connect(budget, loud)
    connect(budget, loud)
    crowd = [seat(budget, loud) for _ in range(10)]
    single = seat(budget, quiet)
    budget.put(loud, "c", 1.0)
    assert evicted == ["c"]
    assert not any(waiter.served for waiter in crowd)
    budget.closed(loud)
    assert single.served == [None]


def test_tenants_with_equal_parts_keep_their_connections() -> None:
    """If all tenants have the same number of connections, none is closed for fairness."""
    budget, evicted = make(limit=2)
    a, b = share_of(budget, 1), share_of(budget, 2)
    connect(budget, a)
    connect(budget, b)
    waiters = [seat(budget, share) for share in (a, b, a, b)]
    for name, share in (("a", a), ("b", b), ("a", a), ("b", b)):
        budget.put(share, name, 1.0)
    assert evicted == []
    assert [waiter.served for waiter in waiters] == [["a"], ["b"], ["a"], ["b"]]


def test_more_tenants_than_slots_take_turns() -> None:
    """Ten tenants with one slot are served equally often, where each needs it for equally long."""
    clock = Clock()
    budget, evicted = make(limit=1, clock=clock)
    shares = [share_of(budget, number) for number in range(10)]
    connect(budget, shares[0])
    holder = shares[0]
    waiters = {share: [seat(budget, share) for _ in range(4)] for share in shares}
    served: list[Share[str]] = [holder]
    for _ in range(20):
        clock.now += 0.1
        budget.put(holder, "c", clock.now)
        if evicted:
            evicted.clear()
            budget.closed(holder)
        before = len(served)
        for share, queue in waiters.items():
            if queue and queue[0].served:
                if queue.pop(0).served == [None]:
                    budget.opened()
                served.append(share)
                holder = share
        assert len(served) == before + 1
    assert set(Counter(served).values()) == {2, 3}


def test_a_waiter_that_left_is_passed_over() -> None:
    """A cancelled waiter that is still in the queue is skipped."""
    budget, _ = make(limit=1)
    a = share_of(budget, 1)
    connect(budget, a)
    gone, here = seat(budget, a), seat(budget, a)
    gone.left = True
    budget.put(a, "c", 1.0)
    assert here.served == ["c"]
    budget.withdraw(a, gone)
    assert budget.statistics().waiting == 0


def test_a_failed_connect_gives_its_slot_to_the_next() -> None:
    """The slot of a failed connect goes to the next waiter."""
    budget, _ = make(limit=1)
    a, b = share_of(budget, 1), share_of(budget, 2)
    assert budget.reserve(a)
    waiter = seat(budget, b)
    budget.failed(a)
    assert waiter.served == [None]


def test_what_rested_too_long_is_found() -> None:
    """Connections that were returned before a given time are taken."""
    budget, _ = make()
    a, b = share_of(budget, 1), share_of(budget, 2)
    for share, name, now in ((a, "old", 1.0), (a, "new", 5.0), (b, "older", 0.5)):
        connect(budget, share)
        budget.put(share, name, now)
    assert sorted(item for _, item in budget.take_expired(2.0)) == ["old", "older"]
    assert budget.statistics().idle == 1


def test_a_refused_tenant_waits_and_tries_with_one() -> None:
    """While PostgreSQL refuses a tenant it gets no slot; one waiter tries again, and the others follow it."""
    budget, _ = make(limit=5, per_tenant=4)
    a, b = share_of(budget, 1), share_of(budget, 2)
    connect(budget, a)
    assert budget.reserve(a)
    budget.failed(a, refused=True)
    assert not budget.reserve(a)
    assert budget.reserve(b), "other tenants are not affected"
    later = [seat(budget, a), seat(budget, a)]
    first = Seat()
    budget.wait(a, first, first=True)
    budget.retry(a.account)
    assert first.served == [None]
    assert [one.served for one in later] == [[], []]
    budget.opened()
    budget.accepted(a.account)
    assert [one.served for one in later] == [[None], [None]]


def test_a_promised_connection_is_not_returned() -> None:
    """The next connection that comes back is for another process, and so is its slot, until the next try."""
    budget, _ = make(limit=5, per_tenant=2)
    a = share_of(budget, 1)
    connect(budget, a)
    connect(budget, a)
    waiter = seat(budget, a)
    a.account.promised = 2.0
    assert not budget.put(a, "first", 1.0)
    budget.discard(a)
    budget.closed(a)
    assert waiter.served == []
    assert budget.put(a, "second", 1.0)
    assert waiter.served == ["second"]
    assert not budget.reserve(a)
    budget.retry(a.account)
    assert budget.reserve(a)


def test_a_promise_ends() -> None:
    """A connection that is returned later stays."""
    budget, _ = make()
    a = share_of(budget, 1)
    connect(budget, a)
    a.account.promised = 2.0
    assert budget.put(a, "c", 2.0)
    assert budget.statistics().idle == 1


def test_a_larger_limit_serves_waiters_at_once() -> None:
    """Waiters get the slots that a larger limit adds."""
    budget, _ = make(limit=1)
    a = share_of(budget, 1)
    connect(budget, a)
    first, second = seat(budget, a), seat(budget, share_of(budget, 2))
    budget.resize(2)
    assert (first.served, second.served) == ([], [None])
    budget.resize(3)
    assert first.served == [None]


def test_a_smaller_limit_closes_idle_connections_now_and_busy_ones_when_they_are_returned() -> None:
    """The least valuable idle connections are closed at once; a busy one above the limit serves no further waiter."""
    budget, evicted = make(limit=4, per_tenant=4)
    a, b = share_of(budget, 1), share_of(budget, 2)
    for share in (a, a, b, b):
        connect(budget, share)
    budget.touch(a)
    budget.put(a, "a1", 1.0)
    budget.put(b, "b1", 1.0)
    budget.resize(3)
    assert (evicted, budget.excess) == (["b1"], 0)
    budget.resize(1)
    assert (evicted, budget.excess) == (["b1", "a1"], 1)
    waiter = seat(budget, b)
    budget.put(b, "b2", 2.0)
    assert (evicted, budget.excess, waiter.served) == (["b1", "a1", "b2"], 0, [])
    for share in (b, a, b):
        budget.closed(share)
    assert waiter.served == [], "the one slot is in use"
    budget.put(a, "a2", 3.0)
    budget.closed(a)
    assert waiter.served == [None]


def test_no_more_connections_are_opened_at_once_than_allowed() -> None:
    """Waiters get free slots one after the other, as openings end, and no idle connection is closed for them."""
    budget, evicted = make(limit=5)
    a, b = share_of(budget, 1), share_of(budget, 2)
    connect(budget, a)
    budget.put(a, "idle", 1.0)
    budget.resize(5, max_opening=1)
    assert budget.reserve(b)
    waiters = [seat(budget, share_of(budget, number)) for number in (3, 4)]
    budget.opened()
    assert [waiter.served for waiter in waiters] == [[None], []]
    budget.failed(share_of(budget, 3))
    assert [waiter.served for waiter in waiters] == [[None], [None]]
    assert evicted == []


class BudgetMachine(RuleBasedStateMachine):
    """After any sequence of events all counts are correct, and no waiter waits while a slot or connection is free."""

    LIMIT, PER_TENANT, TENANTS = 4, 2, 6

    def __init__(self) -> None:
        super().__init__()
        self.closing: list[Share[str]] = []
        self.budget: Budget[str] = Budget(self.LIMIT, self.PER_TENANT, self._evict, clock=lambda: self.now)
        self.limit, self.max_opening = self.LIMIT, self.LIMIT
        self.open_before = self.opening_before = 0
        self.now = 0.0
        # two of them are of one tenant
        tenants = (0, 0, *range(1, self.TENANTS - 1))
        self.shares = [self.budget.share(UUID(int=number), weight=0.5 + number) for number in tenants]
        self.opening: list[Share[str]] = []
        self.used: list[tuple[Share[str], str]] = []
        self.waiting: list[tuple[Share[str], Seat]] = []
        self.names = iter(range(10**9))
        self.promised = 0.0

    def _evict(self, share: Share[str], item: str) -> None:
        self.budget.discard(share)
        self.closing.append(share)

    def _collect(self) -> None:
        for share, waiter in list(self.waiting):
            if waiter.served:
                self.waiting.remove((share, waiter))
                item = waiter.served[0]
                if item is None:
                    self.opening.append(share)
                else:
                    self.used.append((share, item))

    @rule(number=st.integers(0, TENANTS - 1))
    def ask(self, number: int) -> None:
        share = self.shares[number]
        self.budget.touch(share)
        entry = self.budget.take(share)
        if entry is not None:
            self.used.append((share, entry[1]))
        elif self.budget.reserve(share):
            self.opening.append(share)
        else:
            self.waiting.append((share, seat(self.budget, share)))
        self._collect()

    @precondition(lambda self: self.opening)
    @rule(data=st.data(), fails=st.booleans(), refused=st.booleans())
    def finish_opening(self, data: st.DataObject, fails: bool, refused: bool) -> None:
        share = self.opening.pop(data.draw(st.integers(0, len(self.opening) - 1)))
        if fails:
            self.budget.failed(share, refused=refused)
        else:
            self.budget.opened()
            self.budget.accepted(share.account)
            self.used.append((share, f"c{next(self.names)}"))
        self._collect()

    @precondition(lambda self: self.used)
    @rule(data=st.data(), broken=st.booleans())
    def give_back(self, data: st.DataObject, broken: bool) -> None:
        share, item = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.now += data.draw(st.sampled_from((0.01, 0.3, 2.0)))
        if broken:
            self.budget.discard(share)
            self.closing.append(share)
        elif not self.budget.put(share, item, self.now):
            assert self.now < self.promised
            self.budget.discard(share)
            self.closing.append(share)
        self._collect()

    @rule(limit=st.integers(0, LIMIT + 2), max_opening=st.none() | st.integers(1, 3))
    def resize(self, limit: int, max_opening: int | None) -> None:
        self.limit, self.max_opening = limit, limit if max_opening is None else max_opening
        self.budget.resize(limit, max_opening=max_opening)
        self._collect()

    @rule(number=st.integers(0, TENANTS - 1))
    def retry(self, number: int) -> None:
        self.budget.retry(self.shares[number].account)
        self._collect()

    @rule(number=st.integers(0, TENANTS - 1), keep=st.integers(0, 1))
    def give_up(self, number: int, keep: int) -> None:
        account = self.shares[number].account
        taken = self.budget.take_for_others(account, keep=keep)
        for share, _ in taken:
            self.budget.discard(share)
            self.closing.append(share)
        if not taken and not keep:
            self.promised = account.promised = self.now + 3

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def finish_closing(self, data: st.DataObject) -> None:
        self.budget.closed(self.closing.pop(data.draw(st.integers(0, len(self.closing) - 1))))
        self._collect()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        share, waiter = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        waiter.left = True
        self.budget.withdraw(share, waiter)

    @rule()
    def look(self) -> None:
        self.now += 2 * KEEP_SECONDS
        assert self.budget.look() == [], "nobody has a deadline"
        self._collect()
        self._nobody_waits({share for share, _ in self.waiting if share.account.room})

    @rule(age=st.floats(0, 5))
    def expire(self, age: float) -> None:
        for share, _ in self.budget.take_expired(self.now - age):
            self.budget.discard(share)
            self.closing.append(share)

    @invariant()
    def the_counts_are_true(self) -> None:
        counted = self.budget.statistics()
        assert counted.open <= max(self.limit, self.open_before), "a connection was opened above the limit"
        assert not self.budget.excess or not counted.idle, "an idle connection above the limit"
        assert counted.opening <= max(self.max_opening, self.opening_before)
        self.open_before, self.opening_before = counted.open, counted.opening
        assert counted.opening == len(self.opening)
        assert counted.in_use == len(self.used)
        assert counted.closing == len(self.closing)
        assert counted.waiting == len(self.waiting)
        assert counted.idle == sum(len(share.idle) for share in self.shares)
        assert counted.open == counted.opening + counted.in_use + counted.closing + counted.idle
        assert all(share.account.open <= self.PER_TENANT for share in self.shares)

        queues = Counter(share for share, _ in self.waiting)
        for share in self.shares:
            account = share.account
            assert account.queues == sum(other.account is account for other in queues)
            assert account.queued == sum(count for other, count in queues.items() if other.account is account)
            assert account.busy == sum(other.busy for other in self.shares if other.account is account)
        weight = sum({share.account: share.account.weight for share in queues}.values())
        assert self.budget._waiting.weight == pytest.approx(weight)
        assert self.budget._waiting.held == sum({share.account: share.account.busy for share in queues}.values())

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        assert all(not share.idle for share, _ in self.waiting)
        # who has a connection may have to wait for another until nobody else has used theirs lately
        accounts = {share: share.account for share, _ in self.waiting}
        self._nobody_waits({one for one, its in accounts.items() if its.room and not its.busy and not its.closing})

    def _nobody_waits(self, able: set[Share[str]]) -> None:
        counted = self.budget.statistics()
        if able:
            assert counted.open >= self.limit or counted.opening >= self.max_opening, "a slot, and someone to take it"
            if counted.open >= self.limit:
                assert counted.idle == 0 or counted.closing > 0, "an idle connection, and nobody to make room"


BudgetMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestBudgetMachine: Any = pytest.mark.timeout(120)(BudgetMachine.TestCase)
