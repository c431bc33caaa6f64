"""The tables of a database as an adoption by rows sees them: columns, keys and references."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..postgres.connections import Connection
from ..postgres.quoting import quote_identifier, quote_qualified

_RELATIONS = """
SELECT c.oid::bigint AS oid, n.nspname::text AS schema, c.relname::text AS name, c.relkind = 'p' AS partitioned,
       pg_catalog.has_table_privilege(c.oid, 'SELECT') AS readable,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_index i
               JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)
              WHERE i.indrelid = c.oid AND i.indisprimary ORDER BY a.attnum) AS primary_key
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't' AND n.nspname !~ '^pg_'
   AND n.nspname <> 'information_schema' AND n.nspname <> ALL($1::text[])
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.deptype = 'e'
                    AND e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND e.objid = c.oid)
 ORDER BY 2, 3
"""
_COLUMNS = """
SELECT a.attrelid::bigint AS relation, a.attname::text AS name, a.attgenerated <> '' AS generated,
       a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND NOT t.typtype = 'd' AS wanted
  FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
 WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""
_KEYS = """
SELECT k.conrelid::bigint AS relation, k.conname::text AS name,
       COALESCE(pg_catalog.pg_partition_root(k.confrelid), k.confrelid)::bigint AS target,
       ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(k.conkey) WITH ORDINALITY u(number, place)
               JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number ORDER BY place)
         AS columns,
       ARRAY(SELECT a.attname::text FROM pg_catalog.unnest(k.confkey) WITH ORDINALITY u(number, place)
               JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.number ORDER BY place)
         AS target_columns,
       -- as the key compares: that of citext, for example, is in the schema of its extension
       ARRAY(SELECT CASE WHEN place = cardinality(k.conpfeqop)
                          AND (pg_catalog.to_jsonb(k) ->> 'conperiod')::boolean THEN 'pg_catalog.&&'
                         ELSE pg_catalog.quote_ident(n.nspname) || '.' || o.oprname END
               FROM pg_catalog.unnest(k.conpfeqop) WITH ORDINALITY u(number, place)
               JOIN pg_catalog.pg_operator o ON o.oid = u.number
               JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace ORDER BY place) AS operators,
       ARRAY(SELECT CASE WHEN ours.attcollation <> theirs.attcollation
                         THEN pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.collname) END
               FROM ROWS FROM (pg_catalog.unnest(k.conkey), pg_catalog.unnest(k.confkey))
                    WITH ORDINALITY u(number, other, place)
               JOIN pg_catalog.pg_attribute ours ON ours.attrelid = k.conrelid AND ours.attnum = u.number
               JOIN pg_catalog.pg_attribute theirs ON theirs.attrelid = k.confrelid AND theirs.attnum = u.other
               LEFT JOIN pg_catalog.pg_collation c ON c.oid = theirs.attcollation
               LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace ORDER BY place) AS collations
  FROM pg_catalog.pg_constraint k
 WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid = ANY($1::oid[]) ORDER BY k.conrelid, k.conname
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column; ``wanted`` where a row needs a value for it."""

    name: str
    generated: bool
    wanted: bool


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key; ``target`` is the number of the relation that it refers to.

    It compares by ``operators``, which are qualified; in ``collations`` where those of two columns differ.
    """

    name: str
    columns: tuple[str, ...]
    target: int
    target_columns: tuple[str, ...]
    operators: tuple[str, ...]
    collations: tuple[str | None, ...]

    def matches(self, alias: str, target: str) -> str:
        """The condition that a row of ``alias`` refers to a row of ``target``."""
        parts = zip(self.columns, self.target_columns, self.operators, self.collations, strict=True)
        return " AND ".join(
            f"{target}.{quote_identifier(to)} OPERATOR({operator}) {alias}.{quote_identifier(of)}"
            + ("" if collation is None else f" COLLATE {collation}")
            for of, to, operator, collation in parts
        )

    def is_set(self, alias: str) -> str:
        """The condition that a row refers to one."""
        return " AND ".join(f"{alias}.{quote_identifier(name)} IS NOT NULL" for name in self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A table with its rows; a partitioned one has those of its partitions."""

    oid: int
    schema: str
    name: str
    partitioned: bool
    readable: bool
    primary_key: tuple[str, ...]
    columns: tuple[Column, ...]
    keys: tuple[ForeignKey, ...]

    @property
    def label(self) -> str:
        """The table as ``schema.table``."""
        return f"{self.schema}.{self.name}"

    @property
    def quoted(self) -> str:
        """The table in SQL."""
        return quote_qualified(self.schema, self.name)

    def rows(self, alias: str) -> str:
        """The table in FROM, without tables that inherit from it."""
        return f"{'' if self.partitioned else 'ONLY '}{self.quoted} AS {alias}"

    def has(self, column: str) -> bool:
        """Whether it has a column of this name."""
        return any(one.name == column for one in self.columns)


async def read_relations(connection: Connection, *, left_out: Iterable[str] = ()) -> list[Relation]:
    """Read the tables of a database, but those of the schemas ``left_out``."""
    found = await connection.fetch(_RELATIONS, list(left_out))
    numbers = [row["oid"] for row in found]
    columns: dict[int, list[Column]] = {}
    for row in await connection.fetch(_COLUMNS, numbers):
        columns.setdefault(row["relation"], []).append(Column(row["name"], row["generated"], row["wanted"]))
    keys: dict[int, list[ForeignKey]] = {}
    for row in await connection.fetch(_KEYS, numbers):
        lists = ("columns", "target_columns", "operators", "collations")
        key = ForeignKey(name=row["name"], target=row["target"], **{name: tuple(row[name]) for name in lists})
        keys.setdefault(row["relation"], []).append(key)
    return [
        Relation(
            oid=row["oid"],
            schema=row["schema"],
            name=row["name"],
            partitioned=row["partitioned"],
            readable=row["readable"],
            primary_key=tuple(row["primary_key"]),
            columns=tuple(columns.get(row["oid"], ())),
            keys=tuple(keys.get(row["oid"], ())),
        )
        for row in found
    ]


__all__ = ["Column", "ForeignKey", "Relation", "read_relations"]
