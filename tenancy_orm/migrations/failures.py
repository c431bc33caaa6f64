"""Errors of migrations as text for a report: without a statement's parameters, rows' values or passwords."""

from __future__ import annotations

from alembic.util.exc import CommandError

from ..errors import FleetMigrationError
from ..postgres import errors
from ..postgres.errors import (
    CONCURRENT_UPDATE,
    DEADLOCK_DETECTED,
    LOCK_NOT_AVAILABLE,
    SERIALIZATION_FAILURE,
    TOO_MANY_CONNECTIONS,
)

# Another attempt may succeed after these: another session was the cause, not the migration. A statement that took too
# long (57014) is not among them: it would take as long again.
TRANSIENT = frozenset(
    {LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, SERIALIZATION_FAILURE, CONCURRENT_UPDATE, TOO_MANY_CONNECTIONS}
)


class FleetCommandError(FleetMigrationError, CommandError):
    """Some tenants failed in one of Alembic's own commands; its command line prints this and exits with a failure."""


def describe(error: BaseException) -> str:
    """Return one line about ``error``, as ``postgres.errors.describe``; of Alembic's own errors the text alone."""
    return " ".join(str(error).split()) if isinstance(error, CommandError) else errors.describe(error)
