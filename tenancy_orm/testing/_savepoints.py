"""The transactions of one test on one connection: savepoints, kept in the order in which they were opened."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import asyncpg

from ..routing.connection import DriverConnection
from .errors import RollbackModeError


class RollbackDriverConnection(DriverConnection):
    """The one connection of a tenant during a test: it refuses what cannot work in a transaction that never commits."""

    __slots__ = ()

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Refuse: PostgreSQL starts to listen when a transaction is committed.

        Raises:
            RollbackModeError: always.
        """
        raise RollbackModeError(f"LISTEN {channel} never hears anything")


class Savepoint:
    """One transaction of a session: what asyncpg's ``Transaction`` is otherwise."""

    def __init__(self, stack: Savepoints, name: str) -> None:
        self._stack = stack
        self.name = name
        self.has_written = False
        self.kept: bool | None = None
        """Whether its work stays: None while it is open."""

    async def commit(self) -> None:
        """Keep its work, as far as the transaction of the test goes.

        Raises:
            RollbackModeError: the test has ended.
        """
        await self._stack.end(self, keep=True)

    async def rollback(self) -> None:
        """Undo its work.

        Raises:
            RollbackModeError: another transaction was begun within it and is still open, and this one has written.
        """
        await self._stack.end(self, keep=False)


class Savepoints:
    """The transaction of a test, and those that its sessions have begun within it.

    PostgreSQL nests savepoints: to end one ends those that were begun later. Sessions do not, and two of them may be
    open at once. So a commit of one that is not the innermost is carried out when those within it have ended. The same
    for a roll-back of one that has only read. A roll-back of one that has written would take the work of the others
    with it, so it is an error.
    """

    def __init__(self, driver: DriverConnection) -> None:
        self.driver = driver
        self.mutex = asyncio.Lock()
        self._open: list[Savepoint] = []
        self._numbers = itertools.count(1)
        self._outer: Any = None

    @property
    def is_active(self) -> bool:
        """Whether a test's transaction is open."""
        return self._outer is not None

    @property
    def unfinished(self) -> int:
        """How many transactions of sessions are open."""
        return sum(savepoint.kept is None for savepoint in self._open)

    async def begin_test(self) -> None:
        """Begin the transaction of a test."""
        outer = self.driver.transaction()
        await outer.start()
        self._outer = outer

    async def end_test(self) -> None:
        """Roll everything back."""
        outer, self._outer = self._outer, None
        self._open.clear()
        if outer is None or self.driver.is_closed():
            return
        check, self.driver.check_use = self.driver.check_use, None
        try:
            await outer.rollback()
        finally:
            self.driver.check_use = check

    async def begin(self, *, readonly: bool = False) -> Savepoint:
        """Begin a transaction of a session. The caller has the mutex.

        Raises:
            RollbackModeError: no test runs.
        """
        if not self.is_active:
            raise RollbackModeError("a session is used after the test that its tenant was for")
        savepoint = Savepoint(self, f"tenancy_{next(self._numbers)}")
        setting = "; SET LOCAL transaction_read_only = on" if readonly else ""
        await self.driver.execute(f"SAVEPOINT {savepoint.name}{setting}")
        self._open.append(savepoint)
        return savepoint

    async def end(self, savepoint: Savepoint, *, keep: bool) -> None:
        """End a transaction, now or when those within it have ended. It takes the mutex."""
        async with self.mutex:
            await self.end_at_once(savepoint, keep=keep)

    async def end_at_once(self, savepoint: Savepoint, *, keep: bool) -> None:
        """End a transaction; the caller has the mutex."""
        if savepoint.kept is not None or savepoint not in self._open:
            if keep:
                raise RollbackModeError("a session is committed after the test that its tenant was for")
            return
        if self._open[-1] is not savepoint:
            if not keep and savepoint.has_written:
                savepoint.kept = True
                raise RollbackModeError(
                    "a transaction is rolled back while another one that was begun later is open, and would lose its "
                    "work as well"
                )
            savepoint.kept = True
            return
        savepoint.kept = keep
        statements = []
        while self._open and self._open[-1].kept is not None:
            ended = self._open.pop()
            if not ended.kept:
                statements.append(f"ROLLBACK TO SAVEPOINT {ended.name}")
            statements.append(f"RELEASE SAVEPOINT {ended.name}")
        await self._send("; ".join(statements), keep=keep)

    async def _send(self, statements: str, *, keep: bool) -> None:
        if not keep:  # as a connection's own roll-back: allowed whoever is bound
            self.driver.rolling_back = True
        try:
            await self.driver.execute(statements)
        except asyncpg.PostgresError:
            if not self.driver.is_closed():
                raise
        finally:
            self.driver.rolling_back = False


__all__ = ["RollbackDriverConnection", "Savepoint", "Savepoints"]
