"""What PostgreSQL says of an error, by SQLSTATE and never by message."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError


def sqlstate_of(error: DBAPIError) -> str | None:
    """PostgreSQL's SQLSTATE of a wrapped driver error."""
    found = getattr(error.orig, "sqlstate", None)
    return found if isinstance(found, str) else None


def constraint_of(error: DBAPIError) -> str | None:
    """The name of the constraint that a statement violated."""
    found = getattr(getattr(error.orig, "__cause__", None), "constraint_name", None)
    return found if isinstance(found, str) else None
