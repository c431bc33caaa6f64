"""Tiers: what a tenant may use, and the rules that move it to the next tier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, Strict, ValidationError, WithJsonSchema
from pydantic_core import from_json

from ..errors import ConfigurationError
from .validation import MODEL, setting_error

UNLIMITED = "unlimited"
"""What stands for no limit where None cannot be written: in the settings file, and on the command line."""

Period = Literal["lifetime", "day", "month", "concurrent"]

RESOURCE_NAME: Final = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
LEAST_WEIGHT: Final = 0.01
LARGEST_WEIGHT: Final = 1_000
LARGEST_AMOUNT: Final = 10**15  # leaves room to add without leaving PostgreSQL's bigint


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of a resource a tenant may use per period.

    ``amount`` is a whole number of the resource's own unit, at most 10**15; None means no limit (usage is still
    counted). ``period``: "lifetime" counts up and down, "day" and "month" start again in the tenant's time zone,
    "concurrent" bounds what is held at one moment. ``soft`` lists fractions of the limit (0.8, say) at which an event
    is raised.
    """

    amount: int | None
    period: Period = "lifetime"
    soft: tuple[float, ...] = (0.8, 1.0)

    def __post_init__(self) -> None:
        """Refuse an amount that cannot be counted, an unknown period, and fractions outside 0 to 1."""
        # of this very type: True is an int too, and 1e9 would reach the database as 1000000000.0
        if self.amount is not None and (type(self.amount) is not int or not 0 <= self.amount <= LARGEST_AMOUNT):
            raise ConfigurationError(f"a limit's amount must be a whole number from 0 to 10**15, not {self.amount!r}")
        if self.period not in get_args(Period):
            raise ConfigurationError(f"unknown period {self.period!r}; use lifetime, day, month or concurrent")
        if not _are_fractions(self.soft):
            raise ConfigurationError(f"soft limits are fractions above 0 and at most 1, not {self.soft!r}")
        object.__setattr__(self, "soft", tuple(self.soft))


def _are_fractions(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(_is_above_zero(value, up_to=1) for value in values)


def _is_above_zero(value: object, *, up_to: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= up_to


@dataclass(frozen=True, slots=True, init=False)
class Tier:
    """A named set of limits.

    Args:
        name: 1 to 31 of a-z, 0-9, _ and -, beginning with a letter.
        limits: A ``Limit`` for each resource; a number is short for ``Limit(number)``, None for no limit.
        requests_per_second: Bounds the request rate of a tenant; None is unbounded.
        connection_limit: The CONNECTION LIMIT of a tenant's PostgreSQL role.
        weight: How much connection time a tenant gets, relative to those of other tiers, where requests have to wait
            for a connection: 0.01 to 1000.
    """

    name: str
    limits: Mapping[str, Limit]
    requests_per_second: float | None
    connection_limit: int
    weight: float

    def __init__(
        self,
        name: str,
        limits: Mapping[str, Limit | int | None] | None = None,
        *,
        requests_per_second: float | None = None,
        connection_limit: int = 20,
        weight: float = 1.0,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
            raise ConfigurationError(f"tier name {name!r} must be 1 to 31 of a-z, 0-9, _ and -, from a letter")
        if type(connection_limit) is not int or connection_limit < 1:
            raise ConfigurationError(f"connection_limit of tier {name!r} must be a whole number of at least 1")
        if not _is_above_zero(weight, up_to=LARGEST_WEIGHT) or weight < LEAST_WEIGHT:
            raise ConfigurationError(
                f"weight of tier {name!r} must be a number from {LEAST_WEIGHT} to {LARGEST_WEIGHT}"
            )
        if requests_per_second is not None and not _is_above_zero(requests_per_second, up_to=LARGEST_AMOUNT):
            raise ConfigurationError(f"requests_per_second of tier {name!r} must be a number above 0")
        for resource in limits or {}:
            if resource == "requests_per_second" or not RESOURCE_NAME.fullmatch(resource):
                raise ConfigurationError(
                    f"resource {resource!r} of tier {name!r} must be 1 to 63 of a-z, 0-9, _, . and -, from a letter; "
                    "requests_per_second is an argument of its own"
                )
        given = {key: value if isinstance(value, Limit) else Limit(value) for key, value in (limits or {}).items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "limits", MappingProxyType(given))
        object.__setattr__(self, "requests_per_second", requests_per_second)
        object.__setattr__(self, "connection_limit", connection_limit)
        object.__setattr__(self, "weight", float(weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPolicy:
    """At ``fraction`` of ``resource`` for ``sustained``, propose or apply the next tier.

    ``TierPolicy(resource="storage_bytes", fraction=0.9, sustained=timedelta(days=3))`` reads: at 90 % of storage for
    three days, propose the next tier. What falls below the fraction between two evaluations starts again, so this suits
    limits per lifetime or month better than those per day.

    Args:
        resource: Which limit.
        fraction: How much of it, above 0 and at most 1.
        sustained: For how long.
        apply: Whether the tier is changed, or only proposed.
        next_tier: The next tier of each; the order of ``TenancyConfig.tiers`` where it is empty.
        name: What distinguishes it from other policies; the resource and the fraction ("storage_bytes:0.9") where it is
            empty.
    """

    resource: str
    fraction: float = 0.9
    sustained: timedelta = timedelta(days=3)
    apply: bool = False
    next_tier: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse a fraction outside 0 to 1, and a negative duration; name what has no name."""
        if not 0 < self.fraction <= 1:
            raise ConfigurationError(f"a tier policy's fraction is above 0 and at most 1, not {self.fraction}")
        if self.sustained < timedelta(0):
            raise ConfigurationError("a tier policy's duration must not be negative")
        object.__setattr__(self, "name", self.name or f"{self.resource}:{self.fraction}")


def default_tiers() -> Mapping[str, Tier]:
    """free, starter, pro and enterprise."""
    gib = 1024**3
    table = {
        "free": (3, 1_000, 1 * gib, 5, 1),
        "starter": (10, 10_000, 10 * gib, 10, 2),
        "pro": (50, 100_000, 100 * gib, 20, 4),
        "enterprise": (None, None, None, 50, 8),
    }
    return MappingProxyType(
        {
            name: Tier(
                name,
                {
                    "users": Limit(users),
                    "api_calls": Limit(calls, "day"),
                    "storage_bytes": Limit(storage),
                },
                connection_limit=connections,
                weight=weight,
            )
            for name, (users, calls, storage, connections, weight) in table.items()
        }
    )


# --- as a settings file, or a variable with JSON in it, writes them ---------------------------------------------------

# Text is no number here: these tables come from TOML or JSON, which have numbers.
_Number = Annotated[float, Strict()]
_Table = TypeVar("_Table", bound=BaseModel)
# What a limit may be is decided by Limit; this is for the JSON Schema.
_Amount = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"const": UNLIMITED}]})]


class _LimitTable(BaseModel):
    model_config = MODEL

    amount: _Amount
    period: Period = "lifetime"
    soft: tuple[_Number, ...] = (0.8, 1.0)


def _table_of_limit(value: object) -> object:
    """A limit's table: an amount alone is short for one."""
    return value if isinstance(value, Mapping) else {"amount": value}


_LimitOrAmount = Annotated[_LimitTable, BeforeValidator(_table_of_limit, json_schema_input_type=_Amount | _LimitTable)]


class _TierTable(BaseModel):
    model_config = MODEL

    limits: dict[str, _LimitOrAmount] = {}
    requests_per_second: _Number | None = None
    connection_limit: Annotated[int, Strict()] = 20
    weight: _Number = 1.0


class _PolicyTable(BaseModel):
    model_config = MODEL

    resource: str
    fraction: _Number = 0.9
    sustained_days: Annotated[_Number, Field(ge=0, le=36_525)] = 3.0
    apply: Annotated[bool, Strict()] = False
    next_tier: dict[str, str] = {}
    name: str = ""


def _checked(model: type[_Table], given: object, place: str) -> _Table:
    """Check one table of several; ``place`` is its name, or its position, in errors."""
    try:
        return model.model_validate(given)
    except ValidationError as exc:
        raise setting_error(exc, (place,)) from None


def _read_json(text: str) -> object:
    try:
        return from_json(text)
    except ValueError as exc:
        raise ValueError(f"is not JSON: {exc}") from None


def _read_tiers(value: object) -> Mapping[str, Tier]:
    if isinstance(value, str):
        value = _read_json(value)
    if not isinstance(value, Mapping) or not value:
        raise ValueError("must be a table of tiers by name")
    tiers = {str(name): _read_tier(str(name), given) for name, given in value.items()}
    for name, tier in tiers.items():
        if name != tier.name:
            raise ValueError(f"tier {tier.name!r} is filed under the name {name!r}")
    return MappingProxyType(tiers)


def _read_tier(name: str, given: object) -> Tier:
    if isinstance(given, Tier):
        return given
    table = _checked(_TierTable, given, name)
    return Tier(
        name,
        {resource: _read_limit(limit) for resource, limit in table.limits.items()},
        requests_per_second=table.requests_per_second,
        connection_limit=table.connection_limit,
        weight=table.weight,
    )


def _read_limit(table: _LimitTable) -> Limit:
    amount = None if table.amount == UNLIMITED else table.amount  # TOML has no null
    return Limit(amount, table.period, table.soft)


def _read_policies(value: object) -> tuple[TierPolicy, ...]:
    if isinstance(value, str):
        value = _read_json(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of tables")
    policies = tuple(_read_policy(str(position), given) for position, given in enumerate(value))
    names = [policy.name for policy in policies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tier policies have the same name: {', '.join(twice)}; give each its own")
    return policies


def _read_policy(position: str, given: object) -> TierPolicy:
    if isinstance(given, TierPolicy):
        return given
    table = _checked(_PolicyTable, given, position)
    return TierPolicy(
        resource=table.resource,
        fraction=table.fraction,
        sustained=timedelta(days=table.sustained_days),
        apply=table.apply,
        next_tier=table.next_tier,
        name=table.name,
    )


Tiers = Annotated[Mapping[str, Tier], PlainValidator(_read_tiers, json_schema_input_type=dict[str, _TierTable])]
TierPolicyList = Annotated[
    tuple[TierPolicy, ...], PlainValidator(_read_policies, json_schema_input_type=list[_PolicyTable])
]
