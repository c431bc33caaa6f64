"""Bringing the rows of a reference table to one database, as the owner of its tables, in one transaction.

Rows are inserted, or updated where they differ. Rows that it brought before and that the source no longer has are
removed. A row that another table's foreign key refers to stays, whatever the key's ON DELETE says: a cascade would
delete the tenant's own rows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from ..errors import ReferenceDataError
from ..postgres.connections import Connection, transaction
from ..postgres.quoting import quote_identifier, quote_literal
from . import records
from .failures import place_of, reason_of
from .source import ReferenceRows, Row, check_rows, json_of

_BATCH = 5_000  # rows of one statement

# an empty name is an error of to_regclass before PostgreSQL 16
_OPEN = (
    f"INSERT INTO {records.REFERENCE} AS r (name, digest, protected, keys, relation) "  # noqa: S608 - a constant
    "VALUES ($1, '', false, '[]', '') ON CONFLICT (name) DO UPDATE SET name = excluded.name "
    "RETURNING r.digest, r.protected, r.keys, to_regclass(nullif(r.relation, ''))::oid = r.relation_oid AS same"
)
_CLOSE = (
    f"UPDATE {records.REFERENCE} SET digest = $2, protected = $3, keys = $4::text::json, "  # noqa: S608 - a constant
    "relation = $5, relation_oid = $5::text::regclass, applied_at = now() WHERE name = $1"
)
_REFERRING = """
SELECT conrelid::regclass::text AS child,
       (SELECT array_agg(quote_ident(attname) ORDER BY o) FROM unnest(conkey) WITH ORDINALITY u (n, o)
          JOIN pg_attribute ON attrelid = conrelid AND attnum = n) AS columns,
       (SELECT array_agg(quote_ident(attname) ORDER BY o) FROM unnest(confkey) WITH ORDINALITY u (n, o)
          JOIN pg_attribute ON attrelid = confrelid AND attnum = n) AS referred
  FROM pg_constraint WHERE contype = 'f' AND confrelid = $1::text::regclass AND conparentid = 0
"""
_JSON_COLUMNS = """
SELECT attname::text FROM pg_attribute
 WHERE attrelid = $1::text::regclass AND attnum > 0 AND atttypid IN ('json'::regtype, 'jsonb'::regtype)
"""


@dataclass(frozen=True, slots=True)
class ReferenceChange:
    """What was done to a table: rows inserted or updated, rows removed, and the keys (JSON) of those that were kept."""

    written: int
    removed: int
    kept: tuple[str, ...] = ()


async def bring(
    connection: Connection,
    source: ReferenceRows,
    *,
    timeout: float,
    role: str | None = None,
    tenant: str | None = None,
    force: bool = False,
) -> ReferenceChange | None:
    """Bring the rows to a database; None if it has them already.

    Args:
        connection: To the database, as the owner of its tables.
        source: The rows.
        timeout: Seconds that this may take.
        role: The tenant's role; None in a template.
        tenant: The tenant's slug, for an error.
        force: Do it even if the database has these rows by its record.

    Raises:
        ReferenceDataError: it failed, or took too long; nothing was changed.
    """
    limit = asyncio.timeout(timeout)
    try:
        async with limit, transaction(connection):
            return await _bring(connection, source, role, force)
    except Exception as exc:
        late = isinstance(exc, TimeoutError) and limit.expired()
        reason = (
            f"was not written within {timeout:g} s (provisioning.seed_timeout)"
            if late
            else _failure(exc, source, tenant)
        )
        message = f"reference data {source.name!r} {reason}{place_of(tenant)}"
        raise ReferenceDataError(message, reference=source.name, tenant=tenant) from exc


def _failure(error: Exception, source: ReferenceRows, tenant: str | None) -> str:
    if isinstance(error, asyncpg.InvalidColumnReferenceError):
        return f"failed: table {source.table} has no unique constraint on its key ({', '.join(source.key)})"
    return reason_of(error, tenant)


async def _bring(
    connection: Connection, source: ReferenceRows, role: str | None, force: bool
) -> ReferenceChange | None:
    # the row is locked: a second run waits here, and finds the digest of the first one
    record = await connection.fetchrow(_OPEN, source.name)
    assert record is not None  # noqa: S101 - RETURNING always has a row
    if record["digest"] == source.digest and record["same"] and not force:
        return None
    rows = source.rows if source.query is None else await _rows_of(connection, source)
    keys = [{name: row[name] for name in source.key} for row in rows]
    brought: list[dict[str, Any]] = json.loads(record["keys"])
    # first, since a new row may have what is unique in one that goes; and again, when no written row refers to one
    removed, _ = await _remove(connection, source, brought, keys)
    written = await _write(connection, source, rows)
    later, kept = await _remove(connection, source, brought, keys)
    brought_now = json_of([*keys, *kept])
    await connection.execute(_CLOSE, source.name, source.digest, source.protected, brought_now, source.table)
    if role is not None and (source.protected or record["protected"]):
        verb, who = ("REVOKE", "FROM") if source.protected else ("GRANT", "TO")
        privileges = "INSERT, UPDATE, DELETE" + (", TRUNCATE" if source.protected else "")
        await connection.execute(f"{verb} {privileges} ON {source.table} {who} {quote_identifier(role)}")
    return ReferenceChange(written, removed + later, tuple(map(json_of, kept)))


async def _rows_of(connection: Connection, source: ReferenceRows) -> Sequence[Row]:
    found = await connection.fetchval(f"SELECT coalesce(json_agg(q), '[]')::text FROM ({source.query}) q")  # noqa: S608
    rows: list[Row] = json.loads(found)
    check_rows(f"reference.{source.name}", rows, source.key)
    return rows


async def _write(connection: Connection, source: ReferenceRows, rows: Sequence[Row]) -> int:
    if not rows:
        return 0
    columns = {name: quote_identifier(name) for name in rows[0]}
    others = [quote_identifier(name) for name in rows[0] if name not in source.key]
    update = "NOTHING"
    if others:
        current, given = (", ".join(f"{of}.{name}" for name in others) for of in ("t", "excluded"))
        changes = ", ".join(f"{name} = excluded.{name}" for name in others)
        # as jsonb: not every type can be compared
        update = f"UPDATE SET {changes} WHERE to_jsonb(ROW({current})) IS DISTINCT FROM to_jsonb(ROW({given}))"
    # in a JSON value a text is a string, which json_populate_recordset leaves one
    json_columns = [row[0] for row in await connection.fetch(_JSON_COLUMNS, source.table)] if source.as_text else []
    values = [f"({column} #>> '{{}}')::json" if name in json_columns else column for name, column in columns.items()]
    statement = (
        f"INSERT INTO {source.table} AS t ({', '.join(columns.values())}) SELECT {', '.join(values)} "  # noqa: S608
        f"FROM json_populate_recordset(NULL::{source.table}, $1::text::json) "
        f"ON CONFLICT ({', '.join(map(quote_identifier, source.key))}) DO {update}"
    )
    done = 0
    for start in range(0, len(rows), _BATCH):
        done += _count(await connection.execute(statement, json_of(rows[start : start + _BATCH])))
    return done


async def _remove(
    connection: Connection, source: ReferenceRows, brought: Iterable[dict[str, Any]], keys: Sequence[dict[str, Any]]
) -> tuple[int, list[dict[str, Any]]]:
    """Remove what was brought and is no longer there; return how many rows, and the keys of those that stay."""
    present = {json_of([key[name] for name in source.key]) for key in keys}
    old = [key for key in brought if set(key) == set(source.key)]
    if not any(json_of([key[name] for name in source.key]) not in present for key in old):
        return 0, []
    given, wanted = json_of(old), json_of(keys)
    rows = f"json_populate_recordset(NULL::{source.table}, "
    same = " AND ".join(f"t.{name} = {{0}}.{name}" for name in map(quote_identifier, source.key))
    gone = f"{same.format('o')} AND NOT EXISTS (SELECT FROM {rows}$2::text::json) n WHERE {same.format('n')})"
    old_rows = f"{rows}$1::text::json) o"
    # locked first: nobody can refer to them from now on, so that what the next statement sees stays so
    await connection.execute(
        f"SELECT FROM {source.table} t, {old_rows} WHERE {gone} FOR UPDATE OF t",
        given,
        wanted,
    )
    referred = "".join(
        f" AND NOT EXISTS (SELECT FROM {row['child']} f WHERE "
        + " AND ".join(f"f.{a} = t.{b}" for a, b in zip(row["columns"], row["referred"], strict=True))
        + ")"
        for row in await connection.fetch(_REFERRING, source.table)
    )
    removed = 0
    # rows may refer to each other, as those of a tree do
    while done := _count(
        await connection.execute(
            f"DELETE FROM {source.table} t USING {old_rows} WHERE {gone}{referred}",  # noqa: S608
            given,
            wanted,
        )
    ):
        removed += done
    pairs = ", ".join(f"{quote_literal(name)}, t.{quote_identifier(name)}" for name in source.key)
    left = await connection.fetch(
        f"SELECT json_build_object({pairs})::text AS key FROM {source.table} t, {old_rows} WHERE {gone}",  # noqa: S608
        given,
        wanted,
    )
    return removed, [json.loads(row["key"]) for row in left]


def _count(tag: str) -> int:
    return int(tag.rsplit(" ", 1)[-1])
