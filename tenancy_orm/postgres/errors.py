"""PostgreSQL's errors, by SQLSTATE and never by message."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TypeVar

import asyncpg
from sqlalchemy.exc import DBAPIError, StatementError

from ..errors import TenancyError

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

E = TypeVar("E", bound=BaseException)

_DATA_EXCEPTION = "22"  # a class of SQLSTATEs
_DETAIL = "\nDETAIL:"
_QUOTED = re.compile(r'".*"', re.DOTALL)


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
    """The SQLSTATE of the PostgreSQL error behind ``error``, which may be of any driver; or None."""
    found = postgres_error(error)
    if found is not None:
        return str(found.sqlstate) if found.sqlstate else None
    original = error.orig if isinstance(error, DBAPIError) else None
    state: str | None = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    return state


def constraint_of(error: BaseException) -> str | None:
    """The name of the constraint that a statement violated, or None."""
    found = postgres_error(error)
    return found.constraint_name if found is not None else None


def describe(error: BaseException) -> str:
    """Return one line about ``error`` for a message, a report or a log.

    PostgreSQL's DETAIL is left out, since it quotes rows; so are values in messages of class 22 ("invalid input syntax
    for type integer"), and SQLAlchemy's statement and parameters.
    """
    if isinstance(error, TenancyError):
        return str(error)
    is_postgres = isinstance(error, asyncpg.PostgresError | DBAPIError) or getattr(error, "sqlstate", None) is not None
    state = sqlstate_of(error) if is_postgres else None
    if state is not None:
        message = _message(error)
        if state.startswith(_DATA_EXCEPTION):
            message = _QUOTED.sub('"..."', message)
        return f"{message} (SQLSTATE {state})"
    # of a wrapper without its statement
    text = str((error.orig or error.args[0]) if isinstance(error, StatementError) else error).partition(_DETAIL)[0]
    if isinstance(error, TimeoutError):
        return _line(f"timed out: {text}" if text else "timed out")
    return _line(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _message(error: BaseException) -> str:
    """PostgreSQL's message alone, as the driver has it."""
    found = postgres_error(error)
    if found is not None:
        return _line(str(found.args[0]) if found.args else "")
    original = error.orig if isinstance(error, DBAPIError) else None
    # psycopg has the fields apart; of another driver the first line is the message
    primary = getattr(getattr(original, "diag", None), "message_primary", None)
    return _line(primary or str(original).partition("\n")[0])


def without_detail(error: E) -> E:
    """Remove DETAIL, which quotes rows, from an error and its causes, and return it: for a log with its traceback.

    Only for an error that ends there: whoever raised it may want to read it. It may be of any class, and is left as it
    is if that refuses.
    """
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        one = found.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        with suppress(Exception):
            if isinstance(one, asyncpg.PostgresError):
                one.detail = None
            elif any(isinstance(arg, str) and _DETAIL in arg for arg in one.args):
                # the text of a wrapper, which some releases of SQLAlchemy take from the driver's error
                one.args = tuple(arg.partition(_DETAIL)[0] if isinstance(arg, str) else arg for arg in one.args)
        found += [one.__cause__, one.__context__, one.orig if isinstance(one, DBAPIError) else None]
        if isinstance(one, BaseExceptionGroup):
            found += one.exceptions
    return error


def _line(text: str) -> str:
    return " ".join(text.split())
