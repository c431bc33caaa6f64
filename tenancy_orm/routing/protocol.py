"""asyncpg's protocol on a tenant's connection: it is closed in time, and sends nothing before the marker is proved."""

from __future__ import annotations

import asyncio
import logging
import re
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeAlias

import asyncpg
from asyncpg.protocol import Protocol as DriverProtocol

from ..errors import MarkerMismatchError, TenancyError
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import clear_tracebacks
from ..servers.server import CLOSE_SECONDS
from .marker import FIND, mismatch, refusal
from .reading import SET_MODE

logger = logging.getLogger("tenancy_orm.routing")

# The beginning of an ErrorResponse after which the server ends the connection. Its severity is the first field, and the
# second one too, not translated.
_LAST_MESSAGE = re.compile(rb"E.{4}S(?:(?:FATAL|PANIC)\0|[^\0]*\0V(?:FATAL|PANIC)\0)", re.DOTALL)

BEGIN: Final = "BEGIN;"
"""What asyncpg's ``Transaction`` sends first where nothing is configured."""

_BEGUN_SECONDS: Final = 0.05
"""How long a transaction that began with the proof waits for its first statement: ``now()`` is its beginning."""

Report: TypeAlias = "Callable[[MarkerMismatchError], None]"
Unavailable: TypeAlias = "Callable[[Exception], TenancyError]"
Spawn: TypeAlias = "Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]"


class Proof:
    """What a new connection has yet to prove: that it leads to the tenant's own database.

    The statement that proves it is sent at once, and answered while the caller prepares its first one. What the caller
    most likely sends first, BEGIN for example, follows in the same message; the server skips it where the proof fails.

    Args:
        connection: The connection; nothing was sent on it.
        marker: The marker that its database must have.
        then: What follows: ``BEGIN``, a statement that does no harm where another one comes first, or nothing.
        tenant: The tenant's slug, for the error.
        timeout: Seconds that the server's answer may take.
        report: Gets the error where the database is another one.
        unavailable: Returns the error to raise where the server does not answer as it should.
    """

    __slots__ = (
        *("_connection", "_marker", "_report", "_tenant", "_timeout", "_unavailable"),
        *("claimed", "tag", "taken", "task", "then"),
    )

    def __init__(
        self,
        connection: asyncpg.Connection[Any],
        marker: str,
        *,
        then: str,
        tenant: str,
        timeout: float,
        report: Report,
        unavailable: Unavailable,
    ) -> None:
        # weakly: the connection has the protocol, which has this
        self._connection: weakref.ref[Any] = weakref.ref(connection)
        self._marker = marker
        self._tenant = tenant
        self._timeout = timeout
        self._report = report
        self._unavailable = unavailable
        self.then = then
        self.tag = ""
        """The command tag of ``then``."""
        self.taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the first operation is ``then``, which has been sent."""
        self.claimed = False
        """Whether there is a first operation, which waits for the proof."""
        self.task: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the caller has taken the ``BEGIN``: the transaction is the caller's, even one that was cancelled."""
        return self.then == BEGIN and self.taken.done() and self.taken.result()

    async def run(self, protocol: UnprovedProtocol) -> None:
        """Prove the marker. Afterwards the connection is in a transaction if ``BEGIN`` was taken, and in none if not.

        Raises:
            MarkerMismatchError: the database is another tenant's. The connection is closed.
            TenancyError: what ``unavailable`` has returned. The connection is closed.
        """
        try:
            await self._run(protocol)
        except TenancyError:
            raise  # some are also a PermissionError, and so an OSError
        except SERVER_FAILURES as exc:
            raise self._refuse(self._unavailable(exc)) from clear_tracebacks(exc)
        finally:
            # or the pool would keep a connection that has failed before its first use
            if protocol.__class__ is UnprovedProtocol:
                protocol.abort()

    async def _run(self, protocol: UnprovedProtocol) -> None:
        # in a transaction of its own: what the application sets for its transaction must come before any query
        statement = f"BEGIN ISOLATION LEVEL READ COMMITTED; {refusal(self._marker)}; COMMIT; {self.then}"
        try:
            self.tag = await TenantProtocol.query(protocol, statement, self._timeout)
        except asyncpg.DivisionByZeroError as exc:
            raise await self._mismatch(protocol) from exc
        if self.then == BEGIN:
            if not self.taken.done():
                await asyncio.wait([self.taken], timeout=_BEGUN_SECONDS)
            if not self.taken.done():
                self.taken.set_result(False)
            if not self.taken.result():
                await TenantProtocol.query(protocol, "ROLLBACK", self._timeout)
        protocol.__class__ = TenantProtocol
        del protocol.proof

    async def _mismatch(self, protocol: UnprovedProtocol) -> TenancyError:
        """Report that the database is another tenant's, close the connection, and return the error."""
        found = None
        try:
            await TenantProtocol.query(protocol, "ROLLBACK", self._timeout)
            # not by the connection's own methods, one of which waits for this
            query = await TenantProtocol.prepare(
                protocol, "", FIND, self._timeout, record_class=asyncpg.Record, ignore_custom_codec=True
            )
            query._init_codecs()
            found = await TenantProtocol.bind_execute(protocol, query, (), "", 0, False, self._timeout)
        except SERVER_FAILURES:
            # which tenant it belongs to is not known then, but that it is another one is
            logger.debug("the marker of tenant %s cannot be read", self._tenant)
        error = mismatch(self._marker, self._tenant, found[0] if found else None)
        self._report(error)
        self._refuse(error)
        with suppress(*SERVER_FAILURES):
            # its slot is free once the server has one connection less
            await protocol.close(CLOSE_SECONDS)
        return error

    def _refuse(self, error: TenancyError) -> TenancyError:
        """Have whoever uses the connection next get the same error."""
        connection: Any = self._connection()
        if connection is not None:
            connection.refused = error
        return error


class TenantProtocol(DriverProtocol):  # type: ignore[misc]
    """asyncpg's protocol, which is closed as soon as the server's last message is read.

    On an idle connection asyncpg keeps that message to itself, and the end of the stream may come later. A connection
    that was checked out in between could not be used.
    """

    def data_received(self, data: bytes) -> None:
        """Read what the server has sent."""
        super().data_received(data)
        if data[:1] == b"E" and _LAST_MESSAGE.match(data) is not None:
            self.abort()

    def prove(self, proof: Proof, spawn: Spawn) -> None:
        """Begin to prove the marker. No operation takes place before that has succeeded."""
        self.__class__ = UnprovedProtocol
        self.proof = proof
        proof.task = spawn(proof.run(self))
        proof.task.add_done_callback(_retrieve)

    async def wait_until_proved(self) -> None:
        """Wait until the marker is proved; raises as an operation would."""

    @property
    def is_proved(self) -> bool:
        """Whether the marker is proved. No statement has run before."""
        return True

    @property
    def coming_mode(self) -> str | None:
        """The value of ``default_transaction_read_only`` that was sent with the proof; None where none was."""
        return None


def _after_proof(operation: str) -> Any:
    async def perform(protocol: UnprovedProtocol, *args: Any, **options: Any) -> Any:
        return await UnprovedProtocol._perform(protocol, operation, *args, **options)

    return perform


class UnprovedProtocol(TenantProtocol):
    """The protocol of a new connection: each operation waits for the proof, and none is sent where that fails.

    All that asyncpg sends to a server comes by here: its connections, cursors and prepared statements have no other
    way. In the end the proof makes it a ``TenantProtocol``.
    """

    proof: Proof

    async def wait_until_proved(self) -> None:
        """Wait until the marker is proved; raises as an operation would."""
        await self._wait()

    @property
    def is_proved(self) -> bool:
        """Return False."""
        return False

    @property
    def coming_mode(self) -> str | None:
        """The value of ``default_transaction_read_only`` that was sent with the proof; None where none was."""
        return "on" if self.proof.then == SET_MODE["on"] else None

    def is_in_transaction(self) -> bool:
        """Whether the ``BEGIN`` that was sent with the proof was taken; no other operation has taken place."""
        return self.proof.has_begun

    async def _wait(self, *, take: bool = False) -> bool:
        """Wait for the proof; returns whether the caller, who takes what was sent with it, is the first to do so.

        Raises:
            TenancyError: as ``Proof.run``.
            asyncpg.InterfaceError: another operation waits already.
        """
        proof = self.proof
        assert proof.task is not None  # noqa: S101 - for the type checker: made together with the class
        if proof.claimed and not proof.task.done():
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        proof.claimed = True
        if proof.taken.done():
            take = False  # too late: that transaction has ended
        else:
            proof.taken.set_result(take)
        try:
            # for the next caller, whatever happens to this one
            await asyncio.shield(proof.task)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if proof.task.cancelled() and task is not None and not task.cancelling():
                # the connector has shut down, and nobody has cancelled this caller
                raise asyncpg.InterfaceError("cannot perform operation: connection is closed") from None
            raise
        finally:
            proof.claimed = False
        return take

    async def _perform(self, operation: str, *args: Any, **options: Any) -> Any:
        if self.__class__ is UnprovedProtocol:
            await self._wait()
        # the class is another one by now, so not by super()
        return await getattr(TenantProtocol, operation)(self, *args, **options)

    async def query(self, query: str, *args: Any, **options: Any) -> Any:
        """Run a query of the simple protocol, after the proof; or take what was sent with it."""
        if self.__class__ is UnprovedProtocol:
            proof = self.proof
            if query == proof.then and await self._wait(take=True):
                return proof.tag
        # the class may be another one by now
        return await UnprovedProtocol._perform(self, "query", query, *args, **options)

    prepare = _after_proof("prepare")
    bind = _after_proof("bind")
    execute = _after_proof("execute")
    bind_execute = _after_proof("bind_execute")
    bind_execute_many = _after_proof("bind_execute_many")
    copy_in = _after_proof("copy_in")
    copy_out = _after_proof("copy_out")
    close_portal = _after_proof("close_portal")
    close_statement = _after_proof("close_statement")


def _retrieve(task: asyncio.Task[Any]) -> None:
    # whoever uses the connection gets the error; there may be nobody
    if not task.cancelled():
        task.exception()


__all__ = ["BEGIN", "Proof", "TenantProtocol", "UnprovedProtocol"]
