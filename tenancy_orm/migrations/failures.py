"""What went wrong, in words fit for a report: no statement's parameters, no row's values, no credentials."""

from __future__ import annotations

from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError

from ..errors import FleetMigrationError, TenancyError
from ..postgres.errors import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, TOO_MANY_CONNECTIONS, postgres_error

# what another attempt may well get past: the lock's holder was to blame, not the migration
TRANSIENT = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, TOO_MANY_CONNECTIONS})


class FleetCommandError(FleetMigrationError, CommandError):
    """What plain Alembic's commands raise when tenants failed: its command line prints it and exits with a failure."""


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
