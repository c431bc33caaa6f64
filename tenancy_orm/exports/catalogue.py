"""What a tenant's database has: its tables, columns, types and keys, read in the transaction of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..postgres.connections import Connection
from ..postgres.quoting import quote_qualified
from ..provisioning.rights import event_trigger
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA

_OWN_SCHEMAS = (event_trigger.NAME, CHECKPOINTS_SCHEMA, RECORD_SCHEMA)  # this package's records, not the customer's

_RELATIONS = """
SELECT c.oid, n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind,
       pg_catalog.row_security_active(c.oid) AS hides_rows,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND (pg_catalog.has_table_privilege(c.oid, 'SELECT')
         OR pg_catalog.has_any_column_privilege(c.oid, 'SELECT')) AS is_readable,
       EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
               AND d.objid = c.oid AND d.deptype = 'e') AS of_extension,
       CASE WHEN c.relkind = 'p' THEN pg_catalog.pg_get_partkeydef(c.oid) END AS partitioned_by,
       ARRAY(SELECT pn.nspname::text || '.' || p.relname::text FROM pg_catalog.pg_inherits i
               JOIN pg_catalog.pg_class p ON p.oid = i.inhparent
               JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
              WHERE i.inhrelid = c.oid ORDER BY i.inhseqno) AS inherits,
       pg_catalog.obj_description(c.oid, 'pg_class') AS comment
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't' AND NOT c.relispartition
   AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND n.nspname <> ALL ($1::text[])
 ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C"
"""
_COLUMNS = """
SELECT a.attrelid AS relation, a.attname::text AS name, a.atttypid AS type_oid,
       pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, NOT a.attnotnull AS nullable,
       a.attidentity::text AS identity, a.attgenerated::text AS generated,
       pg_catalog.pg_get_expr(d.adbin, d.adrelid) AS default,
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT') AS is_readable,
       pg_catalog.col_description(a.attrelid, a.attnum) AS comment
  FROM pg_catalog.pg_attribute a
  LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = ANY ($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""
_KEYS = """
SELECT c.conrelid AS relation, c.conname::text AS name, c.contype::text AS kind,
       pg_catalog.pg_get_constraintdef(c.oid) AS definition, fn.nspname::text AS other_schema,
       f.relname::text AS other_name, c.confdeltype::text AS on_delete,
       ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(c.conkey) WITH ORDINALITY k (number, place)
               JOIN pg_catalog.pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number
              ORDER BY k.place) AS columns,
       ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(c.confkey) WITH ORDINALITY k (number, place)
               JOIN pg_catalog.pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.number
              ORDER BY k.place) AS other_columns
  FROM pg_catalog.pg_constraint c LEFT JOIN pg_catalog.pg_class f ON f.oid = c.confrelid
  LEFT JOIN pg_catalog.pg_namespace fn ON fn.oid = f.relnamespace
 WHERE c.conrelid = ANY ($1::oid[]) AND c.contype IN ('p', 'u', 'f', 'c', 'x')
   -- a key to a partitioned table has further rows, one for each partition
   AND (c.contype <> 'f' OR c.conparentid = 0)
 ORDER BY c.conrelid, c.contype, c.conname COLLATE "C"
"""
_TYPES = """
SELECT t.oid, n.nspname::text AS schema, t.typname::text AS name, t.typtype::text AS kind, t.typlen AS length,
       t.typcategory::text AS category, t.typbasetype AS base, t.typelem AS element, t.typrelid AS relation,
       CASE WHEN t.typtype = 'd' THEN pg_catalog.format_type(t.typbasetype, t.typtypmod) END AS base_name,
       pg_catalog.obj_description(t.oid, 'pg_type') AS comment,
       ARRAY(SELECT e.enumlabel::text FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid
              ORDER BY e.enumsortorder) AS labels,
       ARRAY(SELECT pg_catalog.pg_get_constraintdef(c.oid) FROM pg_catalog.pg_constraint c
              WHERE c.contypid = t.oid ORDER BY c.conname) AS checks,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0
              AND NOT a.attisdropped ORDER BY a.attnum) AS fields,
       ARRAY(SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0
              AND NOT a.attisdropped ORDER BY a.attnum) AS field_types,
       ARRAY(SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) FROM pg_catalog.pg_attribute a
              WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
              ORDER BY a.attnum) AS field_names
  FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY ($1::oid[])
"""
# an owner may read it, and so may those who were granted SELECT
_LARGE_OBJECTS = """
SELECT m.oid, pg_catalog.pg_has_role(m.lomowner, 'USAGE') OR EXISTS (
         SELECT FROM pg_catalog.aclexplode(m.lomacl) a WHERE a.privilege_type = 'SELECT'
           AND (a.grantee = 0 OR pg_catalog.pg_has_role(a.grantee, 'USAGE'))) AS is_readable
  FROM pg_catalog.pg_largeobject_metadata m
"""
LARGE_OBJECTS = f"SELECT oid FROM ({_LARGE_OBJECTS}) o WHERE is_readable ORDER BY oid"  # noqa: S608 - constants
"""The numbers of those that this login may read."""

_COUNTS = f"""
SELECT count(*) FILTER (WHERE is_readable) AS readable, count(*) FILTER (WHERE NOT is_readable) AS others
  FROM ({_LARGE_OBJECTS}) o
"""  # noqa: S608 - constants

ON_DELETE = {"a": "no action", "r": "restrict", "c": "cascade", "n": "set null", "d": "set default"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """A type of PostgreSQL.

    Attributes:
        oid: Its number.
        schema: Its schema.
        name: Its name.
        kind: "b" base, "c" composite, "d" domain, "e" enum, "r" range, "m" multirange.
        length: In bytes; -1 where it varies.
        category: As pg_type.typcategory.
        base: Of a domain: the type below it.
        element: Of an array: its elements' type.
        base_name: Of a domain: that type's name with its modifier.
        labels: Of an enum.
        checks: Of a domain.
        fields: Of a composite type: names and types.
        field_types: Of a composite type: the types' numbers.
        comment: Its comment.
    """

    oid: int
    schema: str
    name: str
    kind: str
    length: int
    category: str
    base: int
    element: int
    base_name: str | None
    labels: tuple[str, ...]
    checks: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    field_types: tuple[int, ...]
    comment: str | None

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return self.category == "A" and self.element != 0 and self.length == -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    type: str
    type_oid: int
    nullable: bool
    identity: str
    generated: str
    default: str | None
    is_readable: bool
    comment: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A constraint of a table: "p" primary key, "u" unique, "f" foreign key, "c" check, "x" exclusion."""

    name: str
    kind: str
    definition: str
    columns: tuple[str, ...]
    other: str | None
    other_columns: tuple[str, ...]
    on_delete: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A table, view or foreign table.

    Attributes:
        oid: Its number.
        schema: Its schema.
        name: Its name.
        kind: "r" table, "p" partitioned table, "v" view, "m" materialized view, "f" foreign table.
        hides_rows: Whether row security applies to this login.
        is_readable: Whether this login may read some of it.
        of_extension: Whether an extension made it.
        partitioned_by: The key of a partitioned table.
        inherits: The tables that it inherits from.
        comment: Its comment.
        columns: Its columns.
        keys: Its constraints.
    """

    oid: int
    schema: str
    name: str
    kind: str
    hides_rows: bool
    is_readable: bool
    of_extension: bool
    partitioned_by: str | None
    inherits: tuple[str, ...]
    comment: str | None
    columns: tuple[Column, ...]
    keys: tuple[Key, ...]

    @property
    def full_name(self) -> str:
        """With its schema, as people write it."""
        return f"{self.schema}.{self.name}"

    @property
    def sql(self) -> str:
        """As FROM has it: a partitioned table with its partitions, another without those that inherit from it."""
        name = quote_qualified(self.schema, self.name)
        return name if self.kind == "p" else f"ONLY {name}"

    @property
    def primary_key(self) -> tuple[str, ...]:
        """The columns of its primary key; none where it has none."""
        return next((key.columns for key in self.keys if key.kind == "p"), ())


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a database has.

    Attributes:
        relations: By schema and name.
        types: Those of the columns, and what they are made of, by number.
        large_objects: How many this login may read.
        unreadable_large_objects: How many others this login may not read.
    """

    relations: tuple[Relation, ...]
    types: Mapping[int, Type]
    large_objects: int
    unreadable_large_objects: int


async def read_catalogue(connection: Connection) -> Catalogue:
    """Read it, in the transaction that is open."""
    rows = await connection.fetch(_RELATIONS, list(_OWN_SCHEMAS))
    oids = [row["oid"] for row in rows]
    columns: dict[int, list[Column]] = {oid: [] for oid in oids}
    for row in await connection.fetch(_COLUMNS, oids):
        values = dict(row)
        columns[values.pop("relation")].append(Column(**values))
    keys: dict[int, list[Key]] = {oid: [] for oid in oids}
    for row in await connection.fetch(_KEYS, oids):
        keys[row["relation"]].append(_key(row))
    relations = []
    for row in rows:
        values = dict(row)
        values["inherits"] = tuple(values["inherits"])
        oid = values["oid"]
        relations.append(Relation(**values, columns=tuple(columns[oid]), keys=tuple(keys[oid])))
    types = await _read_types(connection, {column.type_oid for found in columns.values() for column in found})
    # a tenant may have millions
    large = await connection.fetchrow(_COUNTS)
    assert large is not None  # noqa: S101 - for the type checker
    return Catalogue(tuple(relations), types, large["readable"], large["others"])


async def _read_types(connection: Connection, wanted: set[int]) -> dict[int, Type]:
    found: dict[int, Type] = {}
    while wanted:
        rows = await connection.fetch(_TYPES, sorted(wanted))
        read = [_type(row) for row in rows]
        found.update((one.oid, one) for one in read)
        below = {oid for one in read for oid in (one.base, one.element if one.is_array else 0, *one.field_types)}
        wanted = below - found.keys() - {0}
    return found


def _type(row: Mapping[str, Any]) -> Type:
    fields: Sequence[str] = row["fields"]
    return Type(
        **{name: row[name] for name in ("oid", "schema", "name", "kind", "length", "category", "base", "element")},
        base_name=row["base_name"],
        labels=tuple(row["labels"]),
        checks=tuple(row["checks"]),
        fields=tuple(zip(fields, row["field_names"], strict=True)),
        field_types=tuple(row["field_types"]),
        comment=row["comment"],
    )


def _key(row: Mapping[str, Any]) -> Key:
    is_foreign = row["kind"] == "f"
    return Key(
        name=row["name"],
        kind=row["kind"],
        definition=row["definition"],
        columns=tuple(row["columns"]),
        other=f"{row['other_schema']}.{row['other_name']}" if is_foreign else None,
        other_columns=tuple(row["other_columns"]),
        on_delete=ON_DELETE.get(row["on_delete"]) if is_foreign else None,
    )


__all__ = ["LARGE_OBJECTS", "Catalogue", "Column", "Key", "Relation", "Type", "read_catalogue"]
