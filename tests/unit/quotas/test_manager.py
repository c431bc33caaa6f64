"""What quotas, rates and policies refuse and compute, without a database."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.config import Limit, TenancyConfig, Tier, TierPolicy
from tenancy_orm.errors import ConfigurationError, QuotaExceededError
from tenancy_orm.loops import HomeLoop
from tenancy_orm.quotas.blocks import BlockManager, LeasedQuota
from tenancy_orm.quotas.overrides import Override, check_overrides
from tenancy_orm.quotas.rates import UNLIMITED, Allowed, Denied, Rates
from tenancy_orm.quotas.usage import Remaining, Usage
from tenancy_orm.tenant import Status, Tenant
from tests.support.waiting import HANGS

# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_kept_as_json() -> None:
    """An amount, a limit and a mapping; None means the tier's and is left out."""
    overrides: dict[str, Override] = {
        "users": 5,
        "seats": Limit(None, "month", (0.5,)),
        "api_calls": {"amount": 500, "period": "day"},
        "files": {"soft": [0.9]},
        "gone": None,
        "requests_per_second": 2.5,
    }
    assert check_overrides(overrides) == {
        "users": 5,
        "seats": {"amount": None, "period": "month", "soft": [0.5]},
        "api_calls": {"amount": 500, "period": "day"},
        "files": {"soft": [0.9]},
        "requests_per_second": 2.5,
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"users": -1},
        {"users": 1.5},
        {"users": True},
        {"users": "5"},
        {"users": 10**15 + 1},
        {"users": {}},
        {"users": {"amount": -1}},
        {"users": {"amount": 5, "perid": "day"}},
        {"users": {"amount": 5, "period": "week"}},
        {"users": {"soft": [1.5]}},
        {"users": {"soft": ["a"]}},
        {"users": {"soft": 0.8}},
        {"users": {"soft": [True]}},
        {"users": {"soft": [math.nan]}},
        {"users": {"amount": 1.0}},
        {"users": math.nan},
        {"Users": 1},
        {"": 1},
        {"x" * 64: 1},
        {"a b": 1},
        {"a'; DROP TABLE tenancy.tenants; --": 1},
        {"requests_per_second": 0},
        {"requests_per_second": math.inf},
        {"requests_per_second": True},
        {"requests_per_second": {"amount": 5}},
    ],
    ids=str,
)
def test_malformed_overrides_are_refused(overrides: dict[str, Any]) -> None:
    """Before anything reaches the database."""
    with pytest.raises(ConfigurationError):
        check_overrides(overrides)


@pytest.mark.parametrize("amount", [-1, 1.5, 1e9, math.nan, math.inf, True, 10**15 + 1, "5"], ids=str)
def test_a_limit_is_a_whole_number(amount: Any) -> None:
    """In the configuration as in an override: one that is not would break the reports of all tenants."""
    with pytest.raises(ConfigurationError, match="whole number"):
        Limit(amount)
    with pytest.raises(ConfigurationError, match="whole number"):
        Tier("odd", {"users": amount})


@pytest.mark.parametrize("soft", [0.8, "0.8", ("a",), (0.0,), (1.5,), (math.nan,), (True,), None], ids=str)
def test_soft_limits_are_fractions(soft: Any) -> None:
    """Above 0 and at most 1; a list, as TOML has it, is as good as a tuple."""
    with pytest.raises(ConfigurationError, match="fractions"):
        Limit(10, soft=soft)
    listed: Any = [0.5, 1]
    assert Limit(10, soft=listed) == Limit(10, soft=(0.5, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"limits": {"Bad Name": 1}},
        {"limits": {"": 1}},
        {"limits": {"requests_per_second": 5}},
        {"requests_per_second": math.nan},
        {"requests_per_second": math.inf},
        {"requests_per_second": True},
        {"requests_per_second": "5"},
        {"requests_per_second": 0},
        {"connection_limit": 1.5},
        {"connection_limit": True},
        {"connection_limit": 0},
    ],
    ids=str,
)
def test_a_tier_that_would_fail_later_is_refused(options: dict[str, Any]) -> None:
    """Where it is written, rather than in every request."""
    with pytest.raises(ConfigurationError, match="tier 'odd'"):
        Tier("odd", **options)


# --- values ---------------------------------------------------------------------------------------------------------


def test_usage_knows_what_remains() -> None:
    """Also where the limit was lowered below what is used, is zero, or is none."""
    assert (Usage("r", 3, 10, "day").remaining, Usage("r", 3, 10, "day").fraction) == (7, 0.3)
    assert (Usage("r", 12, 10, "day").remaining, Usage("r", 12, 10, "day").fraction) == (0, 1.2)
    assert (Usage("r", 3, None, "day").remaining, Usage("r", 3, None, "day").fraction) == (None, 0.0)
    assert (Usage("r", 1, 0, "day").fraction, Usage("r", 0, 0, "day").fraction) == (math.inf, 0.0)


def test_remaining_is_true_where_it_fits() -> None:
    """To the last one."""
    assert Remaining(Usage("r", 9, 10, "day"), 1)
    assert not Remaining(Usage("r", 9, 10, "day"), 2)
    assert Remaining(Usage("r", 9, None, "day"), 10**12)


# --- leases ---------------------------------------------------------------------------------------------------------


class Database(BlockManager):
    """Answers a leased quota's queries one by one, on demand; ``asked`` has those that wait."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[int, int, asyncio.Future[Any]]] = asyncio.Queue()
        self.home = HomeLoop()

    def handle_outcome(self, tenant_id: UUID, resource: str, amount: int, row: Any) -> None:
        if row.outcome == "exceeded":
            raise QuotaExceededError(tenant="acme", resource=resource, limit=0, used=0, requested=amount)

    async def take_block(self, quota: LeasedQuota, block_id: UUID, unspent: int, amount: int, block: int) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.put_nowait((unspent, amount, answer))
        return await answer

    async def return_block(self, block_id: UUID, unspent: int) -> None:
        pass

    def watch(self, quota: LeasedQuota) -> None:
        pass

    def unwatch(self, quota: LeasedQuota) -> None:
        pass

    async def answer(self, granted: int, *, seconds: float | None = None) -> tuple[int, int]:
        """Grant this much to the next query, or refuse it (0), and return how much was unspent and asked for."""
        async with asyncio.timeout(HANGS):
            unspent, amount, waiting = await self.asked.get()
        outcome = "counted" if granted else "exceeded"
        waiting.set_result(SimpleNamespace(outcome=outcome, granted=granted, seconds=seconds, in_blocks=0))
        return unspent, amount


async def test_nothing_is_spent_while_the_database_is_asked() -> None:
    """The query includes the unspent part of the block: spending it as well would count it twice."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    first = asyncio.create_task(share.consume(6))
    await database.answer(10)
    await first
    second = asyncio.create_task(share.consume(5))
    unspent, amount, answer = await database.asked.get()
    assert (unspent, amount) == (4, 5)
    assert not share.try_consume()
    answer.set_result(SimpleNamespace(outcome="counted", granted=1, seconds=None, in_blocks=0))
    await second
    assert share.unspent == 0


async def test_a_block_lasts_from_before_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that took long says how long the period lasts from when it was given: by now it may be over."""
    clock = Clock()
    monkeypatch.setattr("tenancy_orm.quotas.blocks.time", SimpleNamespace(monotonic=clock))
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    task = asyncio.create_task(share.consume())
    unspent, _, answer = await database.asked.get()
    clock.now += 10
    answer.set_result(SimpleNamespace(outcome="counted", granted=10, seconds=5.0, in_blocks=0))
    await task
    assert unspent == 0 and share.unspent == 9
    assert not share.try_consume()


async def test_a_change_that_is_received_while_a_block_is_on_its_way_reaches_it() -> None:
    """The block was granted by the limit as it was: it is returned before more is used."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    task = asyncio.create_task(share.consume())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    share.expire()
    await database.answer(10)
    await task
    assert not share.try_consume()
    task = asyncio.create_task(share.consume())
    assert await database.answer(10) == (0, 1)
    await task
    assert share.try_consume()


async def test_a_refusal_holds_for_those_who_want_as_much_and_for_nobody_else() -> None:
    """A waiting caller that wants less sends its own query; one that wants more gets the same answer."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    tasks = [asyncio.create_task(share.consume(amount)) for amount in (1, 5, 6, 2)]
    await asyncio.sleep(0)
    assert await database.answer(1) == (0, 1)
    assert await database.answer(0) == (0, 5)
    assert await database.answer(2) == (0, 2)
    async with asyncio.timeout(HANGS):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, QuotaExceededError) for result in results] == [False, True, True, False]


# --- rates ----------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


TIERS = {"free": Tier("free", requests_per_second=2), "pro": Tier("pro", requests_per_second=None)}


def tenant(number: int = 1, tier: str = "free", **quotas: Any) -> Tenant:
    """A tenant."""
    return Tenant(UUID(int=number), f"t{number}", Status.ACTIVE, tier, quotas=quotas)


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    """Two a second: two at once, then one every half second."""
    clock = Clock()
    rates = Rates(TIERS, clock=clock)
    assert rates.acquire(tenant()) == Allowed(2, 1, 0.5)
    assert rates.acquire(tenant()) == Allowed(2, 0, 1.0)
    denied = rates.acquire(tenant())
    assert denied == Denied(0.5, 2, 0, 1.0) and not denied.allowed
    clock.now += 0.5
    assert rates.acquire(tenant()).allowed
    assert not rates.acquire(tenant()).allowed


def test_a_denied_request_costs_nothing() -> None:
    """Repeated requests do not delay the next admission."""
    clock = Clock()
    rates = Rates(TIERS, clock=clock)
    answers = [rates.acquire(tenant()) for _ in range(100)]
    assert isinstance(answers[-1], Denied) and answers[-1].retry_after == 0.5


def test_tenants_do_not_share_a_bucket() -> None:
    """One that saturates takes nothing from its neighbour."""
    rates = Rates(TIERS, clock=Clock())
    while rates.acquire(tenant(1)).allowed:
        pass
    assert rates.acquire(tenant(2)).allowed


def test_a_tier_without_a_rate_is_unlimited() -> None:
    """And an unknown tier too: its sessions are refused elsewhere."""
    rates = Rates(TIERS, clock=Clock())
    assert rates.acquire(tenant(tier="pro")) is UNLIMITED and UNLIMITED.allowed
    assert rates.acquire(tenant(tier="gone")) is UNLIMITED
    assert len(rates) == 0


def test_a_tenants_own_rate_overrides_its_tiers() -> None:
    """At once, for the bucket that is in use too."""
    rates = Rates(TIERS, clock=Clock())
    assert rates.acquire(tenant(requests_per_second=10)).limit == 10
    assert rates.acquire(tenant(tier="pro", requests_per_second=0.1)).limit == 1


def test_a_bucket_is_kept_in_tokens_when_the_rate_changes() -> None:
    """A tenant with a higher rate does not wait for what was missing at the lower one, and the reverse."""
    clock = Clock()
    rates = Rates(TIERS, clock=clock)
    assert rates.acquire(tenant(requests_per_second=0.02)).allowed
    assert not rates.acquire(tenant(requests_per_second=0.02)).allowed
    answer = rates.acquire(tenant(requests_per_second=50))
    assert (answer.allowed, answer.limit, answer.remaining) == (True, 50, 48)
    for _ in range(48):
        assert rates.acquire(tenant(requests_per_second=50)).allowed
    answer = rates.acquire(tenant(requests_per_second=2))
    assert isinstance(answer, Denied) and answer.retry_after == pytest.approx(0.5)


def test_processes_share_a_rate() -> None:
    """Each gets its part, an address all of it; a rate too small to divide still lets one through at a time."""
    assert Rates(TIERS, processes=4).rate(tenant()) == 0.5
    assert Rates(TIERS, processes=4, address_rate=20).acquire_address("192.0.2.1").limit == 20
    assert Rates(TIERS, processes=4, clock=Clock()).acquire(tenant()).limit == 1
    for options in ({"processes": 0}, {"burst_seconds": 0.0}):
        with pytest.raises(ValueError, match="at least 1"):
            Rates(TIERS, **options)


def test_full_buckets_are_forgotten() -> None:
    """The memory is that of the tenants of the last second, not of all there ever were."""
    clock = Clock()
    rates = Rates(TIERS, clock=clock)
    for number in range(30_000):
        rates.acquire(tenant(number))
        clock.now += 0.001
    assert len(rates) <= 10_001


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(0.5, 50))
def test_no_window_lets_more_through_than_burst_and_rate(pauses: list[float], rate: float) -> None:
    """Over any stretch of time: at most the burst, and the rate times the stretch."""
    clock = Clock()
    rates = Rates({"free": Tier("free", requests_per_second=rate)}, clock=clock)
    passed: list[float] = []
    for pause in pauses:
        clock.now += pause
        if rates.acquire(tenant()).allowed:
            passed.append(clock.now)
    burst = max(int(rate), 1)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + rate * (passed[last] - passed[first]) + 1e-3


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.1}, {"sustained": timedelta(seconds=-1)}])
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    """Where it is written."""
    with pytest.raises(ConfigurationError):
        TierPolicy(resource="users", **options)


def test_policies_must_fit_the_configuration() -> None:
    """Its tiers, and each by a name of its own: what is recorded of a tenant is recorded under it."""
    config = TenancyConfig(control_url="postgresql://u@h/d")
    with pytest.raises(ConfigurationError, match="gold"):
        config.replace(metering={"tier_policies": (TierPolicy(resource="users", next_tier={"free": "gold"}),)})
    twice = (TierPolicy(resource="users"), TierPolicy(resource="users", apply=True))
    with pytest.raises(ConfigurationError, match=r"users:0\.9"):
        config.replace(metering={"tier_policies": twice})
    named = (twice[0], TierPolicy(name="apply", resource="users", apply=True))
    assert [policy.name for policy in config.replace(metering={"tier_policies": named}).metering.tier_policies] == [
        "users:0.9",
        "apply",
    ]
