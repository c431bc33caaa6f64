"""A tenant's own limits, before anything reaches the database."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tenancy_orm.config import Limit
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.quotas.overrides import Override, check_overrides


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
