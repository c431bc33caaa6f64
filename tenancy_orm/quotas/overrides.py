"""Overrides: a tenant's own limits, which replace those of its tier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from ..config import Limit
from ..config.tiers import RESOURCE_NAME
from ..errors import ConfigurationError

Override: TypeAlias = int | float | Limit | Mapping[str, Any] | None

# the override of the tenant's request rate, which quotas.rates enforces in the process
REQUEST_RATE: Final = "requests_per_second"


def check_overrides(overrides: Mapping[str, Override]) -> dict[str, Any]:
    """Return ``overrides`` as the registry stores them, without those that are None.

    Raises:
        ConfigurationError: a resource's name or a limit is malformed.
    """
    return {name: _check_override(name, value) for name, value in overrides.items() if value is not None}


def _check_override(name: str, value: Override) -> Any:
    if not RESOURCE_NAME.fullmatch(name):
        raise ConfigurationError(f"resource {name!r} must be 1 to 63 of a-z, 0-9, _, . and -, beginning with a letter")
    if name == REQUEST_RATE:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigurationError(f"{REQUEST_RATE} must be a number above 0, not {value!r}")
        return value
    if isinstance(value, Limit):
        return {"amount": value.amount, "period": value.period, "soft": list(value.soft)}
    if isinstance(value, Mapping):
        return _check_mapping(name, value)
    return _limit(name, {"amount": value}).amount


def _check_mapping(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(value) - {"amount", "period", "soft"}
    if unknown or not value:
        raise ConfigurationError(f"the limit of {name!r} has amount, period and soft, not {sorted(map(str, unknown))}")
    limit = _limit(name, value)
    checked = {"amount": limit.amount, "period": limit.period, "soft": list(limit.soft)}
    return {field: checked[field] for field in value}


def _limit(name: str, fields: Mapping[str, Any]) -> Limit:
    # Limit knows what it admits
    try:
        return Limit(**{"amount": None, **fields})
    except ConfigurationError as exc:
        raise ConfigurationError(f"the limit of {name!r} is malformed: {exc}") from exc


__all__ = ["REQUEST_RATE", "Override", "check_overrides"]
