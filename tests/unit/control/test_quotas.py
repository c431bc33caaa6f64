"""What quotas, rates and policies refuse and compute, without a database."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.config import Limit, TenancyConfig, Tier, UpgradePolicy
from tenancy_orm.context import Status, Tenant
from tenancy_orm.control.quotas import Override, Remaining, Usage, check_overrides
from tenancy_orm.control.rates import UNLIMITED, Allowed, Denied, Rates
from tenancy_orm.errors import ConfigurationError

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
    """Hammering does not push the next permission away."""
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


def test_processes_share_a_rate() -> None:
    """Each gets its part; a rate too small to divide still lets one through at a time."""
    assert Rates(TIERS, processes=4).rate(tenant()) == 0.5
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
        UpgradePolicy(resource="users", **options)


def test_policies_must_fit_the_configuration() -> None:
    """Tiers that do not exist, and two that would take turns at one note of the same fraction."""
    config = TenancyConfig(control_url="postgresql://u@h/d")
    with pytest.raises(ConfigurationError, match="gold"):
        config.replace(upgrade_policies=(UpgradePolicy(resource="users", next_tier={"free": "gold"}),))
    twice = (UpgradePolicy(resource="users"), UpgradePolicy(resource="users", apply=True))
    with pytest.raises(ConfigurationError, match="same fraction"):
        config.replace(upgrade_policies=twice)
