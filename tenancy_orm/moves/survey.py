"""``Survey``: what a database has that decides how it can be moved."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OperationError
from ..postgres.connections import Connection
from ..provisioning.differences import enumeration

_TABLES = """
SELECT c.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS quoted, n.nspname::text AS schema,
       c.relname::text AS name, c.relpersistence = 'u' AS is_unlogged, c.relreplident::text AS identity,
       pg_get_userbyid(c.relowner)::text AS owner,
       CASE WHEN c.relpersistence = 'u' THEN pg_total_relation_size(c.oid) ELSE 0 END AS bytes,
       c.relreplident = 'n' OR (c.relreplident = 'd' AND NOT EXISTS (
           SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)) AS lacks_identity,
       EXISTS (SELECT FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
                  AND t.typname IN ('json', 'xml', 'point', 'polygon', 'path', 'line', 'lseg', 'circle', 'box')
                  AND t.typnamespace = 'pg_catalog'::regnamespace) AS has_incomparable
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
   AND NOT EXISTS (SELECT FROM pg_depend e
                    WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e')
 ORDER BY 2
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
_CONFIGURED = """
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name
  FROM pg_extension e CROSS JOIN LATERAL unnest(e.extconfig) AS t(oid) JOIN pg_class c ON c.oid = t.oid
  JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' ORDER BY 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a database has.

    Attributes:
        replicated: The ordinary tables, quoted.
        unlogged: The unlogged ones, each as its schema and name.
        without_identity: Tables that PostgreSQL cannot tell the rows of apart, quoted, with their replica identity.
        large_objects: How many large objects there are.
        pause_bytes: How large unlogged tables and large objects are together.
        configured: Tables of extensions that have rows of users, quoted: they are copied once.
    """

    replicated: tuple[str, ...]
    unlogged: tuple[tuple[str, str], ...]
    without_identity: dict[str, str]
    large_objects: int
    pause_bytes: int
    configured: tuple[str, ...]


async def survey(connection: Connection, *, tenant: str, owner: str, stem: str, online: bool, most: int) -> Survey:
    """Look into a database.

    Args:
        connection: An administrative one to it.
        tenant: The tenant's slug, for errors.
        owner: The owner of tenants' databases.
        stem: The prefix of the names of the package's own slots.
        online: Whether it is to be replicated.
        most: How large unlogged tables and large objects may be together then.

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
            f"tenant {tenant!r} cannot be moved: somebody replicates its database, by the slots {enumeration(slots)}; "
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
    found = Survey(
        replicated=tuple(row["quoted"] for row in tables if not row["is_unlogged"]),
        unlogged=tuple((row["schema"], row["name"]) for row in tables if row["is_unlogged"]),
        without_identity={
            row["quoted"]: row["identity"] for row in tables if row["lacks_identity"] and not row["is_unlogged"]
        },
        large_objects=int(large["number"]),
        pause_bytes=size,
        configured=tuple(row["name"] for row in await connection.fetch(_CONFIGURED)),
    )
    if not online:
        return found
    incomparable = sorted(
        row["quoted"] for row in tables if row["lacks_identity"] and not row["is_unlogged"] and row["has_incomparable"]
    )
    if incomparable:
        raise OperationError(
            f"tenant {tenant!r} cannot be replicated: tables {enumeration(incomparable)} have no primary key, and "
            "columns of types that cannot be compared; give them a primary key, or move it with --offline"
        )
    if size > most:
        raise OperationError(
            f"tenant {tenant!r} has {found.large_objects} large objects and {len(found.unlogged)} unlogged tables of "
            f"{size:,} bytes together, which would be copied within the pause; raise move.pause_bytes, which is "
            f"{most:,}, or move it with --offline"
        )
    return found


__all__ = ["Survey", "survey"]
