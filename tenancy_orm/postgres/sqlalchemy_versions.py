"""What differs between SQLAlchemy 2.0 and 2.1, as one interface: above all the state of the adapter of asyncpg.

The types are those of 2.1, which the type checker sees.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_connection
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

# 2.1 has it as ``await_`` too, and deprecates this name in 2.2
from sqlalchemy.util import await_only as await_

SQLALCHEMY_2_0 = sqlalchemy.__version__.startswith("2.0.")


class AdaptedConnection(AsyncAdapt_asyncpg_connection):
    """SQLAlchemy's DBAPI connection over asyncpg; a subclass names the classes of its cursors."""

    __slots__ = ()

    _cursor_cls: Any
    _ss_cursor_cls: Any

    if SQLALCHEMY_2_0:

        def cursor(self, server_side: bool = False) -> Any:
            """Return a cursor of the class that this connection's class names."""
            return (self._ss_cursor_cls if server_side else self._cursor_cls)(self)


def has_begun(connection: Any) -> bool:
    """Whether PostgreSQL has begun a transaction for this connection of the adapter."""
    # 2.0 sets ``_transaction`` before it sends BEGIN
    begun: bool = connection._started if SQLALCHEMY_2_0 else connection._transaction is not None
    return begun


def forget_transaction(connection: Any) -> None:
    """Consider the transaction ended, as it is where the connection is closed."""
    connection._transaction = None
    if SQLALCHEMY_2_0:
        connection._started = False


def hold_transaction(connection: Any, transaction: Any) -> None:
    """Consider ``transaction`` begun; it need not be asyncpg's, but have its ``commit`` and ``rollback``."""
    connection._transaction = transaction
    if SQLALCHEMY_2_0:
        connection._started = True


def connections_in(session: Session) -> list[Connection] | None:
    """The connections that a session has in its transaction; None where it has a savepoint."""
    transaction: Any = session.get_transaction()
    if transaction is None:
        return []
    if session.in_nested_transaction():
        return None
    return [entry[0] for entry in transaction._connections.values()]


async def roll_back(connection: Any) -> None:
    """Roll back the transaction that has begun; it is over whether or not PostgreSQL answers.

    Raises:
        asyncpg.PostgresError, asyncpg.InterfaceError, OSError: the connection cannot be used any more.
    """
    if SQLALCHEMY_2_0:
        await connection._rollback_and_discard()
    else:
        await connection._call_and_discard(connection._transaction.rollback)


__all__ = [
    "SQLALCHEMY_2_0",
    "AdaptedConnection",
    "await_",
    "connections_in",
    "forget_transaction",
    "has_begun",
    "hold_transaction",
    "roll_back",
]
