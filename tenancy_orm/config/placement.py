"""Which server a new tenant is placed on: the policies, and how one is written as a setting.

What no policy decides: a server in drain or without room takes no tenant, and a tenant with a region is placed on a
server of that region. Those servers are refused before a policy is asked, and by the control database again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Protocol, TypeAlias, runtime_checkable

from pydantic import PlainValidator, WithJsonSchema

from ..errors import ConfigurationError
from .values import load_object


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementCandidate:
    """A server, as a policy sees it.

    Attributes:
        name: Its name.
        region: Where it is; None: nowhere in particular.
        labels: What else is known of it.
        weight: Its share of the tenants, in proportion to the weights of the others.
        capacity: How many tenants it may hold; None: any number.
        tenants: How many it holds, deleted ones too.
        size_bytes: What their databases took when they were last sampled, together.
    """

    name: str
    region: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    capacity: int | None = None
    tenants: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """A tenant that is to be placed.

    Attributes:
        tier: Its tier.
        region: Where its data has to stay; None: anywhere.
        slug: Its slug; None where nothing is created, and a placement is only explained.
        metadata: Its metadata.
    """

    tier: str
    region: str | None = None
    slug: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


_REGION: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")

Score: TypeAlias = float | tuple[float, ...]
"""The lowest score wins; tuples are compared from their first number on."""

Verdict: TypeAlias = Score | str
"""A score, or text: why the server is refused."""


@runtime_checkable
class PlacementPolicy(Protocol):
    """Rates the servers that may take a tenant; a function with these arguments is one as well, also a coroutine's."""

    def __call__(self, server: PlacementCandidate, request: PlacementRequest, /) -> Verdict | Awaitable[Verdict]:
        """Return a score, of which the lowest wins; or text: why this server is refused."""


def _shown(policy: object) -> str:
    return getattr(policy, "__qualname__", None) or repr(policy)


@dataclass(frozen=True, slots=True)
class FewestTenants:
    """The server with the fewest tenants in proportion to its weight."""

    needs_sizes: ClassVar[bool] = False

    def __call__(self, server: PlacementCandidate, request: PlacementRequest, /) -> Score:
        """Return how many tenants it would hold for each unit of weight."""
        return (server.tenants + 1) / server.weight


@dataclass(frozen=True, slots=True)
class LeastBytes:
    """The server with the smallest databases in proportion to its weight; among empty ones, that with fewest tenants.

    Sizes are those that ``tenancy housekeeping`` samples: a tenant that is younger counts as empty.
    """

    def __call__(self, server: PlacementCandidate, request: PlacementRequest, /) -> Score:
        """Return how many bytes it holds for each unit of weight, and how many tenants."""
        return server.size_bytes / server.weight, (server.tenants + 1) / server.weight


@dataclass(frozen=True, slots=True)
class ByRegion:
    """A server of the first of these regions that has room. A tenant with a region stays in its own.

    Args:
        regions: In order of preference.
        then: Chooses among the servers of one region.
    """

    regions: Sequence[str]
    then: PlacementPolicy = FewestTenants()

    @property
    def needs_sizes(self) -> bool:
        """Whether the sizes of databases are looked at."""
        return bool(getattr(self.then, "needs_sizes", True))

    def __post_init__(self) -> None:
        """Refuse an empty list, and copy what is given."""
        given = _names("ByRegion takes names of regions", self.regions)
        if not given:
            raise ConfigurationError("ByRegion needs one region at least")
        object.__setattr__(self, "regions", tuple(check_region(region) for region in given))

    async def __call__(self, server: PlacementCandidate, request: PlacementRequest, /) -> Verdict:
        """Rate a server by its region first."""
        if request.region is not None:
            return await rate(self.then, server, request)
        if server.region not in self.regions:
            return f"it is in {_region(server.region)}, not in {' or '.join(self.regions)}"
        return _after(self.regions.index(server.region), await rate(self.then, server, request))


@dataclass(frozen=True, slots=True)
class ByTier:
    """Servers for each tier. A tier that is not named gets a server that no other tier has.

    ```python
    from tenancy_orm.config import ByTier

    ByTier({"enterprise": {"disk": "nvme"}, "free": ["shared1", "shared2"]})
    ```

    Args:
        tiers: By tier: the names of servers, or labels that a server must have.
        then: Chooses among the servers of one tier.
    """

    tiers: Mapping[str, Sequence[str] | Mapping[str, str]]
    then: PlacementPolicy = FewestTenants()

    @property
    def needs_sizes(self) -> bool:
        """Whether the sizes of databases are looked at."""
        return bool(getattr(self.then, "needs_sizes", True))

    def __post_init__(self) -> None:
        """Copy what is given."""
        object.__setattr__(self, "tiers", _by_tier(self.tiers))

    async def __call__(self, server: PlacementCandidate, request: PlacementRequest, /) -> Verdict:
        """Refuse the servers of other tiers."""
        if request.tier in self.tiers:
            if not _is_among(server, self.tiers[request.tier]):
                return f"it is not among those for tier {request.tier}"
        else:
            for tier, given in self.tiers.items():
                if _is_among(server, given):
                    return f"it is for tier {tier}"
        return await rate(self.then, server, request)


async def rate(policy: PlacementPolicy, server: PlacementCandidate, request: PlacementRequest) -> Verdict:
    """Return what a policy says of a server.

    Raises:
        ConfigurationError: it returned neither a score nor text.
    """
    found = policy(server, request)
    verdict = await found if isinstance(found, Awaitable) else found
    numbers = verdict if isinstance(verdict, tuple) else (verdict,)
    if isinstance(verdict, str) or all(isinstance(number, (int, float)) and number == number for number in numbers):
        return verdict
    raise ConfigurationError(f"the placement policy {_shown(policy)} returned {verdict!r}, neither a score nor text")


def _after(first: float, verdict: Verdict) -> Verdict:
    if isinstance(verdict, str):
        return verdict
    return (first, *(verdict if isinstance(verdict, tuple) else (verdict,)))


def _region(name: str | None) -> str:
    return "no region" if name is None else f"region {name}"


def _names(what: str, given: object) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(what)
    return tuple(names)


def _by_tier(tiers: object) -> Mapping[str, Sequence[str] | Mapping[str, str]]:
    if not isinstance(tiers, Mapping) or not tiers:
        raise ConfigurationError("ByTier needs servers or labels for one tier at least")
    what = "ByTier takes names of servers, or labels, for each tier"
    return MappingProxyType(
        {
            tier: MappingProxyType(dict(given)) if isinstance(given, Mapping) else _names(what, given)
            for tier, given in tiers.items()
        }
    )


def _is_among(server: PlacementCandidate, given: Sequence[str] | Mapping[str, str]) -> bool:
    if isinstance(given, Mapping):
        return all(server.labels.get(name) == value for name, value in given.items())
    return server.name in given


def check_region(region: object) -> str:
    """Return the name of a region: 1 to 63 of a-z, 0-9, and inner ``. _ -``.

    Raises:
        ConfigurationError: it is not one.
    """
    if not isinstance(region, str) or not _REGION.fullmatch(region):
        raise ConfigurationError(f"{region!r} is not the name of a region: 1 to 63 of a-z, 0-9, and inner . _ -")
    return region


# --- as a setting -----------------------------------------------------------------------------------------------------

_PLAIN: Final[Mapping[str, Callable[[], PlacementPolicy]]] = MappingProxyType(
    {"fewest_tenants": FewestTenants, "least_bytes": LeastBytes}
)
_FORM = "write fewest_tenants, least_bytes, a table with policy = by_region or by_tier, or module:attribute"


def _read_placement(value: object) -> object:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as exc:
            raise ValueError(f"is not JSON: {exc}") from None
    try:
        return _policy(value)
    except ConfigurationError as exc:
        raise ValueError(str(exc)) from None


def _policy(value: object) -> PlacementPolicy | None:
    if value is None:
        return None
    if isinstance(value, str):
        if (plain := _PLAIN.get(value.strip().replace("-", "_"))) is not None:
            return plain()
        if ":" not in value:
            raise ConfigurationError(f"{value!r} is not a policy: {_FORM}")
        value = load_object(value)
        if isinstance(value, type):
            value = value()
    if isinstance(value, Mapping):
        return _from_table(dict(value))
    if not callable(value):
        raise ConfigurationError(f"{type(value).__name__} is not a policy: {_FORM}")
    policy: PlacementPolicy = value
    return policy


def _from_table(table: dict[str, Any]) -> PlacementPolicy:
    kind, then = str(table.pop("policy", "")).replace("-", "_"), _policy(table.pop("then", "fewest_tenants"))
    assert then is not None  # noqa: S101 - for the type checker: it has a default
    wanted = {"by_region": "regions", "by_tier": "tiers"}.get(kind)
    if wanted is None:
        if table or (plain := _PLAIN.get(kind)) is None:
            raise ConfigurationError(f"policy is {kind!r}: {_FORM}")
        return plain()
    given = table.pop(wanted, None)
    if given is None or table:
        raise ConfigurationError(f"{kind} takes {wanted} and then" + (f", not {', '.join(table)}" if table else ""))
    if kind == "by_tier":
        return ByTier(given, then)
    return ByRegion(tuple(given.split(",")) if isinstance(given, str) else tuple(given), then)


Placement = Annotated[
    PlacementPolicy | None,
    PlainValidator(_read_placement),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {
                        "policy": {"enum": ["fewest_tenants", "least_bytes", "by_region", "by_tier"]},
                        "regions": {"type": "array", "items": {"type": "string"}},
                        "tiers": {"type": "object"},
                        "then": {},
                    },
                    "required": ["policy"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]

__all__ = [
    "ByRegion",
    "ByTier",
    "FewestTenants",
    "LeastBytes",
    "PlacementCandidate",
    "PlacementPolicy",
    "PlacementRequest",
    "Score",
    "Verdict",
    "check_region",
    "rate",
]
