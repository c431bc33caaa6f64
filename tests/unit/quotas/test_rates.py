"""How many requests of a tenant are admitted in a second."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.config import Tier
from tenancy_orm.quotas.rates import UNLIMITED, Allowed, Denied, Rates
from tenancy_orm.tenant import Status, Tenant
from tests.support.control import Clock

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
