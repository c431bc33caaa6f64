"""How far the data migrations of a database have come: rows of a table that exists only while some are unfinished.

The table is in the database itself, so that a batch and its checkpoint are one transaction. It belongs to the owner's
role, in a schema that the tenant's role may not use. When the last data migration is done, the schema is dropped: a
database that has them all is the same as one that was made at this revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import Text

from ..errors import MigrationError
from ..postgres.quoting import quote_identifier
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from .data_migrations import DataMigration

Direction = Literal["upgrade", "downgrade"]

TABLE = f"{CHECKPOINTS_SCHEMA}.data"

_CREATE = f"""
CREATE SCHEMA IF NOT EXISTS {CHECKPOINTS_SCHEMA};
CREATE TABLE IF NOT EXISTS {TABLE} (
    id integer GENERATED ALWAYS AS IDENTITY,
    revision text NOT NULL,
    name text NOT NULL,
    direction text NOT NULL,
    -- the key of the last row that is done, and of the last one of this pass
    after text[],
    until text[],
    is_started boolean NOT NULL DEFAULT false,
    is_done boolean NOT NULL DEFAULT false,
    pass integer NOT NULL DEFAULT 1,
    pass_rows bigint NOT NULL DEFAULT 0,
    rows bigint NOT NULL DEFAULT 0,
    batches bigint NOT NULL DEFAULT 0,
    batch_size integer NOT NULL,
    estimate bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (revision, name)
);
REVOKE ALL ON SCHEMA {CHECKPOINTS_SCHEMA} FROM PUBLIC;
REVOKE ALL ON {TABLE} FROM PUBLIC
"""
_REVOKE = f"; REVOKE ALL ON SCHEMA {CHECKPOINTS_SCHEMA} FROM {{0}}; REVOKE ALL ON {TABLE} FROM {{0}}"
# whether it is the current role's, and no view; no row if there is none
_OWN = text(
    "SELECT c.relkind = 'r' AND c.relowner = r.oid AND n.nspowner = r.oid FROM pg_catalog.pg_class c "  # noqa: S608
    "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, pg_catalog.pg_roles r "
    f"WHERE c.oid = pg_catalog.to_regclass('{TABLE}') AND r.rolname = current_user"
)
_ARRAY = ARRAY(Text)

# S608 everywhere: the name of the table is a constant
_INSERT = text(
    f"INSERT INTO {TABLE} (revision, name, direction, until, batch_size) "  # noqa: S608
    "VALUES (:revision, :name, :direction, :until, :batch_size) ON CONFLICT DO NOTHING"
).bindparams(bindparam("until", type_=_ARRAY))
_READ = text(f"SELECT * FROM {TABLE} ORDER BY id")  # noqa: S608
_LOCK = text(f"SELECT * FROM {TABLE} WHERE revision = :revision AND name = :name FOR UPDATE")  # noqa: S608
_BEGIN = text(
    f"UPDATE {TABLE} SET is_started = true, until = :until, after = NULL, pass = :pass, pass_rows = 0, "  # noqa: S608
    "estimate = :estimate WHERE revision = :revision AND name = :name"
).bindparams(bindparam("until", type_=_ARRAY))
_ADVANCE = text(
    f"UPDATE {TABLE} SET after = :after, pass_rows = pass_rows + :matched, "  # noqa: S608
    # a later pass goes through the same rows, and does those alone that were written since
    "rows = rows + CASE WHEN pass = 1 THEN :count ELSE :matched END, "
    "batches = batches + 1, batch_size = :size WHERE revision = :revision AND name = :name"
).bindparams(bindparam("after", type_=_ARRAY))
_TURN = text(
    # in a later pass the earlier one has done all rows
    f"UPDATE {TABLE} SET direction = 'downgrade', until = CASE WHEN pass = 1 THEN after END, after = NULL, "  # noqa: S608
    "estimate = rows, rows = 0, batches = 0, pass = 1, is_started = pass = 1, is_done = pass = 1 AND after IS NULL "
    "WHERE revision = :revision AND name = :name"
)
_DONE = text(f"UPDATE {TABLE} SET is_done = true WHERE revision = :revision AND name = :name")  # noqa: S608
_DELETE = text(f"DELETE FROM {TABLE} WHERE revision = :revision AND name = ANY(:names)").bindparams(  # noqa: S608
    bindparam("names", type_=_ARRAY)
)
_DELETE_ALL = text(f"DELETE FROM {TABLE}")  # noqa: S608
_IS_EMPTY = text(f"SELECT NOT EXISTS (SELECT FROM {TABLE})")  # noqa: S608
_DROP = f"DROP TABLE {TABLE}; DROP SCHEMA {CHECKPOINTS_SCHEMA}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An unfinished data migration of one database. Keys are PostgreSQL's texts of the values of their columns."""

    revision: str
    name: str
    direction: Direction
    after: tuple[str, ...] | None
    until: tuple[str, ...] | None
    is_started: bool
    is_done: bool
    number: int
    pass_rows: int
    rows: int
    batches: int
    batch_size: int
    estimate: int


def exists(connection: SyncConnection) -> bool:
    """Whether there is a table of checkpoints.

    Raises:
        MigrationError: it is somebody else's, who may have put code of his own into it.
    """
    is_own = connection.scalar(_OWN)
    if is_own is False:
        raise MigrationError(f"{TABLE} is not the owner role's table of checkpoints: drop it")
    return bool(is_own)


def create(connection: SyncConnection, role: str | None) -> None:
    """Make the table, which ``role``, the tenant's, may neither read nor write."""
    if not exists(connection):
        revoke = "" if role is None else _REVOKE.format(quote_identifier(role))
        connection.exec_driver_sql(_CREATE + revoke)


def add(connection: SyncConnection, revision: str, migrations: Iterable[DataMigration], direction: Direction) -> None:
    """Note that data migrations of a revision are to be done."""
    for one in migrations:
        given = {"revision": revision, "name": one.name, "direction": direction, "until": None}
        connection.execute(_INSERT, {**given, "batch_size": one.batch_size})


def read(connection: SyncConnection) -> list[Checkpoint]:
    """Return what is unfinished, in the order in which it was noted."""
    return [_checkpoint(row) for row in connection.execute(_READ).all()] if exists(connection) else []


def locked(connection: SyncConnection, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as it is now, locked until the end of the transaction."""
    return _checkpoint(connection.execute(_LOCK, _named(checkpoint)).one())


def begin(connection: SyncConnection, checkpoint: Checkpoint, *, until: Sequence[str], number: int, rows: int) -> None:
    """Begin a pass, which ends with the row ``until``; the table has about ``rows``."""
    connection.execute(_BEGIN, {**_named(checkpoint), "until": list(until), "pass": number, "estimate": rows})


def advance(
    connection: SyncConnection, checkpoint: Checkpoint, *, after: Sequence[str], count: int, matched: int, size: int
) -> None:
    """Note that a batch of ``count`` rows is done, of which ``matched`` had to be migrated."""
    given = {"after": list(after), "count": count, "matched": matched, "size": size}
    connection.execute(_ADVANCE, {**_named(checkpoint), **given})


def turn(connection: SyncConnection, checkpoint: Checkpoint) -> None:
    """Make a downgrade of an unfinished upgrade: of the rows that this one has done, and no others."""
    connection.execute(_TURN, _named(checkpoint))


def finish(connection: SyncConnection, checkpoint: Checkpoint) -> None:
    """End a data migration. That of a downgrade is kept, as done, until its revision's DDL is undone."""
    if checkpoint.direction == "downgrade":
        connection.execute(_DONE, _named(checkpoint))
    else:
        forget(connection, checkpoint.revision, [checkpoint.name])


def forget(connection: SyncConnection, revision: str, names: Sequence[str]) -> None:
    """Remove checkpoints, and the table if they were the last."""
    connection.execute(_DELETE, {"revision": revision, "names": list(names)})
    _drop_if_empty(connection)


def forget_all(connection: SyncConnection) -> None:
    """Remove all checkpoints, and the table."""
    connection.execute(_DELETE_ALL)
    _drop_if_empty(connection)


def _drop_if_empty(connection: SyncConnection) -> None:
    if connection.scalar(_IS_EMPTY):
        connection.exec_driver_sql(_DROP)


def _named(checkpoint: Checkpoint) -> dict[str, str]:
    return {"revision": checkpoint.revision, "name": checkpoint.name}


def _checkpoint(row: Any) -> Checkpoint:
    return Checkpoint(
        revision=row.revision,
        name=row.name,
        direction=row.direction,
        after=None if row.after is None else tuple(row.after),
        until=None if row.until is None else tuple(row.until),
        is_started=row.is_started,
        is_done=row.is_done,
        number=row._mapping["pass"],
        pass_rows=row.pass_rows,
        rows=row.rows,
        batches=row.batches,
        batch_size=row.batch_size,
        estimate=row.estimate,
    )


__all__ = [
    "TABLE",
    "Checkpoint",
    "Direction",
    "add",
    "advance",
    "begin",
    "create",
    "exists",
    "finish",
    "forget",
    "forget_all",
    "locked",
    "read",
    "turn",
]
