"""The mapping file of an adoption by rows: what its tables become, and what to do where references do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigurationError
from . import toml_values

Strays = Literal["refuse", "follow", "leave"]
Constant = str | int | float | bool

_COLUMN = re.compile(
    r'\s*(?:"((?:[^"]|"")+)"|([A-Za-z_][A-Za-z0-9_$]*))(?:\s*::\s*\w+)?\s*(?:=|\bIN\b|\bIS\b|\bLIKE\b)', re.IGNORECASE
)
_FIELDS = frozenset({"where", "column", "shared", "exclude", "drop", "tables"})
_TABLE_FIELDS = frozenset({"where", "rename", "via", "drop", "columns", "values", "strays"})
_STRAYS = ("refuse", "follow", "leave")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """What a mapping says of one table.

    Attributes:
        where: The rows that belong, as SQL; the root condition, or references, where None.
        rename: The table that it becomes, as ``schema.table``.
        via: The columns of foreign keys that its rows are reached by; all of them where empty.
        drop: Columns that do not come along.
        columns: Columns with another name: from the source's to the target's.
        values: Columns of the target with a constant value.
        strays: What to do with rows that do not belong, and refer to rows that do: refuse, follow (those without a
            customer belong as well), or leave them.
    """

    where: str | None = None
    rename: str | None = None
    via: tuple[str, ...] = ()
    drop: frozenset[str] = frozenset()
    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Constant] = field(default_factory=dict)
    strays: Strays = "refuse"


_PLAIN = TableMapping()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsMapping:
    """What is taken out of a shared database.

    Attributes:
        where: The root condition, as SQL: it holds in every table that has ``column``.
        column: The column that says which customer a row belongs to.
        shared: Tables that are copied whole, as ``schema.table``.
        exclude: Tables that do not come along.
        drop: Columns that do not come along, of every table.
        tables: What is said of single tables.
    """

    where: str
    column: str
    shared: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    drop: frozenset[str] = frozenset()
    tables: Mapping[str, TableMapping] = field(default_factory=dict)

    def of(self, table: str) -> TableMapping:
        """Return what is said of a table, named as ``schema.table``."""
        return self.tables.get(table, _PLAIN)

    @property
    def named(self) -> frozenset[str]:
        """Every table that it names."""
        return self.shared | self.exclude | frozenset(self.tables)

    @classmethod
    def read(cls, path: Path, *, where: str | None = None) -> RowsMapping:
        """Read a mapping file.

        Args:
            path: The file, in TOML.
            where: The root condition, in place of the file's.

        Raises:
            ConfigurationError: the file cannot be read, or says something that is not understood.
        """
        return cls.parse(toml_values.load(path, what="the mapping "), where=where)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str | None = None) -> RowsMapping:
        """Read a mapping from the values of a file.

        Args:
            values: As TOML has them.
            where: The root condition, in place of the file's.

        Raises:
            ConfigurationError: it says something that is not understood.
        """
        toml_values.refuse_unknown(values, _FIELDS, "the mapping")
        condition = where if where is not None else toml_values.text(values, "where", "the mapping")
        if condition is None or not condition.strip():
            raise ConfigurationError('the mapping needs the root condition: where = "tenant_id = 42", or --where')
        column = toml_values.text(values, "column", "the mapping") or _column_of(condition)
        shared, exclude = _tables(values, "shared"), _tables(values, "exclude")
        given = values.get("tables", {})
        if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
            raise ConfigurationError('tables of the mapping are written as [tables."public.name"]')
        tables = {_qualified(name): _table(name, one) for name, one in given.items()}
        if len(tables) != len(given):
            raise ConfigurationError("the mapping names a table twice, with its schema and without it")
        _refuse_twice(shared, exclude, tables)
        return cls(
            where=condition,
            column=column,
            shared=shared,
            exclude=exclude,
            drop=frozenset(toml_values.names(values, "drop", "the mapping")),
            tables=tables,
        )


def _table(name: str, values: Mapping[str, Any]) -> TableMapping:
    place = f"table {name!r} of the mapping"
    toml_values.refuse_unknown(values, _TABLE_FIELDS, place)
    strays = values.get("strays", "refuse")
    if strays not in _STRAYS:
        raise ConfigurationError(f"strays of {place} is one of {', '.join(_STRAYS)}, not {strays!r}")
    columns, constants = values.get("columns", {}), values.get("values", {})
    if not isinstance(columns, dict) or not all(isinstance(one, str) and one for one in columns.values()):
        raise ConfigurationError(f'columns of {place} are written as {{source = "target"}}')
    if not isinstance(constants, dict) or not all(isinstance(one, Constant) for one in constants.values()):
        raise ConfigurationError(f"values of {place} are strings, numbers, true or false")
    if len(set(columns.values())) != len(columns):
        raise ConfigurationError(f"two columns of {place} become one")
    drop = frozenset(toml_values.names(values, "drop", place))
    if both := sorted(drop & columns.keys()):
        raise ConfigurationError(f"column {both[0]!r} of {place} is dropped and renamed: keep one of the two")
    rename = toml_values.text(values, "rename", place)
    return TableMapping(
        where=toml_values.text(values, "where", place),
        rename=None if rename is None else _qualified(rename),
        via=toml_values.names(values, "via", place),
        drop=drop,
        columns=columns,
        values=constants,
        strays=strays,
    )


def _refuse_twice(shared: frozenset[str], exclude: frozenset[str], tables: Mapping[str, TableMapping]) -> None:
    if both := sorted(shared & exclude):
        raise ConfigurationError(f"table {both[0]!r} of the mapping is shared and excluded: keep one of the two")
    if both := sorted(exclude & tables.keys()):
        raise ConfigurationError(f"table {both[0]!r} of the mapping is excluded and described: keep one of the two")
    if both := sorted(name for name in shared & tables.keys() if tables[name].where or tables[name].via):
        raise ConfigurationError(f"table {both[0]!r} of the mapping is shared, and so has neither where nor via")


def _tables(values: Mapping[str, Any], name: str) -> frozenset[str]:
    return frozenset(map(_qualified, toml_values.names(values, name, "the mapping")))


def _qualified(name: str) -> str:
    """A table with its schema, which is ``public`` if it is not said."""
    if name.count(".") > 1 or not all(name.split(".")):
        raise ConfigurationError(f"a table is named as schema.table, not {name!r}")
    return name if "." in name else f"public.{name}"


def _column_of(where: str) -> str:
    """The column that a condition begins with."""
    if (match := _COLUMN.match(where)) is None:
        raise ConfigurationError(
            f'{where!r} does not begin with a column: name the one that says the customer, column = "tenant_id"'
        )
    return match[1].replace('""', '"') if match[1] is not None else match[2].lower()


__all__ = ["RowsMapping", "Strays", "TableMapping"]
