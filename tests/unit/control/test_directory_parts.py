"""The parts of the directory that do no I/O: throttle, memory, shared look-ups."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from tenancy_orm.context import Status, Tenant
from tenancy_orm.control.batch import Batch
from tenancy_orm.control.cache import SecondChance
from tenancy_orm.control.directory import Credential
from tenancy_orm.control.registry import uuid7
from tenancy_orm.control.throttle import Throttle
from tenancy_orm.errors import ControlUnavailableError, MissingScopeError
from tests.support.waiting import until

# --- throttle -------------------------------------------------------------------------------------------------------


def test_failures_within_the_limit_bring_no_pause() -> None:
    """A person who mistypes a key is not an attacker."""
    throttle = Throttle(limit=3, window=60)
    assert [throttle.fail("a", now) for now in (0.0, 1.0)] == [None, None]
    assert throttle.pause("a", 1.0) == 0


def test_the_limit_brings_a_pause_that_doubles() -> None:
    """Up to the window; the first time is told."""
    throttle = Throttle(limit=3, window=10)
    assert [throttle.fail("a", 0.0) for _ in range(3)] == [None, None, 3]
    pauses = []
    for _ in range(6):
        pauses.append(throttle.pause("a", 0.0))
        assert throttle.fail("a", 0.0) is None
    assert pauses == [1, 2, 4, 8, 10, 10]
    assert throttle.pause("a", 9.0) == 1
    assert throttle.pause("b", 0.0) == 0


def test_an_endless_number_of_failures_is_counted() -> None:
    """The exponent does not overflow."""
    throttle = Throttle(limit=1, window=60)
    for _ in range(5_000):
        throttle.fail("a", 0.0)
    assert throttle.pause("a", 0.0) == 60


def test_failures_are_forgotten_after_a_quiet_window() -> None:
    """And a new lock-out is told anew."""
    throttle = Throttle(limit=2, window=10)
    assert [throttle.fail("a", 0.0), throttle.fail("a", 0.0)] == [None, 2]
    assert throttle.fail("a", 10.5) is None
    assert throttle.fail("a", 22.5) is None
    assert throttle.fail("a", 22.5) == 2


def test_old_failures_do_not_add_up() -> None:
    """One every window for years is no attack."""
    throttle = Throttle(limit=2, window=10)
    assert [throttle.fail("a", now) for now in (0.0, 10.0, 20.0, 30.0)] == [None] * 4


def test_the_throttle_is_bounded() -> None:
    """Whoever failed longest ago is forgotten."""
    throttle = Throttle(limit=1, window=60, capacity=100)
    for number in range(1_000):
        throttle.fail(str(number), 0.0)
    assert len(throttle) == 100
    assert throttle.pause("999", 0.0) > 0
    assert throttle.pause("0", 0.0) == 0


def test_a_limit_of_zero_is_no_limit() -> None:
    """Nothing is counted."""
    throttle = Throttle(limit=0, window=60)
    assert [throttle.fail("a", 0.0) for _ in range(100)] == [None] * 100
    assert len(throttle) == 0


# --- memory ---------------------------------------------------------------------------------------------------------


class Thing:
    """An entry."""

    def __init__(self, used: float = 0.0) -> None:
        self.used = self.placed = used


def test_what_was_not_used_goes_first() -> None:
    """What was, gets a second chance."""
    gone: list[int] = []
    cache: SecondChance[int, Thing] = SecondChance(3, lambda key, _: gone.append(key))
    for key in range(3):
        cache.put(key, Thing())
    cache.entries[0].used = 1.0
    cache.put(3, Thing(2.0))
    cache.put(4, Thing(2.0))
    assert gone == [1, 2]
    assert sorted(cache.entries) == [0, 3, 4]


def test_room_is_made_though_everything_is_in_use() -> None:
    """In a bounded number of steps."""
    gone: list[int] = []
    cache: SecondChance[int, Thing] = SecondChance(1_000, lambda key, _: gone.append(key))
    for key in range(1_000):
        cache.put(key, Thing())
        cache.entries[key].used = 1.0
    cache.put(1_000, Thing())
    assert gone == [31]
    assert len(cache) == 1_000


def test_replacing_an_entry_drops_no_other() -> None:
    """The old one leaves silently: its owner replaced it."""
    gone: list[int] = []
    cache: SecondChance[int, Thing] = SecondChance(2, lambda key, _: gone.append(key))
    for key in (1, 2, 1, 2, 1):
        cache.put(key, Thing())
    assert (gone, len(cache)) == ([], 2)


# --- shared look-ups ------------------------------------------------------------------------------------------------


class Source:
    """Something slow to ask, which records what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def load(self, keys: list[int]) -> Mapping[int, str]:
        self.asked.append(keys)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {key: str(key) for key in keys if key >= 0}


async def started(source: Source, count: int = 1) -> None:
    """Wait until the source has been asked ``count`` times."""
    await until(lambda: len(source.asked) >= count)


async def test_one_query_per_key_and_many_keys_per_query() -> None:
    """A key without a value has none."""
    source = Source()
    batch = Batch(source.load, timeout=5)
    waiting = [asyncio.create_task(batch.get(key)) for key in (1, 2, 1, 2, -1)]
    await started(source)
    source.gate.set()
    assert [value for value, _ in await asyncio.gather(*waiting)] == ["1", "2", "1", "2", None]
    assert source.asked == [[1, 2, -1]]


async def test_what_is_asked_meanwhile_gathers_for_the_next_query() -> None:
    """Two run at once; a third does not."""
    source = Source()
    batch = Batch(source.load, size=3, workers=2, timeout=5)
    waiting = []
    for key in range(8):
        waiting.append(asyncio.create_task(batch.get(key)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert source.asked == [[0], [1]]
    source.gate.set()
    assert [value for value, _ in await asyncio.gather(*waiting)] == [str(key) for key in range(8)]
    assert sorted(source.asked) == [[0], [1], [2, 3, 4], [5, 6, 7]]


async def test_cancelling_a_waiter_cancels_nobody_else() -> None:
    """Not even the one who asked first, nor all but one."""
    source = Source()
    batch = Batch(source.load, timeout=5)
    waiting = [asyncio.create_task(batch.get(1)) for _ in range(3)]
    await started(source)
    waiting[0].cancel()
    waiting[1].cancel()
    source.gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:2]] == [asyncio.CancelledError] * 2
    assert outcomes[2] == ("1", set())


async def test_nobody_joins_a_look_up_that_an_invalidation_overtook() -> None:
    """Who asked before is told; who asks after gets a query of its own."""
    source = Source()
    batch = Batch(source.load, timeout=5)
    before = asyncio.create_task(batch.get(1))
    await started(source)
    batch.touch("tag")
    after = asyncio.create_task(batch.get(1))
    await started(source, 2)
    source.gate.set()
    assert await before == ("1", {"tag"})
    assert await after == ("1", set())


async def test_an_invalidation_between_the_answer_and_its_caller_is_told() -> None:
    """The query has ended, but whoever asked has not run on with its outcome yet: it may be old."""
    batch: Batch[int, str]

    async def load(keys: list[int]) -> Mapping[int, str]:
        # what a notification does whose callback is in the loop's queue when the answer comes
        asyncio.get_running_loop().call_soon(batch.touch, "tag")
        return {key: str(key) for key in keys}

    batch = Batch(load, timeout=5)
    outcomes = await asyncio.gather(batch.get(1), batch.get(1))
    assert list(outcomes) == [("1", {"tag"}), ("1", {"tag"})]
    assert not batch._begun


async def test_what_is_asked_as_the_last_worker_ends_is_looked_up() -> None:
    """In the turn of the loop in which its task has ended, and is not yet known to have."""
    source = Source()
    batch = Batch(source.load, workers=1, timeout=5)
    first = asyncio.create_task(batch.get(1))
    await started(source)

    async def in_the_same_turn() -> tuple[str | None, object]:
        await source.gate.wait()
        return await batch.get(2)

    second = asyncio.create_task(in_the_same_turn())
    await asyncio.sleep(0)
    source.gate.set()
    async with asyncio.timeout(5):
        assert [value for value, _ in await asyncio.gather(first, second)] == ["1", "2"]


async def test_who_queues_behind_a_query_without_an_answer_waits_no_longer_than_it() -> None:
    """A thousand keys are not five time-outs in a row."""
    source = Source()
    batch = Batch(source.load, size=10, workers=1, timeout=0.05)
    outcomes = await asyncio.gather(*(batch.get(key) for key in range(1_000)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ControlUnavailableError}
    assert len(source.asked) == 1


async def test_who_queues_behind_slow_answers_waits_for_two_of_them_at_most() -> None:
    """Each comes in time, but there are too many before one's own."""
    asked = 0

    async def load(keys: list[int]) -> Mapping[int, str]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.06)
        return {key: str(key) for key in keys}

    batch: Batch[int, str] = Batch(load, size=1, workers=1, timeout=0.1)
    outcomes = await asyncio.gather(*(batch.get(key) for key in range(50)), return_exceptions=True)
    assert outcomes[0] == ("0", set())
    assert isinstance(outcomes[-1], ControlUnavailableError)
    assert asked < 10


async def test_a_failure_reaches_everyone_who_waited_and_nobody_later() -> None:
    """It is not remembered."""
    source = Source()
    source.error = ValueError("broken")
    source.gate.set()
    batch = Batch(source.load, timeout=5)
    outcomes = await asyncio.gather(batch.get(1), batch.get(2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError]
    source.error = None
    assert await batch.get(1) == ("1", set())


async def test_a_query_that_takes_too_long_is_given_up() -> None:
    """As the control database being away."""
    source = Source()
    batch = Batch(source.load, timeout=0.01)
    with pytest.raises(ControlUnavailableError, match="in time"):
        await batch.get(1)
    source.gate.set()
    assert await batch.get(1) == ("1", set())


async def test_closing_fails_whoever_waits() -> None:
    """Nobody waits for ever, and nothing can be asked any more."""
    source = Source()
    batch = Batch(source.load, workers=1, timeout=5)
    running = asyncio.create_task(batch.get(1))
    await started(source)
    queued = asyncio.create_task(batch.get(2))
    await asyncio.sleep(0)
    await batch.close()
    outcomes = await asyncio.gather(running, queued, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ControlUnavailableError] * 2
    with pytest.raises(ControlUnavailableError, match="closed"):
        await batch.get(3)


# --- credentials ----------------------------------------------------------------------------------------------------


def test_scopes_are_exact_and_a_star_is_all() -> None:
    """A key without scopes may do nothing that asks for one."""
    tenant = Tenant(uuid7(), "acme", Status.ACTIVE, "free")
    none, some, every = (Credential(tenant, "k", frozenset(scopes)) for scopes in ((), ("notes:read",), ("*",)))
    assert some.has_scope("notes:read")
    assert not some.has_scope("notes")
    assert not none.has_scope("notes:read")
    assert every.has_scope("anything")
    with pytest.raises(MissingScopeError, match="notes:write"):
        some.require_scope("notes:write")
