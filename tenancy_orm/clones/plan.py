"""Which columns of a tenant's database which rules are about, and whether its constraints allow them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import AnonymisationError
from ..postgres.connections import Connection
from ..postgres.quoting import quote_qualified
from ..provisioning.rights.event_trigger import NAME as GUARD_SCHEMA
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from .rules import AnonymisationRules, ColumnRule, TableRules, is_pattern, matches

_TABLES = """
SELECT c.oid::bigint AS oid, n.nspname::text AS schema, c.relname::text AS name,
       (WITH RECURSIVE above AS (
          SELECT inhparent FROM pg_catalog.pg_inherits WHERE inhrelid = c.oid
          UNION SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN above a ON i.inhrelid = a.inhparent)
        SELECT pg_catalog.array_agg(inhparent::bigint) FROM above) AS above
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
   AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND n.nspname <> ALL ($1)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                      AND e.objid = c.oid AND e.deptype = 'e')
 ORDER BY 2, 3
"""
_KINDS = "SELECT oid::bigint AS oid, relkind = 'p' AS partitioned FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p')"
_COLUMNS = """
WITH RECURSIVE base AS (
  SELECT oid, oid AS type, typtype, typbasetype, typnotnull, typtypmod FROM pg_catalog.pg_type
  UNION ALL SELECT b.oid, t.oid, t.typtype, t.typbasetype, b.typnotnull OR t.typnotnull,
                   CASE WHEN b.typtypmod < 0 THEN t.typtypmod ELSE b.typtypmod END
    FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.typbasetype WHERE b.typtype = 'd')
SELECT a.attrelid::bigint AS oid, a.attname::text AS name, t.typname::text AS type,
       (WITH RECURSIVE within AS (
          SELECT t.oid AS type
          UNION SELECT CASE WHEN i.typcategory = 'A' THEN i.typelem WHEN i.typtype = 'd' THEN i.typbasetype
                            ELSE r.rngsubtype END
            FROM within JOIN pg_catalog.pg_type i ON i.oid = within.type
            LEFT JOIN pg_catalog.pg_range r ON i.oid IN (r.rngtypid, r.rngmultitypid)
           WHERE i.typcategory = 'A' OR i.typtype = 'd' OR r.rngtypid IS NOT NULL)
        SELECT pg_catalog.bool_or(i.typcategory::text = ANY ($2::text[])
                                  AND i.oid <> 'pg_catalog.uuid'::pg_catalog.regtype)
          FROM within JOIN pg_catalog.pg_type i ON i.oid = within.type WHERE i.typtype <> 'd') AS like_text,
       a.attnotnull OR b.typnotnull AS not_null, a.attgenerated <> '' AS generated,
       CASE WHEN a.atttypmod >= 0 THEN a.atttypmod ELSE b.typtypmod END AS modifier
  FROM pg_catalog.pg_attribute a JOIN base b ON b.oid = a.atttypid AND b.typtype <> 'd'
  JOIN pg_catalog.pg_type t ON t.oid = b.type
 WHERE a.attrelid = ANY ($1::bigint[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""
_UNIQUE = """
SELECT i.indrelid::bigint AS oid, ic.relname::text AS name,
       (SELECT pg_catalog.array_agg(a.attname::text) FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey[:i.indnkeyatts - 1])) AS columns,
       i.indexprs IS NULL AS plain, i.indpred IS NOT NULL AS partial
  FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
 WHERE i.indrelid = ANY ($1::bigint[]) AND i.indisunique
"""
_REFERENCES = """
SELECT c.conrelid::bigint AS oid, c.confrelid::bigint AS other, a.attname::text AS name, b.attname::text AS other_name
  FROM pg_catalog.pg_constraint c
 CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(c.conkey), pg_catalog.unnest(c.confkey)) AS k(here, there)
  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.here
  JOIN pg_catalog.pg_attribute b ON b.attrelid = c.confrelid AND b.attnum = k.there
 WHERE c.contype = 'f'
"""
_PARTITION_KEYS = """
SELECT p.partrelid::bigint AS oid, a.attname::text AS name FROM pg_catalog.pg_partitioned_table p
  JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = ANY (p.partattrs)
"""
_BATCHES = f"{CHECKPOINTS_SCHEMA}.data"
_HASHED = frozenset({"text", "varchar", "bpchar", "name", "citext", "bytea", "uuid", "json", "jsonb"})
# strings, addresses of networks, places, composite types, and types of users and extensions, JSON and bytea among them
_LIKE_TEXT = ["S", "I", "G", "C", "U"]
_HASH_LENGTH = 32
_LENGTH_HEADER = 4  # a type's modifier counts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column, and the rule that is about it.

    Attributes:
        name: Its name.
        type: The name of its type, below domains.
        length: How many signs it takes; None for any number.
        generated: Whether PostgreSQL computes it.
        not_null: Whether NULL is refused.
        is_unique: Whether a unique index has this column alone.
        differs: Whether each row should get another value: it is unique, if only among some rows.
        like_text: Whether people's data may be in it, as far as its type tells.
        rule: The rule; None for none.
    """

    name: str
    type: str
    length: int | None
    generated: bool
    not_null: bool
    is_unique: bool
    differs: bool
    like_text: bool
    rule: ColumnRule | None = None

    @property
    def is_changed(self) -> bool:
        """Whether a rule changes its values."""
        return self.rule is not None and self.rule.kind != "keep"


def hash_length(column: Column) -> int:
    """Return how many signs the hash of a text in this column has."""
    return min(_HASH_LENGTH, column.length or _HASH_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueIndex:
    """A unique index: its name and columns, and whether it is about all rows."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with rows of its own.

    Attributes:
        schema: Its schema.
        name: Its name.
        columns: Its columns.
        unique: Its unique indexes of plain columns.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    unique: tuple[UniqueIndex, ...] = ()

    @property
    def label(self) -> str:
        """The table, as ``schema.table``."""
        return f"{self.schema}.{self.name}"

    @property
    def quoted(self) -> str:
        """The table in SQL."""
        return quote_qualified(self.schema, self.name)

    @property
    def is_changed(self) -> bool:
        """Whether rules change values of it."""
        return any(column.is_changed for column in self.columns)


@dataclass(slots=True)
class _Found:
    """What the catalogue says."""

    tables: Mapping[int, Any]
    partitioned: frozenset[int]
    columns: dict[int, list[Any]] = field(default_factory=dict)
    unique: dict[int, list[Any]] = field(default_factory=dict)

    def label(self, oid: int) -> str:
        row = self.tables.get(oid)
        return str(oid) if row is None else f"{row['schema']}.{row['name']}"

    def names(self, oid: int) -> tuple[str, ...]:
        """A table's name, and those of the tables that it is a part of."""
        return (self.label(oid), *(self.label(one) for one in self.tables[oid]["above"] or ()))


async def plan_tables(
    connection: Connection,
    rules: AnonymisationRules | None,
    *,
    own: Collection[str] = (),
    own_schemas: Collection[str] = (),
    require_rules: bool = False,
) -> tuple[Table, ...]:
    """Read the tables, and find the rule of each column.

    Args:
        connection: To the tenant's database.
        rules: The rules; None for none.
        own: Tables of this package or of Alembic, as ``schema.table``, which no rule changes.
        own_schemas: Schemas of this package.
        require_rules: Refuse columns without a rule that may have people's data.

    Raises:
        AnonymisationError: a rule is about nothing, a column has none, or a constraint would be broken.
    """
    found = await _read(connection)
    assigned: dict[tuple[int, str], ColumnRule] = {}
    subject = [
        oid for oid, row in found.tables.items() if found.label(oid) not in own and row["schema"] not in own_schemas
    ]
    if rules is not None:
        _assign(rules, found, subject, assigned)
    tables = {oid: _table(found, oid, assigned) for oid in found.tables}
    problems = [text for oid in subject for text in _broken(tables[oid])]
    problems += await _broken_references(connection, found, tables, assigned)
    if problems:
        raise _refused("the rules break constraints", problems)
    if any(table.is_changed for table in tables.values()):
        await _refuse_batches(connection)
    real = {oid: table for oid, table in tables.items() if oid not in found.partitioned}
    if require_rules:
        missing = [
            f"{table.label}.{column.name}"
            for oid, table in real.items()
            if oid in subject
            for column in table.columns
            if column.rule is None and column.like_text and not column.generated
        ]
        if missing:
            raise _refused('these columns have no rule (write "keep" for what may stay)', missing, columns=missing)
    return tuple(real.values())


async def read_tables(connection: Connection) -> dict[int, Any]:
    """Return the tables, by their oids: each with ``schema``, ``name`` and the oids of those that it is a part of."""
    return {row["oid"]: row for row in await connection.fetch(_TABLES, [GUARD_SCHEMA])}


async def read_names(connection: Connection) -> list[str]:
    """Return the tables' names for LOCK, quoted."""
    return [f"ONLY {quote_qualified(row['schema'], row['name'])}" for row in (await read_tables(connection)).values()]


async def _refuse_batches(connection: Connection) -> None:
    """Refuse a database with a data migration that is half done: it keeps keys of rows, which no rule replaces.

    With other keys, the clone's would not find the rows that are left, either.
    """
    if not await connection.fetchval(f"SELECT pg_catalog.to_regclass('{_BATCHES}') IS NOT NULL"):
        return
    query = f"SELECT EXISTS (SELECT FROM {_BATCHES} WHERE after IS NOT NULL OR until IS NOT NULL)"  # noqa: S608
    if await connection.fetchval(query):
        raise AnonymisationError(
            "a data migration is half done, and keeps keys of rows: finish it with tenancy migrate upgrade, or clone "
            "without rules",
            columns=(f"{_BATCHES}.after", f"{_BATCHES}.until"),
        )


async def _read(connection: Connection) -> _Found:
    tables = await read_tables(connection)
    partitioned = frozenset(row["oid"] for row in await connection.fetch(_KINDS) if row["partitioned"])
    found = _Found(tables, partitioned)
    for row in await connection.fetch(_COLUMNS, list(tables), _LIKE_TEXT):
        found.columns.setdefault(row["oid"], []).append(row)
    for row in await connection.fetch(_UNIQUE, list(tables)):
        found.unique.setdefault(row["oid"], []).append(row)
    return found


def _assign(
    rules: AnonymisationRules, found: _Found, subject: Sequence[int], assigned: dict[tuple[int, str], ColumnRule]
) -> None:
    """Find the columns of each rule. Names that are written out win over patterns."""
    assigned_by: dict[tuple[int, str], tuple[str, bool]] = {}
    nothing: list[str] = []
    for one in sorted(rules.tables, key=lambda table: table.is_pattern):
        oids = [oid for oid in subject if one.is_of(found.names(oid))]
        if not oids:
            nothing.append(f"{one.pattern}: there is no such table")
            continue
        for pattern, rule in sorted(one.columns.items(), key=lambda item: is_pattern(item[0])):
            hits = [
                (oid, row["name"])
                for oid in oids
                for row in found.columns.get(oid, ())
                if matches(row["name"], pattern)
            ]
            if not hits:
                nothing.append(f"{one.pattern}.{pattern}: there is no such column")
            for hit in hits:
                _assign_one(found, one, pattern, hit, rule, assigned, assigned_by)
    if nothing:
        raise _refused("rules match nothing", nothing)


def _assign_one(
    found: _Found,
    table: TableRules,
    pattern: str,
    hit: tuple[int, str],
    rule: ColumnRule,
    assigned: dict[tuple[int, str], ColumnRule],
    assigned_by: dict[tuple[int, str], tuple[str, bool]],
) -> None:
    label = f"{found.label(hit[0])}.{hit[1]}"
    is_guess, written = table.is_pattern or is_pattern(pattern), f"{table.pattern}.{pattern}"
    other, other_is_guess = assigned_by.get(hit, ("", True))
    if not other or (other_is_guess and not is_guess):
        assigned[hit] = rule
        assigned_by[hit] = written, is_guess
    # a partition's own name and that of its table are both written out
    elif is_guess is other_is_guess and assigned[hit] != rule:
        raise _refused("two rules match one column", [f"{label}: {other} and {written}"])


def _table(found: _Found, oid: int, assigned: Mapping[tuple[int, str], ColumnRule]) -> Table:
    row = found.tables[oid]
    indexes = [one for one in found.unique.get(oid, ()) if one["plain"]]
    unique = [one for one in indexes if not one["partial"]]
    alone = {one["columns"][0] for one in unique if len(one["columns"]) == 1}
    differing = {one["columns"][0] for one in indexes if len(one["columns"]) == 1}
    return Table(
        schema=row["schema"],
        name=row["name"],
        columns=tuple(
            _column(one, alone, differing, assigned.get((oid, one["name"]))) for one in found.columns.get(oid, ())
        ),
        unique=tuple(UniqueIndex(name=one["name"], columns=tuple(one["columns"])) for one in unique),
    )


def _column(row: Any, alone: Collection[str], differing: Collection[str], rule: ColumnRule | None) -> Column:
    limited = row["type"] in ("varchar", "bpchar") and row["modifier"] >= _LENGTH_HEADER
    return Column(
        name=row["name"],
        type=row["type"],
        length=row["modifier"] - _LENGTH_HEADER if limited else None,
        generated=row["generated"],
        not_null=row["not_null"],
        is_unique=row["name"] in alone,
        differs=row["name"] in differing,
        like_text=row["like_text"],
        rule=rule,
    )


def _broken(table: Table) -> Iterator[str]:
    for column in table.columns:
        if column.rule is None or not column.is_changed:
            continue
        label = f"{table.label}.{column.name}"
        if column.generated:
            yield f"{label}: PostgreSQL computes it; write rules for the columns that it is computed from"
        elif column.rule.kind == "null" and column.not_null:
            yield f"{label}: null, but it is NOT NULL"
        elif column.rule.kind == "constant" and column.is_unique:
            yield f"{label}: constant, but it is UNIQUE"
        elif column.rule.kind == "hash" and column.type not in _HASHED:
            yield f"{label}: hash, but it is {column.type}; a hash is a text, uuid, json or bytea"


async def _broken_references(
    connection: Connection,
    found: _Found,
    tables: Mapping[int, Table],
    assigned: Mapping[tuple[int, str], ColumnRule],
) -> list[str]:
    problems = []
    changed = {hit: rule for hit, rule in assigned.items() if rule.kind != "keep"}
    for row in await connection.fetch(_REFERENCES):
        here, there = changed.get((row["oid"], row["name"])), changed.get((row["other"], row["other_name"]))
        if here is not None and here.kind == "null":
            continue  # what is NULL refers to nothing
        what = f"{found.label(row['oid'])}.{row['name']} refers to {found.label(row['other'])}.{row['other_name']}"
        if here != there or (here is not None and here.kind != "hash"):
            problems.append(f"{what}: write hash for both, or null for the first")
        elif here is not None and _form(tables[row["oid"]], row["name"]) != _form(
            tables[row["other"]], row["other_name"]
        ):
            problems.append(f"{what}: hashes of these two types differ; write null for the first")
    for row in await connection.fetch(_PARTITION_KEYS):
        problems += [
            f"{found.label(oid)}.{name}: it decides which partition a row belongs to"
            for oid, name in changed
            if name == row["name"] and row["oid"] in (oid, *(found.tables[oid]["above"] or ()))
        ]
    return list(dict.fromkeys(problems))


def _form(table: Table, name: str) -> tuple[str, int]:
    """Return what the hash of a value depends on beside the value."""
    (column,) = (one for one in table.columns if one.name == name)
    # bpchar without the spaces that fill it up is the text
    kind = column.type if column.type in ("citext", "uuid", "bytea", "json", "jsonb") else "text"
    return kind, hash_length(column)


def _refused(what: str, problems: Sequence[str], *, columns: Sequence[str] | None = None) -> AnonymisationError:
    named = columns if columns is not None else [problem.partition(":")[0] for problem in problems]
    listed = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return AnonymisationError(f"{what}: {listed}", columns=tuple(named))


__all__ = ["Column", "Table", "UniqueIndex", "hash_length", "plan_tables", "read_names", "read_tables"]
