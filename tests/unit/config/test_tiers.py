"""Tiers, limits and the rules that move a tenant to the next tier."""

from __future__ import annotations

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
