"""Waves: which tenants a run migrates first, and what must hold before it goes on with the others.

Nothing here connects to a database: waves are what was asked for, as values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias
from uuid import UUID

from ..config.values import load_object
from ..errors import ConfigurationError
from ..tenant import Status, Tenant, TenantRef

CHECK_SECONDS = 600.0
"""How long a command or function of a wave may take, by default."""

Labels: TypeAlias = Mapping[str, str | Sequence[str] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """A part of a run: the tenants that it is for, and what must hold before the next wave begins.

    A tenant belongs to the first wave that chooses it. The conditions (``tenants``, ``tiers``, ``statuses``,
    ``regions``, ``servers``, ``labels``) must all hold; of the values of one, any does. ``percent`` or ``count`` then
    take a part of these tenants; ``rest`` takes all that no earlier wave has.

    When all its tenants are done, ``error_budget`` is compared with the share of them that failed. After ``wait``
    seconds the commands run, then the functions. At last, with ``pause``, the run waits for an operator.

    Args:
        name: Its name; where empty, what it chooses.
        tenants: Slugs, ids or ``Tenant`` objects.
        tiers: Names of tiers.
        statuses: Statuses.
        regions: Regions.
        servers: Names of servers.
        labels: Metadata that the tenants have: ``{"cohort": "beta"}``, several values, or None for any value.
        percent: How many per cent of the tenants that meet the conditions, rounded up; by a hash of the id.
        count: How many of them, by the same hash.
        rest: All the others. Only the last wave may be this one.
        error_budget: The share of this wave's tenants that may fail, 0 to 1.
        wait: Seconds between its end and its checks.
        commands: Programs with their arguments, split as a shell does. Exit status 0 lets the run go on.
        functions: ``module:function``, or the functions themselves. Called with a ``WaveReport``; False, or a text
            with the reason, stops the run.
        check_timeout: Seconds that each command and each function may take.
        pause: Whether the run pauses when everything else held, until it is resumed.

    Raises:
        ConfigurationError: it chooses nothing, or a value is out of range.
    """

    name: str = ""
    tenants: Sequence[TenantRef] = ()
    tiers: Sequence[str] = ()
    statuses: Sequence[str] = ()
    regions: Sequence[str] = ()
    servers: Sequence[str] = ()
    labels: Labels = field(default_factory=dict)
    percent: float | None = None
    count: int | None = None
    rest: bool = False
    error_budget: float = 0.0
    wait: float = 0.0
    commands: Sequence[str] = ()
    functions: Sequence[str | Callable[..., Any]] = ()
    check_timeout: float = CHECK_SECONDS
    pause: bool = False

    def __post_init__(self) -> None:
        """Take single values as well as several, and refuse what cannot be meant."""
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(getattr(self, name)))
        object.__setattr__(self, "name", self.name or self._title())
        self._check()

    def _check(self) -> None:
        parts = (self.percent is not None) + (self.count is not None) + self.rest
        if parts > 1:
            raise ConfigurationError(f"wave {self.name!r}: give one of percent, count and rest")
        if self.rest and self._has_conditions:
            raise ConfigurationError(f"wave {self.name!r}: rest takes all the others, so it has no conditions")
        if not parts and not self._has_conditions:
            raise ConfigurationError(
                f"wave {self.name!r} chooses no tenants; give tenants, tiers, statuses, regions, servers, labels, "
                "percent, count or rest"
            )
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ConfigurationError(f"wave {self.name!r}: {self.percent:g} % is not above 0 and at most 100")
        if self.count is not None and self.count < 1:
            raise ConfigurationError(f"wave {self.name!r}: a count is at least 1")
        if not 0 <= self.error_budget <= 1:
            raise ConfigurationError(f"wave {self.name!r}: error_budget is a share from 0 to 1, or 0% to 100%")
        if not (0 <= self.wait < math.inf and 0 < self.check_timeout < math.inf):
            raise ConfigurationError(f"wave {self.name!r}: wait and check_timeout are seconds, and not negative")
        known = {status.value for status in Status}
        if unknown := sorted(set(self.statuses) - known):
            raise ConfigurationError(f"wave {self.name!r}: there is no status {unknown[0]!r}")

    @property
    def _has_conditions(self) -> bool:
        return any((self.tenants, self.tiers, self.statuses, self.regions, self.servers, self.labels))

    @property
    def has_checks(self) -> bool:
        """Whether anything besides the error budget is between this wave and the next."""
        return bool(self.wait or self.commands or self.functions or self.pause)

    def meets(self, tenant: Tenant) -> bool:
        """Whether a tenant meets the conditions."""
        placement = tenant.placement
        return (
            (not self.tenants or tenant.slug in self.tenants or str(tenant.id) in self.tenants)
            and (not self.tiers or tenant.tier in self.tiers)
            and (not self.statuses or tenant.status.value in self.statuses)
            and (not self.regions or tenant.region in self.regions)
            and (not self.servers or (placement is not None and placement.server in self.servers))
            and all(_has_label(tenant.metadata, key, values) for key, values in self.labels.items())
        )

    def size(self, available: int) -> int:
        """Return how many of ``available`` tenants that meet the conditions it takes."""
        if self.percent is not None:
            return math.ceil(round(available * self.percent / 100, 9))
        return available if self.count is None else min(self.count, available)

    def as_json(self) -> dict[str, Any]:
        """Return the wave as JSON values, without what has its default."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value in ((), {}, None) or value == item.default:
                continue
            found[item.name] = list(value) if isinstance(value, tuple) else value
        if "labels" in found:
            found["labels"] = {key: values and list(values) for key, values in self.labels.items()}
        return found

    def gate(self) -> str:
        """Return in words what is between this wave and the next."""
        parts = [f"at most {self.error_budget * 100:g} % failed" if self.error_budget else "none failed"]
        parts += [f"wait {self.wait:g} s"] * bool(self.wait)
        parts += [f"command {text}" for text in self.commands] + [f"function {text}" for text in self.functions]
        return ", ".join(parts + ["pause"] * self.pause)

    def _title(self) -> str:
        if self.rest:
            return "rest"
        words = [] if self.percent is None else [f"{self.percent:g}%"]
        words += [] if self.count is None else [str(self.count)]
        for word in ("tenant", "tier", "status", "region", "server"):
            values = getattr(self, _PLURALS[word])
            shown = ",".join(map(str, values[:3])) + (",..." if len(values) > 3 else "")
            words += [f"{word}={shown}"] if values else []
        for key, values in self.labels.items():
            words.append(f"label={key}" + ("" if values is None else f"={','.join(values)}"))
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Waves:
    """The waves of a run, in order. Where the last one is not ``rest``, one is added: a run leaves nobody out.

    Percentages and counts take tenants by a hash of ``seed`` and the tenant's id. So the same tenants go first in each
    run, but for some of those that were created since, until another seed is given.

    Args:
        waves: The waves.
        seed: Any text.

    Raises:
        ConfigurationError: a wave follows ``rest``, or it pauses.
    """

    waves: tuple[Wave, ...] = ()
    seed: str = ""

    def __post_init__(self) -> None:
        """Add the wave of the others."""
        waves = tuple(self.waves)
        if any(wave.rest for wave in waves[:-1]):
            raise ConfigurationError("the wave that takes the rest must be the last one")
        if any(wave.rest and wave.pause for wave in waves):
            raise ConfigurationError("nothing comes after the wave that takes the rest: let the one before it pause")
        if not waves or not waves[-1].rest:
            waves = (*waves, Wave(name="rest" if waves else "all", rest=True))
        object.__setattr__(self, "waves", waves)

    def __len__(self) -> int:
        """Return how many waves there are."""
        return len(self.waves)

    def __getitem__(self, number: int) -> Wave:
        """Return a wave by its number, from 0."""
        return self.waves[number]

    @property
    def last(self) -> int:
        """The number of the last wave, which tenants belong to that are created during the run."""
        return len(self.waves) - 1

    def assign(self, tenants: Sequence[Tenant]) -> list[int]:
        """Return the number of the wave, from 0, that each of ``tenants`` belongs to.

        Raises:
            ConfigurationError: a wave names a tenant that is not one of them.
        """
        self._check_names(tenants)
        found: dict[UUID, int] = {}
        for number, wave in enumerate(self.waves):
            meeting = [tenant for tenant in tenants if wave.meets(tenant)]
            # of all that meet the conditions: 5 % twice are 10 %
            size = wave.size(len(meeting))
            left = [tenant for tenant in meeting if tenant.id not in found]
            if size < len(left):
                left = sorted(left, key=self._rank)[:size]
            found.update((tenant.id, number) for tenant in left)
        return [found[tenant.id] for tenant in tenants]

    def check(self, *, tiers: Collection[str], servers: Collection[str]) -> None:
        """Refuse tiers and servers that do not exist: such a wave would choose nobody.

        Raises:
            ConfigurationError: there is one.
        """
        for wave in self.waves:
            for kind, named, known in (("tier", wave.tiers, tiers), ("server", wave.servers, servers)):
                if unknown := [name for name in named if name not in known]:
                    raise ConfigurationError(
                        f"wave {wave.name!r}: there is no {kind} {unknown[0]!r}; there are {', '.join(sorted(known))}"
                    )

    def as_json(self) -> dict[str, Any]:
        """Return them as a part of a run's plan: JSON values by ``waves`` and ``wave_seed``."""
        return {"waves": [wave.as_json() for wave in self.waves], "wave_seed": self.seed}

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> Waves:
        """Return the waves of a run's plan; one for all tenants where it has none."""
        return cls(tuple(Wave(**wave) for wave in plan.get("waves") or ()), plan.get("wave_seed", ""))

    def _rank(self, tenant: Tenant) -> bytes:
        return hashlib.sha256(f"{self.seed}\0{tenant.id}".encode()).digest()

    def _check_names(self, tenants: Sequence[Tenant]) -> None:
        known = {tenant.slug for tenant in tenants} | {str(tenant.id) for tenant in tenants}
        for wave in self.waves:
            if unknown := [name for name in wave.tenants if name not in known]:
                raise ConfigurationError(f"wave {wave.name!r} names {unknown[0]!r}, which is not a tenant of this run")


def _has_label(metadata: Mapping[str, Any], key: str, wanted: Sequence[str] | None) -> bool:
    if key not in metadata:
        return False
    if wanted is None:
        return True
    found = metadata[key]
    return any(_text(value) in wanted for value in (found if isinstance(found, (list, tuple)) else [found]))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- values as they are given -----------------------------------------------------------------------------------------


def _texts(value: str | Iterable[str]) -> tuple[str, ...]:
    return (str(value),) if isinstance(value, str) else tuple(str(one) for one in value)


def _names(value: TenantRef | Iterable[TenantRef]) -> tuple[str, ...]:
    values = (value,) if isinstance(value, (str, UUID, Tenant)) else value
    return tuple(str(one.id) if isinstance(one, Tenant) else str(one) for one in values)


def _label_values(value: Labels) -> dict[str, tuple[str, ...] | None]:
    return {key: None if values is None else _texts(values) for key, values in value.items()}


def _functions(value: str | Callable[..., Any] | Iterable[str | Callable[..., Any]]) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) or callable(value) else value
    return tuple(one if isinstance(one, str) else _path_of(one) for one in values)


def _path_of(function: Callable[..., Any]) -> str:
    """Return ``module:function``: every machine of a run must be able to call it."""
    path = f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"
    try:
        found = load_object(path)
    except ConfigurationError:
        found = None
    if found is not function:
        raise ConfigurationError(
            f"{path} is not found by that name, so that other machines could not call it; give a function of a module"
        )
    return path


_READERS: dict[str, Callable[[Any], Any]] = {
    "tenants": _names,
    "tiers": _texts,
    "statuses": _texts,
    "regions": _texts,
    "servers": _texts,
    "labels": _label_values,
    "commands": _texts,
    "functions": _functions,
}
_PLURALS = {"tenant": "tenants", "tier": "tiers", "status": "statuses", "region": "regions", "server": "servers"}

__all__ = ["CHECK_SECONDS", "Wave", "Waves"]
