"""What a source contains: its tables with their rows, its extensions, and what a schema refers to outside of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from ..errors import AdoptionError
from ..postgres.connections import Connection
from ..postgres.login import reason_of
from ..provisioning.copies.empty_databases import InstalledExtension, read_extensions
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA
from .source import OpenSource

_MEMBER = """NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.deptype = 'e'
  AND e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND e.objid = c.oid)"""
_TABLES = f"""
SELECT n.nspname::text AS schema, c.relname::text AS name, c.oid::bigint AS oid,
       pg_catalog.has_table_privilege(c.oid, 'SELECT') AS readable
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND ($1::text IS NULL OR n.nspname = $1 OR n.nspname || '.' || c.relname = ANY($2::text[]))
   AND {_MEMBER}
 ORDER BY 1, 2
"""  # noqa: S608 - constants
_SHARED = """
SELECT n.nspname || '.' || c.relname AS name, c.relkind::text AS kind
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname || '.' || c.relname = ANY($1::text[])
"""
# What objects of the schema, and shared tables, need of others. A foreign key's index comes with its table.
_REFERENCES = """
WITH relation AS (
  SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE n.nspname = $1 OR n.nspname || '.' || c.relname = ANY($2::text[])),
inside AS (
  SELECT 'pg_catalog.pg_class'::pg_catalog.regclass AS class, oid FROM relation
  UNION ALL SELECT 'pg_catalog.pg_proc'::pg_catalog.regclass, p.oid FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_namespace n ON n.oid = pronamespace WHERE n.nspname = $1
  UNION ALL SELECT 'pg_catalog.pg_type'::pg_catalog.regclass, t.oid FROM pg_catalog.pg_type t
    JOIN pg_catalog.pg_namespace n ON n.oid = typnamespace WHERE n.nspname = $1
  UNION ALL SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass, oid FROM pg_catalog.pg_constraint
     WHERE conrelid IN (TABLE relation)
  UNION ALL SELECT 'pg_catalog.pg_attrdef'::pg_catalog.regclass, oid FROM pg_catalog.pg_attrdef
     WHERE adrelid IN (TABLE relation)
  UNION ALL SELECT 'pg_catalog.pg_rewrite'::pg_catalog.regclass, oid FROM pg_catalog.pg_rewrite
     WHERE ev_class IN (TABLE relation)
  UNION ALL SELECT 'pg_catalog.pg_trigger'::pg_catalog.regclass, oid FROM pg_catalog.pg_trigger
     WHERE tgrelid IN (TABLE relation) AND NOT tgisinternal
  UNION ALL SELECT 'pg_catalog.pg_policy'::pg_catalog.regclass, oid FROM pg_catalog.pg_policy
     WHERE polrelid IN (TABLE relation))
SELECT DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, 0) AS by, i.type AS kind,
       (SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class c
          JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND c.oid = d.refobjid) AS named,
       i.identity AS identity
  FROM pg_catalog.pg_depend d JOIN inside ON inside.class = d.classid AND inside.oid = d.objid
 CROSS JOIN LATERAL pg_catalog.pg_identify_object(d.refclassid, d.refobjid, 0) i
 WHERE d.deptype IN ('n', 'a') AND i.schema IS NOT NULL AND i.type NOT IN ('index', 'toast table')
   AND i.schema NOT IN (pg_catalog.quote_ident($1), 'pg_catalog', 'information_schema')
   AND NOT (d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid IN (TABLE relation))
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e
                    WHERE e.deptype = 'e' AND e.classid = d.refclassid AND e.objid = d.refobjid)
 ORDER BY 4, 1
"""
# partitions that a dump of their tables does not take along
_PARTITIONS = """
SELECT DISTINCT n.nspname || '.' || c.relname AS of, n.nspname = $1 AS is_own, n.nspname = pn.nspname AS is_beside,
       pn.nspname || '.' || p.relname AS partition
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 CROSS JOIN LATERAL pg_catalog.pg_partition_tree(c.oid) tree
  JOIN pg_catalog.pg_class p ON p.oid = tree.relid JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
 WHERE c.relkind = 'p' AND (n.nspname = $1 OR n.nspname || '.' || c.relname = ANY($2::text[]))
   AND n.nspname || '.' || c.relname <> ALL($3::text[]) AND tree.relid <> c.oid
   AND pn.nspname <> $1 AND pn.nspname || '.' || p.relname <> ALL($2::text[])
 ORDER BY 1, 3
"""
# what is not part of an extension, and needs something that is
_USED_EXTENSIONS = """
SELECT DISTINCT x.extname::text AS name
  FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_depend m ON m.deptype = 'e' AND m.classid = d.refclassid AND m.objid = d.refobjid
  JOIN pg_catalog.pg_extension x ON x.oid = m.refobjid
 WHERE d.deptype IN ('n', 'a') AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend o
         WHERE o.deptype = 'e' AND o.classid = d.classid AND o.objid = d.objid)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_extension own
                    WHERE d.classid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND own.oid = d.objid)
"""
# tables that are left out, with their partitions, and the sequences of their columns
_WITHOUT = """
WITH named AS (
  SELECT DISTINCT COALESCE(tree.relid, c.oid) AS oid
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN LATERAL pg_catalog.pg_partition_tree(c.oid) tree ON true
   WHERE n.nspname || '.' || c.relname = ANY($1::text[]) AND c.relkind IN ('r', 'p', 'v', 'm', 'f'))
SELECT n.nspname::text AS schema, c.relname::text AS name, true AS named FROM named
  JOIN pg_catalog.pg_class c ON c.oid = named.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
UNION ALL
SELECT n.nspname::text, s.relname::text, false FROM pg_catalog.pg_depend d JOIN named ON named.oid = d.refobjid
  JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S'
  JOIN pg_catalog.pg_namespace n ON n.oid = s.relnamespace
 WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid
   AND d.deptype IN ('a', 'i')
"""
_LARGE_OBJECTS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)"
_MATERIALIZED = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid
"""


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A table of the source with rows: partitioned tables are counted by their partitions."""

    schema: str
    name: str
    rows: int | None = None

    @property
    def label(self) -> str:
        """The table as ``schema.table``."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a source contains, of one snapshot.

    Attributes:
        tables: Its tables.
        extensions: The extensions that it uses.
        unused: The names of extensions that nothing in it uses.
        filled: Materialized views with contents, quoted.
        notes: What does not come along, and is not missed by the database itself.
        without: Schemas and names of the tables and sequences that are left out.
    """

    tables: tuple[SourceTable, ...]
    extensions: tuple[InstalledExtension, ...]
    unused: tuple[str, ...]
    filled: frozenset[str]
    notes: tuple[str, ...]
    without: tuple[tuple[str, str], ...] = ()


async def read_contents(opened: OpenSource) -> Contents:
    """Read what a source contains, and count the rows of its tables.

    Raises:
        AdoptionError: there is nothing to adopt, the login may not read everything, or a schema needs something that
            does not come along.
    """
    source, connection = opened.source, opened.connection
    notes = [] if source.schema is None else await _check_schema(opened)
    without = await connection.fetch(_WITHOUT, list(source.without))
    there = {f"{row['schema']}.{row['name']}" for row in without if row["named"]}
    if unknown := [name for name in source.without if name not in there]:
        raise AdoptionError(f"{source.dsn} has no table {unknown[0]!r} to leave out")
    rows = await connection.fetch(_TABLES, source.schema, list(source.shared))
    left = {CHECKPOINTS_SCHEMA, RECORD_SCHEMA} if source.schema is None else set()
    found = [row for row in rows if row["schema"] not in left and f"{row['schema']}.{row['name']}" not in there]
    if not found:
        raise AdoptionError(f"{source} has no tables: there is nothing to adopt")
    if closed := [f"{row['schema']}.{row['name']}" for row in found if not row["readable"]]:
        raise AdoptionError(f"role {opened.role!r} may not read {first_of(closed)} of {source}; grant it SELECT there")
    tables = [await _count(opened, row["schema"], row["name"]) for row in found]
    used = {row["name"] for row in await connection.fetch(_USED_EXTENSIONS)}
    installed = await read_extensions(connection)
    if source.schema is not None and await connection.fetchval(_LARGE_OBJECTS):
        notes.append("the large objects of the source's database belong to no schema, and are not copied")
    return Contents(
        tables=tuple(tables),
        extensions=tuple(one for one in installed if one.name in used),
        unused=tuple(one.name for one in installed if one.name not in used),
        filled=frozenset(row["name"] for row in await connection.fetch(_MATERIALIZED)),
        notes=tuple(notes),
        without=tuple((row["schema"], row["name"]) for row in without),
    )


async def _check_schema(opened: OpenSource) -> list[str]:
    """Refuse a schema that is not there, or that needs what does not come along; return what is worth knowing."""
    source, connection = opened.source, opened.connection
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", source.schema):
        raise AdoptionError(f"{source.dsn} has no schema {source.schema!r}")
    kinds = {row["name"]: row["kind"] for row in await connection.fetch(_SHARED, list(source.shared))}
    for name in source.shared:
        if kinds.get(name) not in ("r", "p", "v", "S"):
            raise AdoptionError(f"{source.dsn} has no table {name!r} to copy")
    notes: list[str] = []
    lost: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for row in await connection.fetch(_PARTITIONS, source.schema, list(source.shared), list(source.without)):
        if row["is_own"]:
            lost.setdefault(row["of"], []).append(row["partition"])
        elif row["is_beside"]:
            missing.setdefault(row["partition"], []).append(f"partitioned table {row['of']}")
        else:  # another tenant's, in its schema
            notes.append(f"partition {row['partition']} of table {row['of']} is not copied")
    if lost:
        raise AdoptionError(
            f"tables of schema {source.schema!r} have partitions outside of it, and their rows would be lost: "
            + "; ".join(f"{first_of(partitions)} (of {name})" for name, partitions in lost.items())
            + f"; move them in the source: ALTER TABLE {next(iter(lost.values()))[0]} SET SCHEMA {source.schema}"
        )
    others: dict[str, list[str]] = {}
    for row in await connection.fetch(_REFERENCES, source.schema, list(source.shared)):
        if row["kind"] in ("table", "view", "sequence"):
            missing.setdefault(row["named"], []).append(row["by"])
        else:
            others.setdefault(f"{row['kind']} {row['identity']}", []).append(row["by"])
    problems = [f"{name} (for {first_of(by)})" for name, by in missing.items()]
    problems += [f"{name} (for {first_of(by)})" for name, by in others.items()]
    if not problems:
        return notes
    options = " ".join(f"--with-shared {name}" for name in missing)
    remedies = [f"copy the shared tables too: {options}"] if missing else []
    if others:
        remedies.append(f"only tables, views and sequences can be copied: move the others into {source.schema!r}")
    raise AdoptionError(
        f"schema {source.schema!r} depends on objects outside of it: {'; '.join(problems)}; {', and '.join(remedies)}"
    )


async def _count(opened: OpenSource, schema: str, name: str) -> SourceTable:
    try:
        rows = await count_rows(opened.connection, schema, name)
    except asyncpg.PostgresError as exc:
        raise AdoptionError(f"table {schema}.{name} of {opened.source} cannot be read: {reason_of(exc)}") from exc
    return SourceTable(schema, name, rows)


async def count_rows(connection: Connection, schema: str, name: str) -> int:
    """Return how many rows a table has by itself, without those of tables that inherit from it."""
    table = await connection.fetchval("SELECT pg_catalog.format('%I.%I', $1::text, $2::text)", schema, name)
    return int(await connection.fetchval(f"SELECT count(*) FROM ONLY {table}"))  # noqa: S608 - quoted by PostgreSQL


def differing_rows(expected: Sequence[SourceTable], found: Mapping[str, int | None]) -> list[str]:
    """Return the tables that have another number of rows than the source, in words."""
    return [
        f"{one.label} has {found.get(one.label)} rows, and the source {one.rows}"
        for one in expected
        if found.get(one.label) != one.rows
    ]


def first_of(names: Sequence[str]) -> str:
    """Return some of the names for a message, the first ones, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


__all__ = ["Contents", "SourceTable", "count_rows", "differing_rows", "first_of", "read_contents"]
