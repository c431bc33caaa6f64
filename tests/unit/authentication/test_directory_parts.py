"""The parts of the directory that do no I/O: throttle, memory, shared look-ups."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tenancy_orm.audit.actor import Actor
from tenancy_orm.authentication.batch import BatchLoader
from tenancy_orm.authentication.cache import SecondChance
from tenancy_orm.authentication.credential import CREDENTIAL_KINDS, Credential
from tenancy_orm.authentication.refusals import MAX_CALLERS, MAX_KINDS, MAX_WRITTEN, Refusal, RefusalCounter
from tenancy_orm.authentication.subjects import _key
from tenancy_orm.authentication.throttle import Attempts, Throttle
from tenancy_orm.errors import (
    ConfigurationError,
    ControlUnavailableError,
    MissingScopeError,
    NoTenantError,
    TooManyAttemptsError,
)
from tenancy_orm.registry.rows import uuid7
from tenancy_orm.tenant import Status, Tenant
from tests.support.waiting import HANGS, until

# --- throttle -------------------------------------------------------------------------------------------------------


def test_failures_within_the_limit_bring_no_pause() -> None:
    """A person who mistypes a key is not an attacker."""
    throttle = Throttle(limit=3, window=60)
    assert [throttle.fail("a", now) for now in (0.0, 1.0)] == [None, None]
    assert throttle.pause("a", 1.0) == 0


def test_the_limit_brings_a_pause_that_doubles() -> None:
    """Up to the window; the first pause is reported."""
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
    """And a new lock-out is reported again."""
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
    assert throttle.failures_left("a", 0.0) is None


def test_what_is_left_shrinks_with_each_failure_and_comes_back() -> None:
    """None is left once there is a pause, until it is all forgotten."""
    throttle = Throttle(limit=2, window=10)
    left = []
    for _ in range(4):
        left.append(throttle.failures_left("a", 0.0))
        throttle.fail("a", 0.0)
    assert left == [2, 1, 0, 0]
    assert (throttle.failures_left("a", 5.0), throttle.failures_left("a", 100.0), throttle.failures_left("b", 0.0)) == (
        0,
        2,
        2,
    )


# --- attempts under way ---------------------------------------------------------------------------------------------


class Attempted:
    """Attempts of one source, each of which lasts until ``finish``."""

    def __init__(self, *, limit: int = 3, timeout: float = 5.0) -> None:
        self.now = 0.0
        self.throttle = Throttle(limit=limit, window=10)
        self.attempts = Attempts(self.throttle, timeout=timeout, clock=lambda: self.now)
        self.running: list[object] = []
        self._ends: dict[object, list[asyncio.Event]] = {}

    async def attempt(self, what: object, *, fails: bool) -> None:
        """One attempt; a failure is counted as it ends."""
        await self.attempts.begin("source", what)
        self.running.append(what)
        end = asyncio.Event()
        self._ends.setdefault(what, []).append(end)
        await end.wait()
        self.running.remove(what)
        self.attempts.end("source", what)
        if fails:
            self.throttle.fail("source", self.now)

    async def finish(self) -> None:
        """End everything in progress, and let waiting attempts continue."""
        for events in self._ends.values():
            for event in events:
                event.set()
        self._ends.clear()
        await settled()


async def settled() -> None:
    """Let every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_attempts_are_under_way_than_failures_are_left() -> None:
    """When they fail, those that waited are refused without having been made."""
    attempted = Attempted(limit=3)
    tasks = [asyncio.create_task(attempted.attempt(number, fails=True)) for number in range(50)]
    await settled()
    assert attempted.running == [0, 1, 2]
    await attempted.finish()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [TooManyAttemptsError] * 47
    assert len(attempted.attempts) == 0


async def test_once_a_pause_is_over_attempts_are_made_one_at_a_time() -> None:
    """The first that fails begins another."""
    attempted = Attempted(limit=1)
    attempted.throttle.fail("source", 0.0)
    attempted.now = 1.5
    tasks = [asyncio.create_task(attempted.attempt(number, fails=number == 1)) for number in range(5)]
    await settled()
    assert attempted.running == [0]
    await attempted.finish()
    assert attempted.running == [1]
    await attempted.finish()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 2 + [TooManyAttemptsError] * 3


async def test_attempts_that_succeed_make_room_for_those_that_wait() -> None:
    """Many good keys at once come in turn, and none is refused."""
    attempted = Attempted(limit=3)
    tasks = [asyncio.create_task(attempted.attempt(number, fails=False)) for number in range(10)]
    for expected in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9]):
        await settled()
        assert attempted.running == expected
        await attempted.finish()
    await asyncio.gather(*tasks)
    assert len(attempted.attempts) == 0


async def test_the_same_thing_tried_many_times_is_one_attempt() -> None:
    """The requests of one client with one new key do not wait for each other."""
    attempted = Attempted(limit=1)
    tasks = [asyncio.create_task(attempted.attempt("key", fails=False)) for _ in range(10)]
    other = asyncio.create_task(attempted.attempt("other", fails=False))
    await settled()
    assert attempted.running == ["key"] * 10
    await attempted.finish()
    assert attempted.running == ["other"]
    await attempted.finish()
    await asyncio.gather(*tasks, other)


async def test_waiting_for_other_attempts_ends() -> None:
    """With the error that says when to come again; whoever is cancelled leaves nothing behind either."""
    attempted = Attempted(limit=1, timeout=0.01)
    first = asyncio.create_task(attempted.attempt(1, fails=False))
    await settled()
    with pytest.raises(TooManyAttemptsError):
        await attempted.attempt(2, fails=False)
    cancelled = asyncio.create_task(attempted.attempt(3, fails=False))
    await settled()
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await attempted.finish()
    await first
    assert len(attempted.attempts) == 0


async def test_without_a_limit_nobody_waits() -> None:
    """As where lock-out is switched off."""
    attempted = Attempted(limit=0)
    tasks = [asyncio.create_task(attempted.attempt(number, fails=True)) for number in range(100)]
    await settled()
    assert len(attempted.running) == 100
    await attempted.finish()
    await asyncio.gather(*tasks)


# --- what was refused -----------------------------------------------------------------------------------------------

ACME = (uuid7(), "acme")


def counts(tally: RefusalCounter) -> int:
    """How many refusals the entries of a tally tell of."""
    return sum(detail["count"] for _, detail in tally.entries())


def test_of_many_refused_keys_the_most_frequent_are_told_and_the_rest_as_a_number() -> None:
    """In bounded memory, and nothing is lost."""
    tally = RefusalCounter()
    for number in range(5_000):
        tally.add(Refusal.rejected("malformed", None, str(number), (None, None)))
    for _ in range(3):
        tally.add(Refusal.rejected("unknown", "id", "7", (None, None)))
        tally.add(Refusal.rejected("malformed", None, "7", (None, None)))
    assert len(tally) == MAX_KINDS + 1
    entries = tally.entries()
    assert len(entries) == MAX_WRITTEN + 1
    assert entries[0] == (
        Refusal("credential.reject", None, "7", "malformed"),
        {"reason": "malformed", "count": 4},
    )
    assert entries[-1] == (Refusal("credential.reject"), {"reason": "others", "count": 5_006 - MAX_WRITTEN - 3})
    assert counts(tally) == 5_006


def test_of_many_cross_tenant_requests_the_rest_is_told_by_key() -> None:
    """With its tenant and how many others it named: one key's noise does not hide another key."""
    tally = RefusalCounter()
    globex = (uuid7(), "globex")
    for number in range(500):
        for _ in range(2):
            tally.add(Refusal.cross_tenant_request(f"t{number}", "header", "noisy", "192.0.2.1", ACME))
    tally.add(Refusal.cross_tenant_request("acme", "path", "quiet", "192.0.2.2", globex))
    entries = tally.entries()
    assert len(entries) == MAX_WRITTEN + 2
    assert entries[0][1] == {"named": "t0", "resolver": "header", "count": 2}
    assert entries[-2:] == [
        (
            Refusal("request.cross_tenant", "noisy", None, None, *ACME),
            {"reason": "others", "count": 960, "names": 480},
        ),
        (Refusal("request.cross_tenant", "quiet", None, None, *globex), {"reason": "others", "count": 1, "names": 1}),
    ]


def test_cross_tenant_requests_are_told_by_key_when_memory_for_names_is_full() -> None:
    """And as one number when there are too many keys; nothing is lost, in bounded memory."""
    tally = RefusalCounter()
    for number in range(2_000):
        tally.add(Refusal.cross_tenant_request(f"t{number}", "header", "noisy", None, ACME))
    for number in range(3_000):
        tally.add(Refusal.cross_tenant_request("acme", "path", f"key {number}", None, ACME))
    assert len(tally) <= 2 * MAX_KINDS + 1
    entries = tally.entries()
    assert len(entries) == MAX_WRITTEN + MAX_CALLERS + 1
    assert entries[MAX_WRITTEN][0].actor_id == "noisy"
    assert entries[-1][0] == Refusal("request.cross_tenant")
    assert counts(tally) == 5_000


def test_what_is_counted_again_stays_within_bounds() -> None:
    """However often writing fails."""
    tally = RefusalCounter()
    for attempt in range(6):
        taken, tally = tally, RefusalCounter()
        for number in range(1_000):
            tally.add(Refusal.rejected("malformed", None, f"{attempt} {number}", (None, None)))
        tally.add_all(taken)
        assert len(tally) <= MAX_KINDS + 1
    assert counts(tally) == 6_000


# --- memory ---------------------------------------------------------------------------------------------------------


class Thing:
    """An entry."""

    def __init__(self, used: float = 0.0) -> None:
        self.used = self.placed_at = used


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
    batch = BatchLoader(source.load, timeout=5)
    waiting = [asyncio.create_task(batch.get(key)) for key in (1, 2, 1, 2, -1)]
    await started(source)
    source.gate.set()
    assert [value for value, _ in await asyncio.gather(*waiting)] == ["1", "2", "1", "2", None]
    assert source.asked == [[1, 2, -1]]


async def test_what_is_asked_meanwhile_gathers_for_the_next_query() -> None:
    """Two run at once; a third does not."""
    source = Source()
    batch = BatchLoader(source.load, size=3, workers=2, timeout=5)
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
    batch = BatchLoader(source.load, timeout=5)
    waiting = [asyncio.create_task(batch.get(1)) for _ in range(3)]
    await started(source)
    waiting[0].cancel()
    waiting[1].cancel()
    source.gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:2]] == [asyncio.CancelledError] * 2
    assert outcomes[2] == ("1", set())


async def test_a_look_up_runs_in_nobodys_context() -> None:
    """It is shared, so it must not run as the tenant of whoever happened to ask first."""
    variable = ContextVar("variable", default="nobody")
    seen: list[str] = []

    async def load(keys: list[int]) -> Mapping[int, str]:
        seen.append(variable.get())
        return {}

    batch = BatchLoader(load, timeout=5)
    token = variable.set("somebody")
    try:
        await batch.get(1)
    finally:
        variable.reset(token)
    assert seen == ["nobody"]


async def test_nobody_joins_a_look_up_that_an_invalidation_overtook() -> None:
    """Callers before it get the tag; callers after it get a query of their own."""
    source = Source()
    batch = BatchLoader(source.load, timeout=5)
    before = asyncio.create_task(batch.get(1))
    await started(source)
    batch.invalidate("tag")
    after = asyncio.create_task(batch.get(1))
    await started(source, 2)
    source.gate.set()
    assert await before == ("1", {"tag"})
    assert await after == ("1", set())


async def test_an_invalidation_between_the_answer_and_its_caller_is_told() -> None:
    """The query has ended, but whoever asked has not run on with its outcome yet: it may be old."""
    batch: BatchLoader[int, str]

    async def load(keys: list[int]) -> Mapping[int, str]:
        # as a notification does when its callback is in the loop's queue at the time of the answer
        asyncio.get_running_loop().call_soon(batch.invalidate, "tag")
        return {key: str(key) for key in keys}

    batch = BatchLoader(load, timeout=5)
    outcomes = await asyncio.gather(batch.get(1), batch.get(1))
    assert list(outcomes) == [("1", {"tag"}), ("1", {"tag"})]
    assert not batch._begun


async def test_what_is_asked_as_the_last_worker_ends_is_looked_up() -> None:
    """In the turn of the loop in which its task has ended, and is not yet known to have."""
    source = Source()
    batch = BatchLoader(source.load, workers=1, timeout=5)
    first = asyncio.create_task(batch.get(1))
    await started(source)

    async def in_the_same_turn() -> tuple[str | None, object]:
        await source.gate.wait()
        return await batch.get(2)

    second = asyncio.create_task(in_the_same_turn())
    await asyncio.sleep(0)
    source.gate.set()
    async with asyncio.timeout(HANGS):
        assert [value for value, _ in await asyncio.gather(first, second)] == ["1", "2"]


async def test_who_queues_behind_a_query_without_an_answer_waits_no_longer_than_it() -> None:
    """A thousand keys are not five time-outs in a row."""
    source = Source()
    batch = BatchLoader(source.load, size=10, workers=1, timeout=0.05)
    outcomes = await asyncio.gather(*(batch.get(key) for key in range(1_000)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ControlUnavailableError}
    assert len(source.asked) == 1


async def test_who_queues_behind_slow_answers_waits_for_two_of_them_at_most() -> None:
    """Each comes in time, but there are too many before one's own."""
    asked = 0

    async def load(keys: list[int]) -> Mapping[int, str]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.3)
        return {key: str(key) for key in keys}

    batch: BatchLoader[int, str] = BatchLoader(load, size=1, workers=1, timeout=0.5)
    outcomes = await asyncio.gather(*(batch.get(key) for key in range(50)), return_exceptions=True)
    assert outcomes[0] == ("0", set())
    assert isinstance(outcomes[-1], ControlUnavailableError)
    assert asked < 10


async def test_nobody_joins_a_look_up_that_was_given_up_before_its_query() -> None:
    """Who comes after that is looked up, and waits for as long as anybody else."""
    source = Source()
    batch = BatchLoader(source.load, workers=1, timeout=HANGS)
    first = asyncio.create_task(batch.get(1))
    await started(source)
    given_up = asyncio.create_task(batch.get(2))
    await until(lambda: 2 in batch._waiting)
    batch._waiting[2].fail(ControlUnavailableError("no answer"))
    with pytest.raises(ControlUnavailableError):
        await given_up
    later = asyncio.create_task(batch.get(2))
    await asyncio.sleep(0)
    source.gate.set()
    assert [await first, await later] == [("1", set()), ("2", set())]


async def test_a_failure_reaches_everyone_who_waited_and_nobody_later() -> None:
    """It is not remembered."""
    source = Source()
    source.error = ValueError("broken")
    source.gate.set()
    batch = BatchLoader(source.load, timeout=5)
    outcomes = await asyncio.gather(batch.get(1), batch.get(2), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError]
    source.error = None
    assert await batch.get(1) == ("1", set())


async def test_a_query_that_takes_too_long_is_given_up() -> None:
    """It counts as an outage of the control database."""
    source = Source()
    batch = BatchLoader(source.load, timeout=0.01)
    with pytest.raises(ControlUnavailableError, match="in time"):
        await batch.get(1)
    source.gate.set()
    assert await batch.get(1) == ("1", set())


async def test_closing_fails_whoever_waits() -> None:
    """Nobody waits for ever, and nothing can be asked any more."""
    source = Source()
    batch = BatchLoader(source.load, workers=1, timeout=5)
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
    none, some, every = (
        Credential("key", "k", scopes=frozenset(scopes), bound=tenant) for scopes in ((), ("notes:read",), ("*",))
    )
    assert some.has_scope("notes:read")
    assert not some.has_scope("notes")
    assert not none.has_scope("notes:read")
    assert every.has_scope("anything")
    with pytest.raises(MissingScopeError, match="notes:write"):
        some.require_scope("notes:write")


def test_a_credentials_defaults_give_no_more_than_they_must() -> None:
    """No scopes for tenants that it names itself; for memberships those of the roles, without a further limit."""
    assert Credential("session", "ada").scopes == {"*"}
    assert Credential("token", "ada", tenants=("acme",)).scopes == frozenset()
    assert Credential("token", "ada", scopes=frozenset()).scopes == frozenset()
    assert Credential("key", "k").scopes == Credential("anonymous", "").scopes == frozenset()
    sent = [Credential(kind, "a").sent_by_browser for kind in CREDENTIAL_KINDS]
    assert dict(zip(CREDENTIAL_KINDS, sent, strict=True)) == {
        "key": False,
        "token": None,  # the request that has it decides
        "session": True,
        "anonymous": False,
    }
    with pytest.raises(NoTenantError):
        Credential("session", "ada").tenant  # noqa: B018
    assert "secret" not in repr(Credential("token", "ada", claims={"email": "secret"}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "cookie"}, "kind is one of"),
        ({"tenants": "acme"}, "not one string"),
        ({"scopes": "*"}, "not one string"),
        ({"expires_at": datetime(2030, 1, 1)}, "aware"),  # noqa: DTZ001
        ({"issued_at": 1893456000.0}, "aware"),
        ({"subject": 7}, "pass str"),
        ({"id": 7}, "pass str"),
        ({"tenants": [7]}, "slugs or ids"),
    ],
)
def test_a_malformed_credential_is_refused(wrong: dict[str, Any], message: str) -> None:
    """Where it is made, with what is wrong; as a refusal it would look like the caller's mistake."""
    with pytest.raises(ConfigurationError, match=message):
        Credential(**{"kind": "session", "subject": "ada", **wrong})


def test_what_is_cached_of_a_credential_is_no_other_ones() -> None:
    """It is found by everything that decides about the tenant, the rights, the time and the revocations."""
    now = datetime.now(UTC)
    made: dict[str, Any] = {"kind": "session", "subject": "ada", "id": "1", "expires_at": now, "issued_at": now}
    others: list[dict[str, Any]] = [
        {"kind": "token", "sent_by_browser": True},
        {"subject": "eve"},
        {"id": "2"},
        {"tenants": ("acme",), "scopes": ("*",)},
        {"scopes": ()},
        {"expires_at": now + timedelta(seconds=1)},
        {"issued_at": None},
        {"sent_by_browser": False},
    ]
    keys = {_key(Credential(**{**made, **other}), named) for other in [{}, *others] for named in ((), ("acme",))}
    assert len(keys) == 2 * (1 + len(others))


def test_a_credential_names_itself_in_the_audit_log() -> None:
    """By kind and subject; a visitor has none."""
    assert Credential("session", "ada").actor(source="192.0.2.1") == Actor("session", "ada", source="192.0.2.1")
    assert Credential("anonymous", "").actor() == Actor("anonymous")
