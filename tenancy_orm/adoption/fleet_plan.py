"""The plan of a fleet's adoption: which tenants are made of which parts of shared databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..postgres.quoting import quote_literal
from . import toml_values

_COMMON = frozenset({"from", "where", "schema", "with_shared", "without", "accept_differences", "at", "tier", "region"})
_FIELDS = _COMMON | {"mapping", "concurrency", "query"}
_TENANT_FIELDS = _COMMON | {"slug", "server"}
_NOT_OF_ROWS = ("with_shared", "without", "accept_differences")
_KEY, _SCHEMA = "{key}", "{schema}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTenant:
    """A tenant of a plan.

    Attributes:
        slug: Its slug.
        source: The URL of the database.
        where: The root condition of its rows; None where it is a schema or a whole database.
        schema: The schema of the database that it is; None where it is rows or a whole database.
        with_shared: Tables of other schemas that come along with a schema.
        without: Tables of a schema or a whole database that do not come along.
        accept_differences: Whether a schema or a whole database is adopted although it differs from its revision.
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
    without: tuple[str, ...] = ()
    accept_differences: bool = False
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
        defaults: What holds for the query's tenants: ``where`` or ``schema`` has ``{key}`` in the place of the key,
            and ``without`` has ``{schema}`` in the place of the schema.
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
        values = toml_values.load(path)
        mapping = values.get("mapping", {})
        if isinstance(mapping, str):
            mapping = toml_values.load(path.parent / mapping)
        return cls.parse({**values, "mapping": mapping}, source=source, resolve=resolve)

    @classmethod
    def parse(
        cls, values: Mapping[str, Any], *, source: str | None = None, resolve: Callable[[str], str] = str
    ) -> AdoptionPlan:
        """Read a plan from the values of a file; see ``read``.

        Raises:
            ConfigurationError: it says something that is not understood.
        """
        toml_values.refuse_unknown(values, _FIELDS | {"tenants"}, "the plan")
        concurrency, mapping = values.get("concurrency", 4), values.get("mapping", {})
        if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
            raise ConfigurationError(f"concurrency of the plan is a number from 1, not {concurrency!r}")
        if not isinstance(mapping, Mapping):
            raise ConfigurationError("mapping of the plan is a file, or a table")
        url = toml_values.text(values, "from", "the plan")
        common: dict[str, Any] = {name: toml_values.text(values, name, "the plan") for name in ("at", "tier", "region")}
        common |= {name: toml_values.names(values, name, "the plan") for name in ("with_shared", "without")}
        common["accept_differences"] = toml_values.flag(values, "accept_differences", "the plan")
        common["source"] = source if url is None else resolve(url)
        given = values.get("tenants", [])
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise ConfigurationError("tenants of the plan are written as [[tenants]]")
        tenants = tuple(_tenant(one, common, resolve) for one in given)
        query = toml_values.text(values, "query", "the plan")
        keyed = toml_values.texts(values, ("where", "schema"), "the plan")
        if query is None and keyed:
            raise ConfigurationError(f"{next(iter(keyed))} of the plan is for the keys of its query, which is missing")
        if not tenants and query is None:
            raise ConfigurationError("the plan names no tenants: [[tenants]], or a query")
        _refuse_twice(tenants)
        defaults = None if query is None else _defaults(common, keyed)
        return cls(tenants=tenants, query=query, defaults=defaults, mapping=mapping, concurrency=concurrency)

    def at_once(self, concurrency: int) -> AdoptionPlan:
        """Return the same plan with another number of tenants that are made at once."""
        return replace(self, concurrency=concurrency)

    def keyed(self, slug: str, key: str) -> PlannedTenant:
        """Return the tenant of a row of the query."""
        assert self.defaults is not None  # noqa: S101 - a query has them
        found = replace(self.defaults, slug=slug)
        if found.where is not None:
            return _applied(replace(found, where=found.where.replace(_KEY, quote_literal(key))))
        assert found.schema is not None  # noqa: S101 - of a query's tenants, one of both is said
        return _applied(replace(found, schema=found.schema.replace(_KEY, key)))

    def with_keys(self, found: list[tuple[str, str]]) -> tuple[PlannedTenant, ...]:
        """Return all tenants, with those of the query.

        Raises:
            ConfigurationError: two tenants have the same slug, or are the same.
        """
        tenants = (*self.tenants, *(self.keyed(slug, key) for slug, key in found))
        _refuse_twice(tenants)
        return tenants


def _defaults(common: Mapping[str, Any], keyed: Mapping[str, str]) -> PlannedTenant:
    if len(keyed) > 1:
        raise ConfigurationError("the tenants of a query are rows or schemas: set where or schema")
    if not any(_KEY in text for text in keyed.values()):
        raise ConfigurationError(
            f'a query needs the condition of its keys: where = "tenant_id = {_KEY}"; or where they are schemas: '
            f'schema = "{_KEY}"'
        )
    return _made({**common, **keyed, "slug": "query"})


def _tenant(values: Mapping[str, Any], common: Mapping[str, Any], resolve: Callable[[str], str]) -> PlannedTenant:
    slug = toml_values.text(values, "slug", "a tenant of the plan")
    if slug is None:
        raise ConfigurationError("a tenant of the plan has no slug")
    place = f"tenant {slug!r} of the plan"
    toml_values.refuse_unknown(values, _TENANT_FIELDS, place)
    names = ("where", "schema", "tier", "region", "server", "at")
    said: dict[str, Any] = {**toml_values.texts(values, names, place)}
    said |= {name: toml_values.names(values, name, place) for name in ("with_shared", "without") if name in values}
    if "accept_differences" in values:
        said["accept_differences"] = toml_values.flag(values, "accept_differences", place)
    _refuse_unfit(said, place)
    url = toml_values.text(values, "from", place)
    return _applied(_made({**common, **said, "slug": slug, **({} if url is None else {"source": resolve(url)})}))


def _refuse_unfit(said: Mapping[str, Any], place: str) -> None:
    """Refuse what a tenant says itself, and cannot have."""
    if "where" in said and "schema" in said:
        raise ConfigurationError(f"{place} is rows or a schema: set where or schema")
    if "where" in said:
        if unfit := [name for name in _NOT_OF_ROWS if name in said]:
            raise ConfigurationError(f"{place} is rows, and {unfit[0]} is for schemas and databases: leave it out")
    elif "schema" not in said:
        if "with_shared" in said:
            raise ConfigurationError(f"{place} is a whole database, and with_shared is for schemas: leave it out")
        if any(_SCHEMA in name for name in said.get("without", ())):
            raise ConfigurationError(f"{place} is a whole database: {_SCHEMA} in its without has no meaning")


def _made(values: Mapping[str, Any]) -> PlannedTenant:
    if values["source"] is None:
        raise ConfigurationError(f"tenant {values['slug']!r} of the plan has no source: from, or --from")
    return PlannedTenant(**values)


def _applied(one: PlannedTenant) -> PlannedTenant:
    """Leave out what the plan says for tenants of another kind, and put the schema in its places."""
    if one.where is not None:  # rows have their mapping
        return replace(one, with_shared=(), without=(), accept_differences=False)
    if one.schema is None:
        return replace(one, with_shared=(), without=tuple(name for name in one.without if _SCHEMA not in name))
    return replace(one, without=tuple(name.replace(_SCHEMA, one.schema) for name in one.without))


def _refuse_twice(tenants: tuple[PlannedTenant, ...]) -> None:
    slugs: set[str] = set()
    parts: dict[tuple[str, str | None, str | None], str] = {}
    for one in tenants:
        if one.slug in slugs:
            raise ConfigurationError(f"the plan has two tenants {one.slug!r}")
        slugs.add(one.slug)
        if (other := parts.setdefault((one.source, one.where, one.schema), one.slug)) != one.slug:
            raise ConfigurationError(f"tenants {other!r} and {one.slug!r} of the plan are made of the same")


__all__ = ["AdoptionPlan", "PlannedTenant"]
