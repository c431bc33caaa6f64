"""``Survey``: what a database has that decides how it can be moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..errors import OperationError
from ..postgres.connections import Connection
from ..provisioning.checks.differences import enumeration

# A deferrable key identifies no rows for replication, nor does one with a generated column, which is not replicated.
_TABLES = """
SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS quoted, n.nspname::text AS schema,
       c.relname::text AS name, c.relpersistence = 'u' AS is_unlogged, c.relreplident::text AS identity,
       pg_get_userbyid(c.relowner)::text AS owner,
       CASE WHEN c.relpersistence = 'u' THEN pg_total_relation_size(c.oid) ELSE 0 END AS bytes,
       c.relreplident <> 'f' AND NOT EXISTS (
           SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
              AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END
              AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> ''
                                 AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))) AS lacks_identity,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate) AS has_key,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attgenerated <> ''
                  AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
                WHERE i.indrelid = c.oid AND i.indisprimary) AS has_generated_key,
       EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attgenerated <> '')
           AS has_generated,
       c.relrowsecurity AND c.relforcerowsecurity AS is_forced,
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgenabled IN ('A', 'R'))
           AS has_replica_trigger
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
   AND NOT EXISTS (SELECT FROM pg_depend e
                    WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e')
 ORDER BY 2
"""
# Of these tables: those with a column, or a part of one, that has no equality of its type's own, by which PostgreSQL
# finds the row of a table without a key.
_INCOMPARABLE = """
WITH RECURSIVE types (relation, type) AS (
    SELECT attrelid, atttypid FROM pg_attribute
     WHERE attrelid = ANY ($1::text[]::oid[]) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
    UNION
    SELECT t.relation, part.type FROM types t JOIN pg_type p ON p.oid = t.type CROSS JOIN LATERAL (
        SELECT p.typbasetype AS type WHERE p.typtype = 'd'
        UNION ALL SELECT p.typelem WHERE p.typelem <> 0 AND p.typsubscript = 'array_subscript_handler'::regproc
        UNION ALL SELECT a.atttypid FROM pg_attribute a
                   WHERE p.typtype = 'c' AND a.attrelid = p.typrelid AND a.attnum > 0 AND NOT a.attisdropped) part
)
SELECT DISTINCT relation FROM types t JOIN pg_type p ON p.oid = t.type
 WHERE p.typtype = 'b' AND NOT (p.typelem <> 0 AND p.typsubscript = 'array_subscript_handler'::regproc)
   AND NOT EXISTS (
       SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod
        WHERE o.opcdefault AND m.amname IN ('btree', 'hash') AND (o.opcintype = p.oid OR EXISTS (
            SELECT FROM pg_cast s WHERE s.castsource = p.oid AND s.casttarget = o.opcintype AND s.castmethod = 'b'
                AND s.castcontext = 'i')))
"""
_REFERENCES = """
SELECT DISTINCT conrelid, confrelid FROM pg_constraint
 WHERE contype = 'f' AND conrelid <> confrelid AND conrelid = ANY ($1::text[]::oid[])
   AND confrelid = ANY ($1::text[]::oid[])
"""
_LARGE_OBJECTS = """
SELECT (SELECT count(*) FROM pg_largeobject_metadata) AS number,
       CASE WHEN EXISTS (SELECT FROM pg_largeobject_metadata) THEN pg_total_relation_size('pg_catalog.pg_largeobject')
            ELSE 0 END AS bytes
"""
_FOREIGN_SLOTS = """
SELECT slot_name::text AS name FROM pg_replication_slots
 WHERE database = current_database() AND NOT temporary AND NOT starts_with(slot_name::text, $1)
"""
_FOREIGN_SUBSCRIPTIONS = """
SELECT subname::text AS name FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid
 WHERE d.datname = current_database() AND NOT starts_with(subname::text, $1)
"""
# with the condition that tells the rows of users from those that the extension has brought
_CONFIGURED = """
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, c.relkind = 'S' AS is_sequence,
       coalesce(t.condition, '') AS condition
  FROM pg_extension e CROSS JOIN LATERAL unnest(e.extconfig, e.extcondition) AS t(oid, condition)
  JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'S') ORDER BY 1
"""
# Of these tables: those with a column, or a part of one, in which two values can be equal without being the same, as
# 1.0 and 1.00 are, or "a" and "A" by a collation. Operator classes have function 4, which is for deduplication, where
# equal values are the same.
_INEXACT = """
WITH RECURSIVE parts (relation, type, sorting) AS (
    SELECT attrelid, atttypid, attcollation FROM pg_attribute
     WHERE attrelid = ANY ($1::text[]::oid[]) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
    UNION
    SELECT t.relation, part.type, part.sorting FROM parts t JOIN pg_type p ON p.oid = t.type CROSS JOIN LATERAL (
        SELECT p.typbasetype AS type, t.sorting AS sorting WHERE p.typtype = 'd'
        UNION ALL SELECT p.typelem, t.sorting
                   WHERE p.typelem <> 0 AND p.typsubscript = 'array_subscript_handler'::regproc
        UNION ALL SELECT a.atttypid, a.attcollation FROM pg_attribute a
                   WHERE p.typtype = 'c' AND a.attrelid = p.typrelid AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL SELECT r.rngsubtype, r.rngcollation FROM pg_range r WHERE p.oid IN (r.rngtypid, r.rngmultitypid)) part
)
SELECT DISTINCT relation FROM parts t JOIN pg_type p ON p.oid = t.type LEFT JOIN pg_collation l ON l.oid = t.sorting
 WHERE (NOT coalesce(l.collisdeterministic, true)
        OR p.oid = 'interval'::regtype
        OR p.typtype = 'b' AND NOT (p.typelem <> 0 AND p.typsubscript = 'array_subscript_handler'::regproc)
           AND p.oid <> ALL ('{tsvector,tsquery}'::regtype[]::oid[])
           AND EXISTS (SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod
                        WHERE o.opcdefault AND m.amname = 'btree' AND o.opcintype = p.oid AND NOT EXISTS (
                            SELECT FROM pg_amproc f WHERE f.amprocfamily = o.opcfamily AND f.amprocnum = 4
                               AND f.amproclefttype = p.oid AND f.amprocrighttype = p.oid)))
   -- no two rows are equal where an index says so, by the same equality and without NULLs
   AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = relation AND i.indisunique AND i.indisvalid
                      AND i.indpred IS NULL AND i.indexprs IS NULL AND NOT EXISTS (
                          SELECT FROM unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[])
                                 WITH ORDINALITY k (attnum, sorting, class, number)
                            JOIN pg_attribute a ON a.attrelid = relation AND a.attnum = k.attnum
                            JOIN pg_opclass o ON o.oid = k.class
                           WHERE NOT a.attnotnull OR k.sorting <> a.attcollation OR NOT o.opcdefault))
"""
_GENERATED_VERSION = 18
"""From this version on, PostgreSQL refuses to change a published table that is known by all its columns and has
generated ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a database has.

    Attributes:
        replicated: The ordinary tables, quoted.
        unlogged: The unlogged ones, each as its schema and name, and after those that it refers to.
        without_identity: Tables that PostgreSQL cannot tell the rows of apart, quoted, with their replica identity.
        large_objects: How many large objects there are.
        pause_bytes: How large unlogged tables and large objects are together.
        hides_rows: Whether row security hides rows from the owner of a table as well.
        configured: Tables and sequences of extensions in which a user may write, quoted: no copy has their rows.
        inexact: Tables of which a row that is changed or deleted is found by values that are equal, and need not be
            the same, quoted: another one may be changed or deleted in its place.
    """

    replicated: tuple[str, ...]
    unlogged: tuple[tuple[str, str], ...]
    without_identity: dict[str, str]
    large_objects: int
    pause_bytes: int
    hides_rows: bool
    configured: tuple[str, ...]
    inexact: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, Any]:
        """What an operation's record says of it."""
        return {
            "large_objects": self.large_objects,
            "unlogged_tables": len(self.unlogged),
            "found_by_equal_values": list(self.inexact),
        }


async def survey(
    connection: Connection, *, tenant: str, owner: str, stem: str, online: bool, most: int, version: int
) -> Survey:
    """Look into a database.

    Args:
        connection: An administrative one to it.
        tenant: The tenant's slug, for errors.
        owner: The owner of tenants' databases.
        stem: The prefix of the names of the package's own slots.
        online: Whether it is to be replicated.
        most: How large unlogged tables and large objects may be together then.
        version: The newer one of the two servers' major versions.

    Raises:
        OperationError: it cannot be moved in this way; the message names what stands against it.
    """
    tables = await connection.fetch(_TABLES)
    if others := sorted({row["quoted"] for row in tables if row["owner"] != owner}):
        raise OperationError(
            f"tenant {tenant!r} cannot be moved: tables {enumeration(others)} do not belong to {owner!r}; give them to "
            "it by ALTER TABLE ... OWNER TO, since objects of a tenant's own would gain rights"
        )
    slots = [row["name"] for row in await connection.fetch(_FOREIGN_SLOTS, stem)]
    if slots:
        raise OperationError(
            f"tenant {tenant!r} cannot be moved: its database is replicated by the slots {enumeration(slots)}; "
            "end that first"
        )
    subscriptions = [row["name"] for row in await connection.fetch(_FOREIGN_SUBSCRIPTIONS, stem)]
    if subscriptions:
        raise OperationError(
            f"tenant {tenant!r} cannot be moved: its database has the subscriptions {enumeration(subscriptions)}; drop "
            "them first"
        )
    large = await connection.fetchrow(_LARGE_OBJECTS)
    size = int(large["bytes"]) + sum(int(row["bytes"]) for row in tables)
    replicated = [row for row in tables if not row["is_unlogged"]]
    unlogged = [row for row in tables if row["is_unlogged"]]
    found = Survey(
        replicated=tuple(row["quoted"] for row in replicated),
        unlogged=await _in_order(connection, unlogged, tenant) if online else _named(unlogged),
        without_identity={row["quoted"]: row["identity"] for row in replicated if row["lacks_identity"]},
        large_objects=int(large["number"]),
        pause_bytes=size,
        hides_rows=any(row["is_forced"] for row in tables),
        configured=await _configured(connection, tenant),
    )
    if not online:
        return found
    await _refuse_unreplicable(connection, replicated, unlogged, tenant, version)
    if size > most:
        raise OperationError(
            f"tenant {tenant!r} has {found.large_objects} large objects and {len(found.unlogged)} unlogged tables of "
            f"{size:,} bytes together, which would be copied within the pause; raise move.pause_bytes, which is "
            f"{most:,}, or move it with --offline"
        )
    keyless = [str(row["oid"]) for row in replicated if _is_keyless(row)]
    inexact = {row["relation"] for row in await connection.fetch(_INEXACT, keyless)}
    return replace(found, inexact=tuple(row["quoted"] for row in replicated if row["oid"] in inexact))


def _is_keyless(row: Mapping[str, Any]) -> bool:
    return (row["lacks_identity"] or row["identity"] == "f") and not row["has_key"]


def _named(tables: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((row["schema"], row["name"]) for row in tables)


async def _configured(connection: Connection, tenant: str) -> tuple[str, ...]:
    found = await connection.fetch(_CONFIGURED)
    await refuse_configured(connection, tenant, found)
    return tuple(row["name"] for row in found)


async def refuse_configured(
    connection: Connection, tenant: str, found: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Refuse a database with rows of users in tables of extensions: only an administrator can write these.

    Args:
        connection: An administrative one to it.
        tenant: The tenant's slug, for the error.
        found: The tables; read where None.

    Raises:
        OperationError: it has such rows.
    """
    filled = []
    for row in await connection.fetch(_CONFIGURED) if found is None else found:
        # quoted by PostgreSQL, and the extension's own condition
        rows = f"{row['name']} WHERE is_called" if row["is_sequence"] else f"ONLY {row['name']} {row['condition']}"
        if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {rows})"):  # noqa: S608 - see above
            filled.append(row["name"])
    if filled:
        raise OperationError(
            f"tenant {tenant!r} cannot be moved: {enumeration(filled)} of extensions have rows of your own, which "
            "only an administrator can copy; save and delete them there, and insert them after the move"
        )


async def _refuse_unreplicable(
    connection: Connection,
    tables: Sequence[Mapping[str, Any]],
    unlogged: Sequence[Mapping[str, Any]],
    tenant: str,
    version: int,
) -> None:
    """Refuse tables that replication would fail to change, or for which the application's own statements would fail."""

    def refuse(rows: Iterable[Mapping[str, Any]], what: str, remedy: str) -> None:
        if names := sorted(row["quoted"] for row in rows):
            raise OperationError(
                f"tenant {tenant!r} cannot be replicated: tables {enumeration(names)} have {what}; {remedy}, or move "
                "it with --offline"
            )

    refuse(
        (row for row in tables if row["has_replica_trigger"]),
        "triggers that are enabled ALWAYS or for REPLICA, which would run again on the new server for rows that are "
        "replicated",
        "enable them by ALTER TABLE ... ENABLE TRIGGER",
    )
    refuse(
        (row for row in (*tables, *unlogged) if row["is_forced"]),
        "FORCE ROW LEVEL SECURITY, so that their owner, as whom rows are replicated, may not write all of them",
        "take it off by ALTER TABLE ... NO FORCE ROW LEVEL SECURITY, which changes nothing for the tenant's role",
    )
    by_all_columns = [row for row in tables if row["lacks_identity"] or row["identity"] == "f"]
    unkeyed = "give them a primary key that is neither deferrable nor generated"
    refuse(
        (row for row in by_all_columns if row["has_generated_key"]),
        "a generated column in the primary key",
        unkeyed,
    )
    refuse(
        (row for row in by_all_columns if row["has_generated"] and version >= _GENERATED_VERSION),
        "no primary key, and generated columns",
        unkeyed,
    )
    keyless = {row["oid"]: row for row in tables if _is_keyless(row)}
    incomparable = await connection.fetch(_INCOMPARABLE, [str(oid) for oid in keyless])
    refuse(
        (keyless[row["relation"]] for row in incomparable),
        "no primary key, and columns of types that cannot be compared",
        unkeyed,
    )


async def _in_order(
    connection: Connection, tables: Sequence[Mapping[str, Any]], tenant: str
) -> tuple[tuple[str, str], ...]:
    """Return tables by schema and name, each after those that it refers to."""
    by_oid = {row["oid"]: row for row in tables}
    order: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(by_oid, ()))
    for row in await connection.fetch(_REFERENCES, [str(oid) for oid in by_oid]):
        order.add(row["conrelid"], row["confrelid"])
    try:
        return tuple((by_oid[oid]["schema"], by_oid[oid]["name"]) for oid in order.static_order())
    except CycleError as exc:
        names = sorted({by_oid[oid]["quoted"] for oid in exc.args[1]})
        raise OperationError(
            f"tenant {tenant!r} cannot be replicated: unlogged tables {enumeration(names)} refer to each other in a "
            "circle; move it with --offline"
        ) from None


__all__ = ["Survey", "refuse_configured", "survey"]
