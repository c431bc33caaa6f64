"""One request: the thread that serves it, and ``TenancyMiddleware``, which decides about it in the event loop.

The middleware's application is a stand-in. It reports that the request is admitted, and then sends what the thread
tells it to send, so that everything that the middleware does with a response holds here as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..context import current_tenant_or_none
from ..correlation import RequestLabels, current_labels
from ..routing.consistency import Consistency, current_consistency
from ..sync.hops import Answer
from ..tenant import Tenant

EXCHANGE: Final = "tenancy_orm.wsgi"
"""Key of the scope: the ``Exchange``."""

HeaderList: TypeAlias = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Admitted:
    """The application may serve the request."""

    tenant: Tenant | None
    labels: RequestLabels | None = None
    consistency: Consistency | None = None


@dataclass
class Response:
    """An answer; ``is_own`` where it is the middleware's, in place of the application's."""

    status: int
    headers: HeaderList
    body: bytes = b""
    is_own: bool = False


async def stand_in(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for the WSGI application, which a thread calls."""
    await scope[EXCHANGE].admit(send)


class Exchange:
    """What the thread and the loop tell each other. All of it runs in the loop; each method answers an ``Answer``.

    Args:
        app: The middleware.
        scope: The request's scope.
    """

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self._app = app
        self._scope = scope
        self._answer: Answer[Any] | None = None
        self._orders: asyncio.Queue[tuple[Answer[Any] | None, Callable[[Send], Any] | None]] = asyncio.Queue()
        self._response: Response | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self, answer: Answer[Admitted | Response]) -> None:
        """Ask the middleware about the request."""
        self._answer = answer
        self._scope[EXCHANGE] = self
        self._task = asyncio.get_running_loop().create_task(self._serve())
        self._task.add_done_callback(self._ended)

    def start(self, answer: Answer[Response], status: int, headers: HeaderList) -> None:
        """Start the response; answered by the headers that the client gets."""
        message = {"type": "http.response.start", "status": status, "headers": headers}
        self._order(answer, lambda send: send(message))

    def part(self, answer: Answer[None]) -> None:
        """Ask whether a further part of the body may be sent: the admission may have ended."""
        self._order(answer, lambda send: send({"type": "http.response.body", "body": b"", "more_body": True}))

    def fail(self, answer: Answer[Response], error: Exception) -> None:
        """Have the middleware answer an error of the application's, or raise it."""

        async def throw(send: Send) -> None:
            raise error

        self._order(answer, throw)

    def finish(self) -> None:
        """End the request, whatever has come of it."""
        self._orders.put_nowait((None, None))

    async def admit(self, send: Send) -> None:
        """Report that the request is admitted, and carry out what the thread orders."""
        tenant = current_tenant_or_none()
        consistency = None if tenant is None else current_consistency(tenant.id)
        self._reply(Admitted(tenant, current_labels(), consistency))
        while True:
            answer, order = await self._orders.get()
            if order is None:
                if self._response is not None:
                    await send({"type": "http.response.body", "body": b""})
                return
            self._answer = answer
            await order(send)
            self._reply(self._response)

    def _order(self, answer: Answer[Any], order: Callable[[Send], Any]) -> None:
        if self._task is None or self._task.done():
            answer.set_error(ConnectionAbortedError("this request has ended already"))
        else:
            self._orders.put_nowait((answer, order))

    def _reply(self, item: object) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.set_result(item)

    async def _serve(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        # the body is the application's to read, in its thread
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._response = Response(message["status"], list(message.get("headers", ())))
        elif self._response is not None:
            self._response.body += message.get("body", b"")

    def _ended(self, task: asyncio.Task[None]) -> None:
        answer, self._answer = self._answer, None
        if task.cancelled():
            error: BaseException | None = ConnectionAbortedError("this Tenancy was closed while a request was served")
        else:
            error = task.exception()
        if answer is None:
            return
        if error is not None:
            answer.set_error(error)
        elif self._response is not None:
            self._response.is_own = True
            answer.set_result(self._response)
        else:
            answer.set_error(ConnectionAbortedError("this request has ended without an answer"))


__all__ = ["Admitted", "Exchange", "HeaderList", "Response", "stand_in"]
