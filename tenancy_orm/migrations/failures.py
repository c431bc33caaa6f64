"""Errors of migrations as text for a report: without a statement's parameters, rows' values or passwords."""

from __future__ import annotations

from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError

from ..errors import FleetMigrationError, TenancyError
from ..postgres.errors import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, TOO_MANY_CONNECTIONS, postgres_error

# another attempt may succeed after these: the holder of a lock was the cause, not the migration
TRANSIENT = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, TOO_MANY_CONNECTIONS})


class FleetCommandError(FleetMigrationError, CommandError):
    """Some tenants failed in one of Alembic's own commands; its command line prints this and exits with a failure."""


def describe(error: BaseException) -> str:
    """Return one line about ``error``.

    PostgreSQL's DETAIL is left out, since it quotes rows; so are SQLAlchemy's statement and parameters.
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
