"""What was applied to a tenant's database, recorded in that database.

The record is committed together with what it records, so each version is applied once, however a process ends. It also
goes wherever the data goes: into clones of the template, and into backups. The tenant's role writes the record of the
seeds that run as that role; it can only read that of reference data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from ..errors import MarkerMismatchError
from ..postgres.connections import Connection, transaction
from ..postgres.locks import lock_key
from ..postgres.quoting import quote_identifier
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA, REFERENCE_RECORD
from .definition import Seed

SEEDS = f"{RECORD_SCHEMA}.seeds"
REFERENCE = ".".join(REFERENCE_RECORD)

_TABLES = f"""
CREATE SCHEMA IF NOT EXISTS {RECORD_SCHEMA};
CREATE TABLE IF NOT EXISTS {SEEDS} (
    name text PRIMARY KEY, version integer NOT NULL, applied_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS {REFERENCE} (
    name text PRIMARY KEY, digest text NOT NULL, protected boolean NOT NULL, keys json NOT NULL,
    -- the table by its name, and which one that was: a migration may have dropped it and made another
    relation text NOT NULL, relation_oid oid, applied_at timestamptz NOT NULL DEFAULT now())
"""
_MARKER = (
    "SELECT shobj_description(oid, 'pg_database') AS marker, NULL::json AS seeds, NULL::json AS reference "
    "FROM pg_database WHERE datname = current_database()"
)
_STATE = (
    f"SELECT shobj_description(oid, 'pg_database') AS marker, "  # noqa: S608 - two constants
    f"(SELECT json_object_agg(name, version) FROM {SEEDS}) AS seeds, "
    f"(SELECT json_object_agg(name, digest) FROM {REFERENCE} "
    "WHERE to_regclass(relation)::oid = relation_oid) AS reference "
    "FROM pg_database WHERE datname = current_database()"
)
# the second of two runs waits here for the first one's end, and finds the version that it has left
_CLAIM = (
    f"INSERT INTO {SEEDS} AS s (name, version) VALUES (:name, :version) "  # noqa: S608 - a constant
    "ON CONFLICT (name) DO UPDATE SET version = excluded.version, applied_at = now() "
    "WHERE :force OR s.version < excluded.version RETURNING s.version"
)
_PREVIOUS = f"SELECT version FROM {SEEDS} WHERE name = :name FOR UPDATE"  # noqa: S608 - a constant


@dataclass(frozen=True, slots=True)
class Applied:
    """What a database has: versions of seeds, and digests of reference data, by name."""

    seeds: Mapping[str, int] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)
    has_tables: bool = True


async def read(connection: Connection, *, marker: str, tenant: str) -> Applied:
    """Read what a tenant's database has, by one SELECT, and check that it is the tenant's own.

    Args:
        connection: To the database, as the owner.
        marker: The marker that it must have.
        tenant: The tenant's slug, for the error.

    Raises:
        MarkerMismatchError: it is another tenant's, or nobody's.
    """
    has_tables = True
    try:
        row = await connection.fetchrow(_STATE)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        has_tables = False
        row = await connection.fetchrow(_MARKER)
    if row is None or row["marker"] != marker:
        found = None if row is None else row["marker"]
        database = str(await connection.fetchval("SELECT current_database()"))
        raise MarkerMismatchError(tenant=tenant, database=database, expected=marker, found=found)
    return Applied(json.loads(row["seeds"] or "{}"), json.loads(row["reference"] or "{}"), has_tables)


async def create_tables(connection: Connection, role: str | None = None) -> None:
    """Create the tables of the records where they are missing.

    Args:
        connection: To the database, as the owner.
        role: The tenant's role; None in a template, where there is none yet.
    """
    async with transaction(connection):
        # CREATE ... IF NOT EXISTS of two sessions at once fails in one of them
        await connection.execute(f"SELECT pg_advisory_xact_lock({lock_key('seeds')})")
        await connection.execute(_TABLES)
        if role is not None:
            # default privileges have given it more
            await connection.execute(f"REVOKE INSERT, UPDATE, DELETE ON {REFERENCE} FROM {quote_identifier(role)}")


async def claim(session: AsyncSession, seed: Seed, *, force: bool) -> tuple[bool, int | None]:
    """Record a seed's version, in the transaction in which it will run.

    Returns whether it is to be run, and the version that was applied before.
    """
    previous = await session.scalar(text(_PREVIOUS), {"name": seed.name})
    values = {"name": seed.name, "version": seed.version, "force": force}
    claimed = await session.scalar(text(_CLAIM), values)
    return claimed is not None, previous
