"""A connection's ``receive`` and ``send``: called with no tenant bound, and ended when the admission ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from starlette.types import Message, Receive, Scope, Send

from ..authentication.admission import Admission, AdmissionEnd
from ..context import _current, reset_current
from ..correlation import RequestLabels
from ..errors import TenancyError
from ..events import AdmissionEnded
from ..tenant import Tenant
from .request_ids import HEADER as REQUEST_ID

if TYPE_CHECKING:
    from ..tenancy import Tenancy

logger = logging.getLogger("tenancy_orm.asgi")

CREDENTIAL_ENDED: Final = 4401
"""The close code of a websocket that was opened with a credential which is no longer valid."""

TENANT_UNAVAILABLE: Final = 4403
"""The close code of a websocket of a tenant with a status that no longer admits anyone."""

_CLOSE_SECONDS = 1.0  # a peer that does not read blocks the server's write

# bound here: the variable's own methods are called without a wrapper
_bind = _current.set
_unbind = _current.reset

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.close", "websocket.http.response.start"})


class WatchedConnection:
    """The server's ``receive`` and ``send``, called with no tenant bound, and ended together with the admission.

    ``started`` tells whether anything was answered. ``headers`` are added to the answer. ``admitted`` holds the tenant
    that the middleware admitted, None where it binds none, and the connection's scope. ``labels`` hold the request's id
    where it has one, which is added to the answer as well. ``before_start`` is awaited before the answer starts, and
    returns further headers.

    The admission is watched (``watched``) for as long as the connection can stay open: of a websocket from accept on;
    of a request from the second ``receive``, or from the first part of its body that is not the last, until its
    response is complete. When the admission ends, the connection ends: a websocket is closed, a response is cut short,
    ``receive`` returns the disconnect and ``send`` raises ``ConnectionAbortedError``, also where the application is
    waiting in one of them. Before a response has started, ``send`` raises the admission's error instead, which is also
    the ``refusal``.
    """

    # defaults on the class: most requests never set these
    started = False
    headers: Sequence[tuple[bytes, bytes]] = ()
    labels: RequestLabels | None = None
    before_start: Callable[[], Awaitable[Sequence[tuple[bytes, bytes]]]] | None = None
    admitted: tuple[Tenant | None, Scope, Tenancy] | None = None
    watched = False
    ended: AdmissionEnd | None = None

    _accepted = False
    _complete = False  # whether a response that was not watched is complete
    _disconnect_delivered = False  # whether a websocket's application has received the disconnect
    _admission: Admission | None = None  # while it is watched
    _received = False
    _interrupted: frozenset[asyncio.Task[Any]] = frozenset()  # tasks of _waiting that _interrupt has cancelled
    _closing: asyncio.Task[None] | None = None

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        """Receive from the server.

        Raises:
            ConnectionAbortedError: the connection has ended, and the websocket's application has received that.
            AdmissionEndedError, TenantUnavailableError: it ended before it was accepted, and that was received.
        """
        # the first message is there at once, or is the body of a request that was not answered yet
        if self._received:
            return await self._receive_more()
        self._received = True
        token = _bind(None)
        try:
            return await self._receive()
        finally:
            reset_current(token)

    async def _receive_more(self) -> Message:
        if not (self.watched or self._complete or self._is_websocket):
            self._watch_response()
        if self.ended is not None:
            if self._disconnect_delivered:
                raise self.abort_error()
            return self._disconnect()
        task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        before = task.cancelling()
        self._waiting.add(task)
        token = _bind(None)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if not self._was_interrupted(task, before):
                raise
            return self._disconnect()
        finally:
            reset_current(token)
            self._waiting.discard(task)
            if self._interrupted:
                self._was_interrupted(task, before)  # the server may have ignored the cancellation

    async def send(self, message: Message) -> None:
        """Send to the server.

        Raises:
            ConnectionAbortedError: the connection has ended.
            AdmissionEndedError, TenantUnavailableError: it ended before the websocket was accepted, or before the
                response started.
        """
        if self.started:
            if self.watched or message.get("more_body"):
                await self._send_part(message)
                return
            self._complete = True
        elif (kind := message["type"]) in _STARTS:
            if kind == "websocket.accept":
                await self._accept(message)
                return
            if self.ended is not None and kind == "http.response.start":
                raise self.abort_error()
            message = await self._start(message)
        token = _bind(None)
        try:
            await self._send(message)
        finally:
            # as reset_current does; written out, since it runs on every message
            try:  # noqa: SIM105
                _unbind(token)
            except ValueError:
                pass

    async def answer(self, message: Message) -> None:
        """Send an answer of the middleware itself, also where the application's answer would be refused."""
        if message["type"] in _STARTS:
            message = await self._start(message)
        await self._pass_on(message)

    async def _start(self, message: Message) -> Message:
        """Note that the answer starts, and return its first message with the headers that are added."""
        self.started = True
        if self.before_start is not None:
            await self._add_headers()
        if (self.headers or self.labels) and "status" in message:
            return self._with_headers(message)
        return message

    async def _add_headers(self) -> None:
        before_start, self.before_start = self.before_start, None
        if before_start is not None:
            self.headers = [*self.headers, *await before_start()]

    def _with_headers(self, message: Message) -> Message:
        headers = [*message.get("headers", ()), *self.headers]
        if self.labels is not None:
            # one, and the one that the logs have, whatever else the application has set
            headers = [header for header in headers if header[0].lower() != REQUEST_ID]
            headers.append((REQUEST_ID, self.labels.request_id.encode()))
        return {**message, "headers": headers}

    async def _pass_on(self, message: Message) -> None:
        token = _bind(None)
        try:
            await self._send(message)
        finally:
            reset_current(token)

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _accept(self, message: Message) -> None:
        ended = self._watch()
        if ended is not None:
            self.ended = ended
            raise self.abort_error()
        self.started = True
        await self._pass_on(message)
        self._accepted = True
        if self.ended is not None:
            # it ended during the accept
            self._close()
            raise self.abort_error()

    async def _send_part(self, message: Message) -> None:
        if not self.watched:
            self._watch_response()
        if self.ended is not None:
            raise self.abort_error()
        if message["type"] == "websocket.close" or not (message.get("more_body") or self._accepted):
            # the last message
            self._unwatch()
            await self._pass_on(message)
            return
        task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        before = task.cancelling()
        self._waiting.add(task)
        try:
            await self._pass_on(message)
        except asyncio.CancelledError:
            if not self._was_interrupted(task, before):
                raise
            raise self.abort_error() from None
        finally:
            self._waiting.discard(task)
            if self._interrupted:
                self._was_interrupted(task, before)

    @property
    def _is_websocket(self) -> bool:
        return self.admitted is not None and self.admitted[1]["type"] == "websocket"

    def _watch(self) -> AdmissionEnd | None:
        """End the connection when its admission ends, if it has one. Returns the reason if it has ended already."""
        if self.admitted is None:
            return None
        tenant, scope, tenancy = self.admitted
        if tenant is None:
            admission: object = tenancy.internals.directory.subjects.admit_without_tenant(scope["tenancy"])
        else:
            admission = tenant.admission
        if not isinstance(admission, Admission):
            return None
        ended = admission.watch(self.end)
        if ended is None:
            self.watched, self._admission = True, admission
        return ended

    def _watch_response(self) -> None:
        ended = self._watch()
        if ended is not None:
            self.watched = True
            self.end(ended)

    def _unwatch(self) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.unwatch(self.end)

    async def release(self) -> None:
        """Stop watching the admission, since the application is done, and wait until the websocket is closed."""
        self._unwatch()
        if self._closing is not None:
            await asyncio.wait((self._closing,))

    # --- ending -----------------------------------------------------------------------------------------------------

    def end(self, ended: AdmissionEnd) -> None:
        """End the connection, and interrupt the calls that wait for it."""
        self.ended, self._admission = ended, None
        if self._accepted:
            self._close()
        self._interrupt()
        # a request without an answer so far is refused like any other
        if self.started and self.admitted is not None:
            self._report(ended, *self.admitted)

    @property
    def refusal(self) -> TenancyError | None:
        """The error that refuses a connection, if its admission ended before anything was answered."""
        return None if self.ended is None or self.started else copy(self.ended.error)

    def abort_error(self) -> Exception:
        """Return the error for an application that uses the connection after its end."""
        return self.refusal or ConnectionAbortedError(
            "the connection was ended: the credential that it was opened with is no longer valid"
        )

    def _report(self, ended: AdmissionEnd, tenant: Tenant | None, scope: Scope, tenancy: Tenancy) -> None:
        kind = "websocket" if self._is_websocket else "stream"
        client = scope.get("client")
        if tenant is None:
            logger.info("ended a %s without a tenant, opened with %s: %s", kind, ended.credential_id, ended.reason)
            return
        logger.info("ended a %s of tenant %s, opened with %s: %s", kind, tenant.slug, ended.credential_id, ended.reason)
        tenancy.events.emit(
            AdmissionEnded(
                tenant_id=tenant.id,
                slug=tenant.slug,
                kind=kind,
                reason=ended.reason,
                credential_id=ended.credential_id,
                source=client[0] if client else None,
            )
        )

    def _close(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self._send_close(), context=Context())

    async def _send_close(self) -> None:
        code, reason = self._close_code
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except Exception as exc:  # noqa: BLE001 - the peer has disconnected, or does not read
            logger.debug("a websocket could not be closed: %s", type(exc).__name__)

    def _disconnect(self) -> Message:
        """Return the disconnect message for the application."""
        if not self._is_websocket:
            return {"type": "http.disconnect"}
        self._disconnect_delivered = True
        code, reason = self._close_code
        return {"type": "websocket.disconnect", "code": code, "reason": reason}

    @property
    def _close_code(self) -> tuple[int, str]:
        """The websocket's close code and reason; they say no more than a problem document would."""
        if self.ended is not None and self.ended.by_status:
            return TENANT_UNAVAILABLE, "tenant not available"
        return CREDENTIAL_ENDED, "credential no longer valid"

    @cached_property
    def _waiting(self) -> set[asyncio.Task[Any]]:
        """Tasks that wait in the server's code."""
        return set()

    # --- interrupting calls into the server, as ``asyncio.timeout`` does --------------------------------------------

    def _interrupt(self) -> None:
        for task in self._waiting:
            self._interrupted |= {task}
            task.cancel()

    def _was_interrupted(self, task: asyncio.Task[Any], before: int) -> bool:
        """Undo our cancellation of a task; returns whether it was the only one since ``before``."""
        if task not in self._interrupted:
            return False
        self._interrupted -= {task}
        return task.uncancel() <= before


__all__ = ["CREDENTIAL_ENDED", "TENANT_UNAVAILABLE", "WatchedConnection"]
