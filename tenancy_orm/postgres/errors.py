"""What PostgreSQL says of an error, by SQLSTATE and never by message."""

from __future__ import annotations

import asyncpg
from sqlalchemy.exc import DBAPIError

DUPLICATE_DATABASE = "42P04"
DUPLICATE_OBJECT = "42710"
UNIQUE_VIOLATION = "23505"  # what the loser of a race to create one name gets in place of the two above
INSUFFICIENT_PRIVILEGE = "42501"
MISSING_DATABASE = "3D000"
OBJECT_IN_USE = "55006"
CONCURRENT_UPDATE = "XX000"  # "tuple concurrently updated": two sessions changed one catalogue row


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a PostgreSQL error, or None of any other."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError) else None


def sqlstate_of(error: DBAPIError) -> str | None:
    """PostgreSQL's SQLSTATE of a wrapped driver error."""
    found = getattr(error.orig, "sqlstate", None)
    return found if isinstance(found, str) else None


def constraint_of(error: DBAPIError) -> str | None:
    """The name of the constraint that a statement violated."""
    found = getattr(getattr(error.orig, "__cause__", None), "constraint_name", None)
    return found if isinstance(found, str) else None
