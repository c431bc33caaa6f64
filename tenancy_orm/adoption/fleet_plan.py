"""The plan of a fleet's adoption: which tenants are made of which parts of shared databases."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..postgres.quoting import quote_literal

_FIELDS = frozenset({"from", "mapping", "at", "concurrency", "query", "where", "tier", "region", "with_shared"})
_TENANT_FIELDS = frozenset({"slug", "from", "where", "schema", "tier", "region", "server", "at", "with_shared"})
_KEY = "{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTenant:
    """A tenant of a plan.

    Attributes:
        slug: Its slug.
        source: The URL of the database.
        where: The root condition of its rows; None where it is a schema or a whole database.
        schema: The schema of the database that it is; None where it is rows or a whole database.
        with_shared: Tables of other schemas that come along with a schema.
        at: The revision that it is at, or that rows are brought to.
        tier: Its tier.
        region: Where its data has to stay.
        server: The server to place it on.
    """

    slug: str
    source: str = field(repr=False)
    where: str | None = None
    schema: str | None = None
    with_shared: tuple[str, ...] = ()
    at: str | None = None
    tier: str | None = None
    region: str | None = None
    server: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionPlan:
    """A fleet that is taken out of shared databases.

    Attributes:
        tenants: The tenants that the plan names.
        query: SQL that yields the slug and the key of further tenants; None without any.
        defaults: What holds for the query's tenants: ``where`` has ``{key}`` in the place of the key.
        mapping: The values of the mapping of rows.
        concurrency: How many tenants are made at once.
    """

    tenants: tuple[PlannedTenant, ...]
    query: str | None = None
    defaults: PlannedTenant | None = None
    mapping: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 4

    @classmethod
    def read(cls, path: Path, *, source: str | None = None, resolve: Callable[[str], str] = str) -> AdoptionPlan:
        """Read a plan.

        Args:
            path: The file, in TOML; the mapping's path is relative to it.
            source: The URL of the database, where the file names none.
            resolve: Returns the URL that ``from`` stands for, as ``$NAME`` does.

        Raises:
            ConfigurationError: a file cannot be read, or says something that is not understood.
        """
        values = _load(path)
        mapping = values.get("mapping", {})
        if isinstance(mapping, str):
            mapping = _load(path.parent / mapping)
        return cls.parse({**values, "mapping": mapping}, source=source, resolve=resolve)

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], *, source: str | None = None, resolve: Callable[[str], str] = str
    ) -> AdoptionPlan:
        """Read a plan from the values of a file; see ``read``.

        Raises:
            ConfigurationError: it says something that is not understood.
        """
        _refuse_unknown(values, _FIELDS | {"tenants"}, "the plan")
        concurrency, mapping = values.get("concurrency", 4), values.get("mapping", {})
        if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
            raise ConfigurationError(f"concurrency of the plan is a number from 1, not {concurrency!r}")
        if not isinstance(mapping, Mapping):
            raise ConfigurationError("mapping of the plan is a file, or a table")
        url = _text(values, "from", "the plan")
        common: dict[str, Any] = {name: _text(values, name, "the plan") for name in ("at", "tier", "region")}
        common["with_shared"] = _list(values, "with_shared", "the plan")
        common["source"] = source if url is None else resolve(url)
        given = values.get("tenants", [])
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise ConfigurationError("tenants of the plan are written as [[tenants]]")
        tenants = tuple(_tenant(one, common, resolve) for one in given)
        query, where = _text(values, "query", "the plan"), _text(values, "where", "the plan")
        defaults = None
        if query is not None:
            if where is None or _KEY not in where:
                raise ConfigurationError(f'a query needs the condition of its keys: where = "tenant_id = {_KEY}"')
            defaults = _made({**common, "slug": "query", "where": where})
        elif where is not None:
            raise ConfigurationError("where of the plan is for the keys of its query, which is missing")
        if not tenants and query is None:
            raise ConfigurationError("the plan names no tenants: [[tenants]], or a query")
        _refuse_twice(tenants)
        return cls(tenants=tenants, query=query, defaults=defaults, mapping=mapping, concurrency=concurrency)

    def at_once(self, concurrency: int) -> AdoptionPlan:
        """Return the same plan with another number of tenants that are made at once."""
        return replace(self, concurrency=concurrency)

    def keyed(self, slug: str, key: str) -> PlannedTenant:
        """Return the tenant of a row of the query."""
        assert self.defaults is not None and self.defaults.where is not None  # noqa: S101 - a query has them
        found, where = self.defaults, self.defaults.where.replace(_KEY, quote_literal(key))
        return PlannedTenant(
            slug=slug, source=found.source, where=where, at=found.at, tier=found.tier, region=found.region
        )

    def with_keys(self, found: list[tuple[str, str]]) -> tuple[PlannedTenant, ...]:
        """Return all tenants, with those of the query.

        Raises:
            ConfigurationError: two tenants have the same slug, or are the same.
        """
        tenants = (*self.tenants, *(self.keyed(slug, key) for slug, key in found))
        _refuse_twice(tenants)
        return tenants


def _tenant(values: Mapping[str, Any], common: Mapping[str, Any], resolve: Callable[[str], str]) -> PlannedTenant:
    slug = _text(values, "slug", "a tenant of the plan")
    if slug is None:
        raise ConfigurationError("a tenant of the plan has no slug")
    place = f"tenant {slug!r} of the plan"
    _refuse_unknown(values, _TENANT_FIELDS, place)
    names = ("where", "schema", "tier", "region", "server", "at")
    found = {name: _text(values, name, place) for name in names}
    if found["where"] is not None and found["schema"] is not None:
        raise ConfigurationError(f"{place} is rows or a schema: say where or schema")
    url = _text(values, "from", place)
    said = {name: value for name, value in found.items() if value is not None}
    if "with_shared" in values:
        said["with_shared"] = _list(values, "with_shared", place)  # type: ignore[assignment]
    return _made({**common, **said, "slug": slug, **({} if url is None else {"source": resolve(url)})})


def _made(values: Mapping[str, Any]) -> PlannedTenant:
    if values["source"] is None:
        raise ConfigurationError(f"tenant {values['slug']!r} of the plan has no source: from, or --from")
    # shared tables come along with schemas; rows have their mapping
    shared = values["with_shared"] if values.get("schema") is not None else ()
    return PlannedTenant(**{**values, "with_shared": shared})


def _refuse_twice(tenants: tuple[PlannedTenant, ...]) -> None:
    slugs: set[str] = set()
    parts: dict[tuple[str, str | None, str | None], str] = {}
    for one in tenants:
        if one.slug in slugs:
            raise ConfigurationError(f"the plan has two tenants {one.slug!r}")
        slugs.add(one.slug)
        if (other := parts.setdefault((one.source, one.where, one.schema), one.slug)) != one.slug:
            raise ConfigurationError(f"tenants {other!r} and {one.slug!r} of the plan are made of the same")


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc


def _refuse_unknown(values: Mapping[str, Any], known: frozenset[str], place: str) -> None:
    if unknown := sorted(values.keys() - known):
        raise ConfigurationError(f"{place} has no {unknown[0]!r}; it knows {', '.join(sorted(known))}")


def _text(values: Mapping[str, Any], name: str, place: str) -> str | None:
    found = values.get(name)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise ConfigurationError(f"{name} of {place} is a text, not {found!r}")
    return found


def _list(values: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise ConfigurationError(f"{name} of {place} is a list of names")
    return tuple(found)


__all__ = ["AdoptionPlan", "PlannedTenant"]
