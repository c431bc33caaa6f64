"""Who waits for a connection is served by connection time and weight; who cannot be served in time does not wait."""

from __future__ import annotations

import math
from collections import Counter
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenancy_orm.routing.budget import KEEP_SECONDS, Budget
from tenancy_orm.routing.queue import MOST_DEBT
from tenancy_orm.routing.shares import Share
from tests.support.contention import Load, Simulation


class Clock:
    """Tells what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Seat:
    """A waiter without an event loop."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.served: list[str | None] = []

    def done(self) -> bool:
        return bool(self.served)

    def set_result(self, item: str | None, /) -> None:
        self.served.append(item)

    def set_exception(self, error: BaseException, /) -> None:
        raise AssertionError(error)


class Server:
    """A budget, its clock, and the connections that it has closed."""

    def __init__(self, slots: int, *, most: int | None = None, max_waiting: int | None = None) -> None:
        self.clock = Clock()
        self.evicted: list[Share[str]] = []
        self.budget: Budget[str] = Budget(slots, most or slots, self._evict, max_waiting=max_waiting, clock=self.clock)

    def _evict(self, share: Share[str], item: str) -> None:
        self.budget.discard(share)
        self.evicted.append(share)

    def tenant(self, number: int, weight: float = 1.0) -> Share[str]:
        return self.budget.share(UUID(int=number), weight=weight, slug=f"t{number}", tier="free")

    def connect(self, share: Share[str], count: int = 1) -> None:
        for _ in range(count):
            assert self.budget.reserve(share)
            self.budget.opened()

    def rest(self, share: Share[str], count: int = 1) -> None:
        """Open connections and leave them idle."""
        self.connect(share, count)
        for _ in range(count):
            self.budget.put(share, "c", self.clock.now)

    def wait(self, share: Share[str], count: int = 1, *, seconds: float = math.inf) -> list[Seat]:
        seats = [Seat() for _ in range(count)]
        for seat in seats:
            assert self.budget.wait(share, seat, deadline=self.clock.now + seconds) is None
        return seats

    def close(self) -> None:
        while self.evicted:
            self.budget.closed(self.evicted.pop())


def parts(loads: list[Load]) -> list[float]:
    total = sum(load.used for load in loads)
    return [load.used / total for load in loads]


# --- connection time ------------------------------------------------------------------------------------------------


def test_long_requests_get_no_more_time_than_short_ones() -> None:
    """Eight tenants on four slots: one has requests a hundred times as long, and an eighth of the time."""
    loads = [Load(0.5, clients=20, exact=True)] + [Load(0.01, clients=20, exact=True) for _ in range(7)]
    Simulation(loads, slots=4).run(30.0)
    long, *short = parts(loads)
    assert 0.1 < long < 0.2 and all(0.1 < part < 0.15 for part in short)


def test_time_is_shared_by_weight() -> None:
    """Where all saturate, with one client each or with many."""
    weights = (1.0, 1.0, 2.0, 4.0)
    loads = [Load(0.02, clients=20, weight=weight, exact=True) for weight in weights]
    Simulation(loads, slots=8).run(30.0)
    assert parts(loads) == pytest.approx([weight / 8 for weight in weights], rel=0.05)
    lone = [Load(0.02, clients=1, weight=weight, exact=True) for weight in weights]
    Simulation(lone, slots=1).run(60.0)
    ordered = parts(lone)
    assert ordered[0] == pytest.approx(ordered[1], rel=0.1) and ordered[1] < ordered[2] < ordered[3]


@settings(max_examples=10, deadline=None)
@given(
    weights=st.lists(st.sampled_from((0.5, 1.0, 2.0, 5.0)), min_size=2, max_size=5),
    seconds=st.lists(st.sampled_from((0.01, 0.05, 0.2)), min_size=5, max_size=5),
    slots=st.integers(1, 6),
)
def test_nobody_who_saturates_gets_less_than_half_its_part(
    weights: list[float], seconds: list[float], slots: int
) -> None:
    """Whatever the weights, the length of requests and the number of slots; nor does anybody get everything."""
    loads = [
        Load(seconds=length, clients=12, weight=weight, exact=True)
        for weight, length in zip(weights, seconds, strict=False)
    ]
    Simulation(loads, slots=slots).run(20.0)
    unit = 1 / sum(weights)
    for load, part in zip(loads, parts(loads), strict=True):
        # a tenant may have one slot at least where others have less than one, and none can be divided
        assert part >= min(load.weight * unit, 1 / slots) / 2 - 1 / slots / len(loads) / 2
        assert part > 0


def test_idleness_is_no_credit() -> None:
    """A tenant that comes after a minute gets as much as the one that was there, not a minute's worth."""
    server = Server(1)
    old, new = server.tenant(1), server.tenant(2)
    server.connect(old)
    server.wait(old, 100)
    for _ in range(60):
        server.clock.now += 1.0
        server.budget.put(old, "c", server.clock.now)
    server.wait(new, 100)
    holder, served = old, Counter[Share[str]]()
    for _ in range(20):
        server.clock.now += 1.0
        server.budget.put(holder, "c", server.clock.now)
        if server.evicted:
            server.close()
            server.budget.opened()
            holder = new if holder is old else old
        served[holder] += 1
    assert abs(served[old] - served[new]) <= 2


def test_debt_is_forgotten() -> None:
    """A tenant that held all slots for an hour while another waited waits for a turn of that one's, not for an hour."""
    server = Server(2)
    loud, quiet = server.tenant(1), server.tenant(2)
    server.connect(loud, 2)
    server.wait(loud, 100)
    server.wait(quiet, 100)
    server.clock.now += 3_600.0
    for _ in range(2):
        server.budget.put(loud, "c", server.clock.now)
        server.close()
    assert loud.account.used(server.clock.now) / loud.account.weight <= MOST_DEBT + 1e-6


# --- the part of a tenant -------------------------------------------------------------------------------------------


def test_who_has_its_part_gets_no_further_slot_while_others_wait() -> None:
    """Not even if it has waited for longer. When nobody else waits, it gets what there is."""
    server = Server(4)
    loud, quiet, third = server.tenant(1), server.tenant(2), server.tenant(3)
    server.connect(loud, 3)
    server.connect(quiet)
    crowd = server.wait(loud, 4)
    mine = server.wait(quiet, 2)
    server.budget.discard(loud)
    server.budget.closed(loud)
    assert mine[0].served == [None]
    server.budget.opened()
    late = server.wait(third)
    server.budget.discard(loud)
    server.budget.closed(loud)
    assert late[0].served == [None] and not any(seat.served for seat in crowd)
    for share in (quiet, quiet, third):
        server.budget.discard(share)
    server.budget.opened()
    for share in (quiet, quiet, third):
        server.budget.closed(share)
    assert sum(bool(seat.served) for seat in crowd) >= 1


def test_a_heavier_tenant_has_a_larger_part() -> None:
    """With weight 3 it may have three of four slots."""
    server = Server(4)
    light, heavy = server.tenant(1), server.tenant(2, weight=3.0)
    server.connect(light, 4)
    server.wait(light, 10)
    seats = server.wait(heavy, 10)
    for _ in range(12):
        if not light.busy:
            break
        server.clock.now += 0.01
        server.budget.put(light, "c", server.clock.now)
        server.close()
    while server.budget.opening:
        server.budget.opened()
    assert (light.busy, heavy.busy) == (1, 3)
    assert sum(bool(seat.served) for seat in seats) == 3


def test_a_weight_that_changes_counts_at_once() -> None:
    """For those that wait as well."""
    server = Server(2)
    one, other = server.tenant(1), server.tenant(2)
    server.connect(one, 2)
    server.wait(one)
    server.wait(other)
    server.budget.reweigh({"free": 5.0})
    assert (one.account.weight, other.account.weight, server.budget._waiting.weight) == (5.0, 5.0, 10.0)
    server.budget.reweigh({})
    assert server.budget._waiting.weight == 2.0


# --- idle connections -----------------------------------------------------------------------------------------------


def test_who_has_its_part_closes_no_connection_that_was_used_just_now() -> None:
    """Its neighbours would have to log in again. What has not been used for a while is closed."""
    server = Server(6)
    loud, *quiet = [server.tenant(number) for number in range(4)]
    for share in quiet:
        server.rest(share)
    server.connect(loud, 3)
    [seat] = server.wait(loud)
    assert server.evicted == []
    server.clock.now = KEEP_SECONDS / 2
    assert server.budget.look() == [] and server.evicted == []
    server.clock.now = KEEP_SECONDS
    server.budget.look()
    assert len(server.evicted) == 1
    server.close()
    assert seat.served == [None]


def test_those_that_wait_get_a_quarter_of_the_slots_from_idle_ones() -> None:
    """However many neighbours have used theirs just now."""
    server = Server(12)
    loud, *quiet = [server.tenant(number) for number in range(13)]
    for share in quiet:
        server.rest(share)
    server.wait(loud, 10)
    assert len(server.evicted) == 3


def test_who_has_none_gets_one() -> None:
    """A tenant without a connection closes another's, whatever that was used for."""
    server = Server(2)
    one, other, new = (server.tenant(number) for number in range(3))
    server.rest(one)
    server.rest(other)
    server.wait(new)
    assert len(server.evicted) == 1


def test_a_slot_that_was_made_free_is_not_for_who_has_its_part() -> None:
    """A tenant whose connection was closed for another's finds the slot free when that one did not need it."""
    server = Server(8)
    loud, neighbour, *quiet = [server.tenant(number) for number in range(5)]
    for share in (neighbour, *quiet):
        server.rest(share)
    server.connect(loud, 4)
    new = server.tenant(9)
    [seat] = server.wait(new)
    [lost] = server.evicted
    server.budget.withdraw(new, seat)
    crowd = server.wait(loud, 5)
    server.close()
    assert not any(seat.served for seat in crowd)
    server.clock.now = KEEP_SECONDS / 2
    server.budget.look()
    assert not any(seat.served for seat in crowd)
    assert server.budget.reserve(lost)


# --- deadlines ------------------------------------------------------------------------------------------------------


def busy_server(slots: int, seconds: float, rounds: int, waiting: int) -> tuple[Server, Share[str]]:
    """A tenant with all slots, requests of so many seconds, and so many that wait, after some rounds."""
    server = Server(slots)
    share = server.tenant(1)
    server.connect(share, slots)
    server.wait(share, waiting + rounds * slots)
    for _ in range(rounds):
        server.clock.now += seconds
        for _ in range(slots):
            server.budget.put(share, "c", server.clock.now)
    return server, share


def test_who_cannot_be_served_in_time_is_refused_at_once() -> None:
    """Ten rounds of a second are ahead of it, and its deadline is in five."""
    server, share = busy_server(4, 1.0, rounds=6, waiting=40)
    refusal = server.budget.wait(share, Seat(), deadline=server.clock.now + 5.0)
    assert refusal is not None
    assert refusal.reason == "deadline"
    assert (refusal.seconds, refusal.left, refusal.retry_after) == pytest.approx((10.0, 5.0, 5.0))
    assert server.budget.statistics().refused == 1
    assert server.budget.statistics().waiting == 40
    assert server.budget.wait(share, Seat(), deadline=server.clock.now + 10.5) is None


def test_another_tenant_is_not_refused_for_it() -> None:
    """It has its turn before the others of the crowd."""
    server, _ = busy_server(4, 1.0, rounds=6, waiting=400)
    assert server.budget.wait(server.tenant(2), Seat(), deadline=server.clock.now + 0.5) is None


def test_those_that_wait_already_are_refused_when_it_is_known() -> None:
    """A crowd that came at once: at first nothing is known; then the last ones are refused, and not the first."""
    server = Server(2)
    share = server.tenant(1)
    server.connect(share, 2)
    seats = server.wait(share, 60, seconds=10.0)
    refused: list[Seat] = []
    for second in range(1, 7):
        server.clock.now = float(second)
        server.budget.put(share, "c", server.clock.now)
        server.budget.put(share, "c", server.clock.now)
        refused += [seat for _, seat, _ in server.budget.look() if isinstance(seat, Seat)]
        if second < 4:
            assert not refused, "too little is known"
    # of sixty, those of ten rounds can be served
    assert {seats.index(seat) for seat in refused} == set(range(22, 60))
    assert server.budget.statistics().waiting == 22 - 12


def test_one_slow_request_refuses_nobody() -> None:
    """After rounds of 10 ms one takes a minute: a queue that drains in a second is not refused."""
    server, share = busy_server(1, 0.01, rounds=20, waiting=100)
    server.clock.now += 60.0
    server.budget.put(share, "c", server.clock.now)
    assert server.budget.wait(share, Seat(), deadline=server.clock.now + 5.0) is None
    assert server.budget.look() == []


def test_nothing_is_refused_where_nothing_is_known() -> None:
    """A thousand cold requests at once, and a login that takes long."""
    server = Server(5)
    share = server.tenant(1)
    for _ in range(5):
        assert server.budget.reserve(share)
    server.wait(share, 1_000, seconds=10.0)
    server.clock.now = 3.0
    assert server.budget.look() == []
    for _ in range(5):
        server.budget.opened()
        server.budget.put(share, "c", server.clock.now)
    server.clock.now = 3.01
    assert server.budget.look() == []


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    load=st.floats(0.1, 0.7),
    tenants=st.integers(1, 8),
    seconds=st.sampled_from((0.002, 0.02, 0.1)),
)
def test_nothing_is_refused_below_capacity(seed: int, load: float, tenants: int, seconds: float) -> None:
    """Whatever comes at random, up to 70 % of what the slots can serve, where each would wait for a second."""
    slots = 6
    rate = load * slots / (seconds + 0.005) / tenants
    loads = [Load(seconds, rate=rate, deadline=max(1.0, 20 * seconds)) for _ in range(tenants)]
    Simulation(loads, slots=slots, seed=seed).run(10.0)
    assert [one.refusals for one in loads] == [[]] * tenants


def test_more_tenants_than_can_have_a_turn_are_refused() -> None:
    """One request each of hundreds of tenants, a second long: those with too many turns before them are refused."""
    server = Server(2)
    holders = [server.tenant(0), server.tenant(1)]
    for holder in holders:
        server.connect(holder)
    crowd = [server.tenant(number) for number in range(2, 102)]
    for share in crowd:
        server.wait(share, seconds=100.0)
    for _ in range(8):
        server.clock.now += 1.0
        for share in holders:
            server.budget.discard(share)
            server.budget.closed(share)
        holders = [share for share in crowd if share.busy]
        for _ in holders:
            server.budget.opened()
    refusal = server.budget.wait(server.tenant(500), Seat(), deadline=server.clock.now + 10.0)
    assert refusal is not None and 30 < refusal.seconds < 50
    assert server.budget.wait(server.tenant(501), Seat(), deadline=server.clock.now + 60.0) is None


def test_a_queue_is_bounded() -> None:
    """For each tenant; others may still wait."""
    server = Server(1, max_waiting=3)
    loud, quiet = server.tenant(1), server.tenant(2)
    server.connect(loud)
    server.wait(loud, 3)
    refusal = server.budget.wait(loud, Seat())
    assert refusal is not None and refusal.reason == "queue"
    assert server.budget.wait(quiet, Seat()) is None


# --- who waits for what ---------------------------------------------------------------------------------------------


def test_it_is_known_who_waits_for_what() -> None:
    """For a slot, for a connection of its own, for PostgreSQL, or for its turn to log in."""
    server = Server(4, most=2)
    own, refused, slot, login = (server.tenant(number) for number in range(1, 5))
    server.connect(own, 2)
    server.wait(own)
    assert server.budget.reserve(refused)
    server.budget.failed(refused, refused=True)
    server.clock.now = 1.0
    server.wait(refused)
    server.budget.resize(4, max_opening=1)
    assert server.budget.reserve(slot)
    server.clock.now = 2.0
    server.wait(login)
    assert [(one.slug, one.waiting_for, one.requests, one.seconds) for one in server.budget.waiting()] == [
        ("t1", "tenant", 1, 2.0),
        ("t2", "postgresql", 1, 1.0),
        ("t4", "login", 1, 0.0),
    ]
    server.budget.resize(3)
    assert server.budget.statistics().waiting_for == {"server": 1, "tenant": 1, "login": 0, "postgresql": 1}
    assert server.budget.waiting()[0].busy == 2
