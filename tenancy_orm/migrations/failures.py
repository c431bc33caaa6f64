"""Errors of migrations as text for a report: without a statement's parameters, rows' values or passwords."""

from __future__ import annotations

import re

from alembic.util.exc import CommandError
from sqlalchemy.exc import DBAPIError

from ..errors import FleetMigrationError, TenancyError
from ..postgres.errors import (
    CONCURRENT_UPDATE,
    DEADLOCK_DETECTED,
    LOCK_NOT_AVAILABLE,
    SERIALIZATION_FAILURE,
    TOO_MANY_CONNECTIONS,
    postgres_error,
)

# Another attempt may succeed after these: another session was the cause, not the migration. A statement that took too
# long (57014) is not among them: it would take as long again.
TRANSIENT = frozenset(
    {LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, SERIALIZATION_FAILURE, CONCURRENT_UPDATE, TOO_MANY_CONNECTIONS}
)

_DATA_EXCEPTION = "22"  # a class of SQLSTATEs
_QUOTED = re.compile(r'".*"', re.DOTALL)


class FleetCommandError(FleetMigrationError, CommandError):
    """Some tenants failed in one of Alembic's own commands; its command line prints this and exits with a failure."""


def describe(error: BaseException) -> str:
    """Return one line about ``error``.

    PostgreSQL's DETAIL is left out, since it quotes rows; so are values in messages of class 22 ("invalid input syntax
    for type integer"), and SQLAlchemy's statement and parameters.
    """
    if isinstance(error, TenancyError):
        return str(error)
    found = postgres_error(error)
    if found is not None:
        message = _line(str(found.args[0]) if found.args else "")
        if (found.sqlstate or "").startswith(_DATA_EXCEPTION):
            message = _QUOTED.sub('"..."', message)
        return f"{message} (SQLSTATE {found.sqlstate})"
    if isinstance(error, DBAPIError):
        return _line(f"{type(error).__name__}: {error.orig}")
    if isinstance(error, TimeoutError):
        return _line(f"timed out: {error}" if str(error) else "timed out")
    if isinstance(error, CommandError):
        return _line(str(error))
    return _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    return " ".join(text.split())
