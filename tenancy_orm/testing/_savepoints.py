"""The transactions of one test on one connection: savepoints, kept in the order in which they were opened."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import asyncpg

from ..routing.connection import DriverConnection
from .errors import RollbackModeError

T = TypeVar("T")

running_test: ContextVar[object | None] = ContextVar("tenancy_orm.testing.running_test", default=None)
"""The test that this code runs for. A task keeps the one that it was started in, so a task that outlives its test is
known. None in what was started outside of tests, as by a fixture of the whole run."""

_TEST: Final = "tenancy_test"
"""A savepoint that is there for as long as nobody has ended the transaction of the test."""

_ENDED = (asyncpg.InvalidSavepointSpecificationError, asyncpg.NoActiveSQLTransactionError)
_GRACE = 1.0  # seconds that a statement may take which is under way, or being cancelled, at the end of a test


class RollbackDriverConnection(DriverConnection):
    """The one connection of a tenant during a test: it refuses what cannot work in a transaction that never commits."""

    __slots__ = ()

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Refuse: PostgreSQL starts to listen when a transaction is committed.

        Raises:
            RollbackModeError: always.
        """
        raise RollbackModeError(f"LISTEN {channel} never receives anything")


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

    def abandon(self) -> None:
        """Have its work undone before the next statement: nobody will end it, as where its task was cancelled."""
        self._stack.abandon(self)


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
        self.test: object | None = None
        self._open: list[Savepoint] = []
        self._abandoned: list[Savepoint] = []
        self._numbers = itertools.count(1)
        self._outer: Any = None

    @property
    def is_active(self) -> bool:
        """Whether a test's transaction is open."""
        return self._outer is not None

    @property
    def has_abandoned(self) -> bool:
        """Whether there is something to undo before the next statement."""
        return bool(self._abandoned)

    @property
    def unfinished(self) -> int:
        """How many transactions of sessions are open, which their sessions could still end."""
        return sum(savepoint.kept is None and savepoint not in self._abandoned for savepoint in self._open)

    async def begin_test(self, test: object) -> None:
        """Begin the transaction of a test, in one round trip."""
        self.test, self._outer = test, self.driver.transaction()
        if not self.driver.is_proved:
            # BEGIN is on its way with the proof
            await self._outer.start()
            await self.driver.execute(f"SAVEPOINT {_TEST}")
            return
        # as asyncpg's own ``start`` does
        self.driver._top_xact = self._outer
        await self.driver.execute(f"BEGIN; SAVEPOINT {_TEST}")

    async def end_test(self) -> str | None:
        """Roll everything back.

        Returns:
            What the test has done after which others must not get its tenant, empty where that needs no report; None
            where nothing of it stays.
        """
        outer, self._outer, self.test = self._outer, None, None
        self._open.clear()
        self._abandoned.clear()
        if outer is None:
            return None
        if self.driver.is_closed():
            return ""  # only the server knows what was committed before
        check, self.driver.check_use = self.driver.check_use, None
        try:
            async with asyncio.timeout(_GRACE):
                await self.mutex.acquire()
            try:
                # the first one fails where the test has ended its transaction
                await self.driver.execute(
                    f"ROLLBACK TO SAVEPOINT {_TEST}; SELECT pg_catalog.pg_advisory_unlock_all(); ROLLBACK"
                )
                self.driver._top_xact = None
            finally:
                self.mutex.release()
        except _ENDED:
            self.driver.terminate()
            return (
                "what it has committed by a statement, COMMIT or ROLLBACK: call the methods of the session, or mark it "
                'with @pytest.mark.tenancy(mode="clone")'
            )
        except (TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError, OSError):
            self.driver.terminate()
            return "a statement that still runs: await or cancel the tasks that use a session"
        finally:
            self.driver.check_use = check
        return None

    async def begin(self, *, readonly: bool = False) -> Savepoint:
        """Begin a transaction of a session. The caller has the mutex.

        Raises:
            RollbackModeError: no test runs.
        """
        if not self.is_active:
            raise RollbackModeError("a session is used after the test that its tenant was for")
        await self.undo_abandoned()
        savepoint = Savepoint(self, f"tenancy_{next(self._numbers)}")
        setting = "; SET LOCAL transaction_read_only = on" if readonly else ""

        async def begin() -> None:
            await self.driver.execute(f"SAVEPOINT {savepoint.name}{setting}")
            self._open.append(savepoint)

        try:
            await _completed(begin())
        except asyncio.CancelledError:
            savepoint.abandon()
            raise
        return savepoint

    def abandon(self, savepoint: Savepoint) -> None:
        """Undo a savepoint before the next statement."""
        if savepoint in self._open and savepoint.kept is None:
            savepoint.has_written = True  # the statement that was cancelled, at least
            self._abandoned.append(savepoint)

    async def undo_abandoned(self) -> None:
        """Undo what nobody will end. The caller has the mutex.

        Raises:
            RollbackModeError: another transaction was begun within it and is still open.
        """
        while self._abandoned:
            await self.end_at_once(self._abandoned.pop(), keep=False)

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
        async def send() -> None:
            if not keep:  # as a connection's own roll-back: allowed whoever is bound
                self.driver.rolling_back = True
            try:
                await self.driver.execute(statements)
            except _ENDED as exc:  # the end of the test reports it as well
                if keep:
                    raise RollbackModeError(
                        "a statement, COMMIT or ROLLBACK, has ended the test's transaction"
                    ) from exc
            except asyncpg.PostgresError:
                if not self.driver.is_closed():
                    raise
            finally:
                self.driver.rolling_back = False

        await _completed(send())


async def _completed(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, to its end also where the caller is cancelled: half a savepoint would stop all other sessions."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


__all__ = ["RollbackDriverConnection", "Savepoint", "Savepoints", "running_test"]
