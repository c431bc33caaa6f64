"""What an export has: which tables and columns, in which files, and what is left out and why."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import ConfigurationError, ExportError
from ..postgres.quoting import quote_identifier
from .catalogue import Catalogue, Column, Relation
from .values import ExportFormat, Value, value_of

_LEFT_OUT_KINDS = {
    "v": "a view: it shows what tables have",
    "m": "a materialized view: it shows what tables have",
    "f": "a foreign table: its rows are in another database",
}
# a file of such a name cannot be made on Windows, with any extension
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST = 80  # characters of a name, before what makes it unique
_KEY_TYPES = frozenset({"int2", "int4", "int8", "uuid"})


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that leaves tables or columns out.

    ``users``, ``public.users`` or ``audit.*`` for tables; ``users:password_hash`` or ``*:*_secret`` for columns.
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Check a rule.

        Raises:
            ConfigurationError: it is none.
        """
        table, separator, column = text.partition(":")
        if not table or (separator and not column) or ":" in column:
            raise ConfigurationError(
                f"{text!r} leaves nothing out: write a table, as users or public.users, or a column, as users:password"
            )
        return cls(text)

    def covers(self, relation: Relation, column: Column | None = None) -> bool:
        """Whether it leaves the table out, or the column."""
        table, _, wanted = self.text.partition(":")
        if bool(wanted) != (column is not None):
            return False
        if not (fnmatchcase(relation.full_name, table) or fnmatchcase(relation.name, table)):
            return False
        return column is None or fnmatchcase(column.name, wanted)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What an export has not, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table in an export.

    Attributes:
        relation: The table.
        values: Its columns.
        path: Its file.
        directory: Where its large values are.
        key: The SQL of the part of a large value's file name that tells the row.
    """

    relation: Relation
    values: tuple[Value, ...]
    path: str
    directory: str
    key: str

    @property
    def large(self) -> tuple[Value, ...]:
        """The columns that can have large values."""
        return tuple(value for value in self.values if value.large is not None)

    def rows_sql(self, row_format: ExportFormat) -> str:
        """The query that COPY writes."""
        columns = ", ".join(value.select for value in self.values)
        query = f"SELECT {columns} FROM {self.relation.sql}"  # noqa: S608 - names are quoted
        if row_format == "csv":
            return query
        row = "whole_row"
        while any(value.column.name == row for value in self.values):  # a column's name would hide the row's
            row += "_"
        return f"SELECT pg_catalog.row_to_json({row})::pg_catalog.text FROM ({query}) {row}"  # noqa: S608 - as before

    def large_sql(self) -> str:
        """The query of the rows that have large values: where each is, its key, and the size of each such value."""
        sizes = "".join(
            f", CASE WHEN {value.large} THEN {value.size}::pg_catalog.int8 END AS size_{number}"
            for number, value in enumerate(self.large)
        )
        where = " OR ".join(str(value.large) for value in self.large)
        return (
            f"SELECT tableoid AS part, ctid AS place, {self.key} AS key{sizes} "  # noqa: S608 - names are quoted
            f"FROM {self.relation.sql} WHERE {where}"
        )

    def content_sql(self, value: Value) -> str:
        """The query of a piece of a large value: from which byte, of how many bytes, of the row at a place."""
        # the place of a row that a snapshot sees does not change
        return (
            f"SELECT pg_catalog.substring({value.content}, $1::pg_catalog.int4, $2::pg_catalog.int4) "  # noqa: S608
            f"FROM {self.relation.sql} WHERE ctid = $3 AND tableoid = $4"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What an export has.

    Attributes:
        row_format: "jsonl" or "csv".
        bound: From how many bytes on a value is a file.
        catalogue: What the database has.
        tables: The tables.
        left_out: What it has not.
        unmatched: Rules for all tenants that have left nothing out.
    """

    row_format: ExportFormat
    bound: int
    catalogue: Catalogue
    tables: tuple[Table, ...]
    left_out: tuple[LeftOut, ...]
    unmatched: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides how the files look, so that another process can go on with them."""
        tables = [
            [table.path, table.rows_sql(self.row_format), [value.column.type for value in table.values]]
            for table in self.tables
        ]
        parts = [self.row_format, self.bound, tables]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_plan(
    catalogue: Catalogue,
    *,
    row_format: ExportFormat,
    bound: int,
    configured: Iterable[str] = (),
    excluded: Iterable[str] = (),
) -> Plan:
    """Decide what an export has.

    Args:
        catalogue: What the database has.
        row_format: "jsonl" or "csv".
        bound: From how many bytes on a value is a file.
        configured: Rules for all tenants, some of which may not have what they name.
        excluded: Rules of the caller, each of which must leave something out.

    Raises:
        ConfigurationError: a rule is none.
        ExportError: a rule of the caller leaves nothing out, or row security would hide rows of a table.
    """
    given, rules = [Rule.parse(text) for text in excluded], [Rule.parse(text) for text in configured]
    used: set[str] = set()
    names, tables, left_out = _Names(), [], []
    hidden: list[str] = []
    for relation in catalogue.relations:
        reason = _reason(relation, [*given, *rules], used)
        if reason is not None:
            left_out.append(LeftOut(relation.full_name, reason))
            continue
        columns = []
        for column in relation.columns:
            matching = [rule for rule in (*given, *rules) if rule.covers(relation, column)]
            used.update(rule.text for rule in matching)
            if matching or not column.is_readable:
                why = "excluded" if matching else "this login may not read it"
                left_out.append(LeftOut(f"{relation.full_name}:{column.name}", why))
            else:
                columns.append(column)
        if relation.hides_rows:
            hidden.append(relation.full_name)
        tables.append(_table(relation, columns, catalogue, names, row_format=row_format, bound=bound))
    if missing := [rule.text for rule in given if rule.text not in used]:
        raise ExportError(f"there is no such table or column to leave out: {', '.join(missing)}")
    if hidden:
        raise ExportError(
            f"row security hides rows of {', '.join(hidden)} from this login, so the export would be incomplete; "
            "leave these tables out (--exclude, export.exclude), or let an operator export"
        )
    if count := catalogue.unreadable_large_objects:
        left_out.append(LeftOut(f"{count} large objects", "this login may not read them"))
    unmatched = tuple(rule.text for rule in rules if rule.text not in used)
    return Plan(row_format, bound, catalogue, tuple(tables), tuple(left_out), unmatched)


def _reason(relation: Relation, rules: Sequence[Rule], used: set[str]) -> str | None:
    """Why a relation is left out as a whole; None where it is not."""
    matching = [rule.text for rule in rules if rule.covers(relation)]
    used.update(matching)
    if matching:
        return "excluded"
    if relation.kind in _LEFT_OUT_KINDS:
        return _LEFT_OUT_KINDS[relation.kind]
    if relation.of_extension:
        return "a table of an extension"
    return None if relation.is_readable else "this login may not read it"


def _table(
    relation: Relation,
    columns: Sequence[Column],
    catalogue: Catalogue,
    names: _Names,
    *,
    row_format: ExportFormat,
    bound: int,
) -> Table:
    name = names.unique(f"{relation.schema}.{relation.name}")
    directory = f"values/{name}"
    key, inside = _key_sql(relation, columns, catalogue), _Names()
    values = tuple(
        value_of(
            column,
            catalogue.types,
            row_format=row_format,
            bound=bound,
            directory=f"{directory}/{inside.unique(column.name)}",
            key=key,
        )
        for column in columns
    )
    return Table(relation, values, f"data/{name}.{row_format}", directory, key)


def _key_sql(relation: Relation, columns: Sequence[Column], catalogue: Catalogue) -> str:
    """The SQL of what tells a row: its primary key where that is a number or a UUID, else the row's place."""
    primary = relation.primary_key
    found = next((column for column in columns if (column.name,) == primary), None)
    if found is not None:
        kind = catalogue.types[found.type_oid]
        if kind.schema == "pg_catalog" and kind.name in _KEY_TYPES:
            return f"{quote_identifier(found.name)}::pg_catalog.text"
    place = "pg_catalog.translate(ctid::pg_catalog.text, ',()', '-')"
    return f"tableoid::pg_catalog.text || '-' || {place}" if relation.kind == "p" else place


class _Names:
    """Makes names of files that every system can have: of ASCII, and no two that differ in case alone."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        safe = _UNSAFE.sub("_", name)[:_LONGEST].strip(".") or "_"
        if _DEVICES.fullmatch(safe):
            safe = f"_{safe}"
        found, number = safe, 1
        while found.lower() in self._taken:
            number += 1
            found = f"{safe}~{number}"
        self._taken.add(found.lower())
        return found


__all__ = ["LeftOut", "Plan", "Rule", "Table", "make_plan"]
