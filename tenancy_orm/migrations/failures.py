"""What went wrong, in words fit for a report: no statement's parameters, no row's values, no credentials."""

from __future__ import annotations

import asyncpg
from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError

from ..errors import FleetMigrationError, TenancyError

LOCK_NOT_AVAILABLE = "55P03"
DEADLOCK_DETECTED = "40P01"
UNDEFINED_TABLE = "42P01"
INVALID_PARAMETER_VALUE = "22023"
INVALID_CATALOG_NAME = "3D000"  # no such database
TOO_MANY_CONNECTIONS = "53300"

# what another attempt may well get past: the lock's holder was to blame, not the migration
TRANSIENT = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, TOO_MANY_CONNECTIONS})


class FleetCommandError(FleetMigrationError, CommandError):
    """What plain Alembic's commands raise when tenants failed: its command line prints it and exits with a failure."""


def postgres_error(error: BaseException | None) -> asyncpg.PostgresError | None:
    """Find PostgreSQL's own error in a chain of wrappers."""
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


def describe(error: BaseException) -> str:
    """One line about ``error``.

    PostgreSQL's DETAIL is left out: it quotes rows. So are SQLAlchemy's statement and parameters.
    """
    if isinstance(error, TenancyError):
        return str(error)
    found = postgres_error(error)
    if found is not None:
        return f"{_line(str(found.args[0]) if found.args else '')} (SQLSTATE {found.sqlstate})"
    if isinstance(error, DBAPIError):
        return _line(f"{type(error).__name__}: {error.orig}")
    if isinstance(error, TimeoutError):
        return _line(f"timed out: {error}" if str(error) else "timed out")
    if isinstance(error, CommandError):
        return _line(str(error))
    return _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    return " ".join(text.split())
