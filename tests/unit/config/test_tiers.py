"""Tiers, limits and the rules that move a tenant to the next tier."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from tenancy_orm import Limit, TenancyConfig, Tier, TierPolicy
from tenancy_orm.errors import ConfigurationError

URL = "postgresql://admin@db.example/control"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limit(-1),
        lambda: Limit(1, "year"),  # type: ignore[arg-type]
        lambda: Limit(1, soft=(2.0,)),
        lambda: Tier("No!"),
        lambda: Tier("a", connection_limit=0),
        lambda: Tier("a", weight=0.0),
        lambda: Tier("a", weight=1_001),
        lambda: Tier("a", weight="2"),  # type: ignore[arg-type]
        lambda: Tier("a", requests_per_second=0),
        lambda: Tier("a", {"requests_per_second": 1}),
        lambda: TierPolicy(resource="users", fraction=0),
        lambda: TierPolicy(resource="users", sustained=timedelta(days=-1)),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    """At construction."""
    with pytest.raises(ConfigurationError):
        make()


def test_tables_are_read() -> None:
    """As a settings file has them: an amount alone, or a table; "unlimited", since TOML has no null."""
    tables: dict[str, Any] = {
        "tiers": {
            "big": {
                "connection_limit": 7,
                "requests_per_second": 1.5,
                "limits": {
                    "users": "unlimited",
                    "calls": {"amount": "unlimited", "period": "day", "soft": [0.5]},
                    "jobs": 3,
                },
            }
        },
        "metering": {"tier_policies": [{"resource": "users", "fraction": 0.8, "sustained_days": 1.5, "apply": True}]},
    }
    config = TenancyConfig(control_url=URL, default_tier="big", **tables)
    big = config.tiers["big"]
    assert big.limits == {"users": Limit(None), "calls": Limit(None, "day", (0.5,)), "jobs": Limit(3)}
    assert (big.connection_limit, big.requests_per_second) == (7, 1.5)
    assert config.metering.tier_policies == (
        TierPolicy(resource="users", fraction=0.8, sustained=timedelta(days=1.5), apply=True),
    )


def test_tiers_can_be_given_as_json() -> None:
    """By a variable, where there is no file."""
    config = TenancyConfig.from_env(
        {
            "TENANCY_CONTROL_URL": URL,
            "TENANCY_DEFAULT_TIER": "solo",
            "TENANCY_TIERS": '{"solo": {"limits": {"users": 1}}}',
            "TENANCY_METERING_TIER_POLICIES": '[{"resource": "users"}]',
        }
    )
    assert config.tiers["solo"].limits == {"users": Limit(1)}
    assert config.metering.tier_policies == (TierPolicy(resource="users"),)
    with pytest.raises(ConfigurationError, match=r"^tiers \(TENANCY_TIERS\): is not JSON: "):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_TIERS": "{"})


def test_a_table_of_a_tier_may_have_a_weight() -> None:
    """It is 1 without, and the default tiers weigh more, the more they may use."""
    config = TenancyConfig(
        control_url=URL,
        tiers={"a": {"weight": 2}, "b": {}},  # type: ignore[dict-item]
        default_tier="a",
    )
    assert [tier.weight for tier in config.tiers.values()] == [2.0, 1.0]
    assert [tier.weight for tier in TenancyConfig(control_url=URL).tiers.values()] == [1.0, 2.0, 4.0, 8.0]


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
