"""PostgreSQL's errors, by SQLSTATE and never by message."""

from __future__ import annotations

import asyncpg
from sqlalchemy.exc import DBAPIError

PROTOCOL_VIOLATION = "08P01"  # what PgBouncer refuses anything with
INVALID_PARAMETER_VALUE = "22023"
UNIQUE_VIOLATION = "23505"  # also what the loser of a race to create an object gets, in place of the next two
DUPLICATE_DATABASE = "42P04"
DUPLICATE_OBJECT = "42710"
READ_ONLY_SQL_TRANSACTION = "25006"
NO_ACTIVE_TRANSACTION = "25P01"
IDLE_IN_TRANSACTION = "25P03"
CONNECTION_DOES_NOT_EXIST = "08003"  # what asyncpg says of a session that PostgreSQL has ended
INVALID_CATALOG_NAME = "3D000"  # no such database
DEADLOCK_DETECTED = "40P01"
SERIALIZATION_FAILURE = "40001"
INVALID_AUTHORIZATION = "28000"  # no such role, or one that may not log in
INVALID_PASSWORD = "28P01"  # noqa: S105 - a SQLSTATE
INSUFFICIENT_PRIVILEGE = "42501"
UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"
UNDEFINED_FUNCTION = "42883"
UNDEFINED_OBJECT = "42704"  # a type, for example
INVALID_SCHEMA_NAME = "3F000"  # no such schema
UNDEFINED_FILE = "58P01"
FEATURE_NOT_SUPPORTED = "0A000"
TOO_MANY_CONNECTIONS = "53300"
NOT_IN_PREREQUISITE_STATE = "55000"
OBJECT_IN_USE = "55006"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"  # by statement_timeout, for example
CONCURRENT_UPDATE = "XX000"  # "tuple concurrently updated": two sessions changed one catalogue row


def postgres_error(error: BaseException | None) -> asyncpg.PostgresError | None:
    """PostgreSQL's own error in a chain of wrappers, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, asyncpg.PostgresError):
            return error
        wrapped = error.orig if isinstance(error, DBAPIError) else None
        error = wrapped or error.__cause__
    return None


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of the PostgreSQL error behind ``error``, or None."""
    found = postgres_error(error)
    return found.sqlstate if found is not None else None


def constraint_of(error: BaseException) -> str | None:
    """The name of the constraint that a statement violated, or None."""
    found = postgres_error(error)
    return found.constraint_name if found is not None else None
