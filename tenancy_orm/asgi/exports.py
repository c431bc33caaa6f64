"""``ExportEndpoint``: lets a tenant fetch its own data as an archive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from ..cancellation import run_to_completion
from ..correlation import current_request_id
from ..errors import ExportError
from ..exports import ExportFormat, ExportStream
from .callers import source_of
from .middleware import TENANCY
from .problems import Problem
from .scopes import demand_scopes

if TYPE_CHECKING:
    from ..tenancy import Tenancy

_FORMATS: tuple[ExportFormat, ...] = ("jsonl", "csv")


class ExportEndpoint:
    """An ASGI application that answers GET with the bound tenant's data: ``Route("/export", ExportEndpoint())``.

    The archive is sent as it is made, as a ZIP file; see ``tenancy.exports.open``. ``?format=csv`` asks for CSV in
    place of JSON Lines. Until its first byte is sent, a failure is answered as any other. After that the connection is
    cut: the body has no end then (no last chunk), and the ZIP file no directory, so that nothing opens it. One export
    of each tenant is made at a time; a second request gets 409.

    Args:
        scope: The scope that the request's credential must have.
        exclude: Tables and columns to leave out, beside ``export.exclude``.

    Raises:
        TenancyError: (in a request) as ``demand_scopes`` and ``tenancy.exports.open``; the middleware answers it.
    """

    def __init__(self, *, scope: str = "export", exclude: Iterable[str] = ()) -> None:
        self._scope = scope
        self._exclude = tuple(exclude)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        if request.method != "GET":
            await PlainTextResponse("Method Not Allowed", 405, {"Allow": "GET"})(scope, receive, send)
            return
        credential = demand_scopes(request, self._scope)
        wanted = request.query_params.get("format", _FORMATS[0])
        row_format = next((one for one in _FORMATS if one == wanted), None)
        if row_format is None:
            detail = f"format is one of {', '.join(_FORMATS)}"
            await Problem(400, "unknown-format", "Unknown format", detail)(scope, receive, send)
            return
        tenancy: Tenancy = scope[TENANCY]
        actor = credential.actor(request_id=current_request_id(), source=source_of(scope))
        async with tenancy.exports.open(
            credential.tenant, row_format=row_format, exclude=self._exclude, actor=actor
        ) as export:
            await send({"type": "http.response.start", "status": 200, "headers": _headers(export)})
            await _send(export, receive, send, tenancy)
        # only now: the export is recorded as complete
        await send({"type": "http.response.body", "body": b""})


def _headers(export: ExportStream) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", export.media_type.encode()),
        # a slug has no sign that would need to be quoted
        (b"content-disposition", f'attachment; filename="{export.filename}"'.encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]


async def _send(export: ExportStream, receive: Receive, send: Send, tenancy: Tenancy) -> None:
    """Send the archive, until the client has gone, reads nothing, or the time is over."""
    config = tenancy.config.export
    refusal: BaseException | None = None

    async def write(data: bytes) -> None:
        nonlocal refusal
        try:
            async with asyncio.timeout(config.stall_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError as exc:
            refusal = ExportError(f"the client has read nothing for {config.stall_timeout:g} s")
            raise refusal from exc
        except Exception as exc:
            refusal = exc  # the server's, or the middleware's, where the credential is no longer valid
            raise

    sending = asyncio.ensure_future(export.write_to(write))
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        done, _ = await asyncio.wait(
            (sending, leaving), timeout=config.request_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if sending in done:
            if sending.exception() is not None and refusal is not None:
                raise refusal
            sending.result()
        elif leaving in done:
            leaving.result()
            raise ClientDisconnect
        else:
            raise ExportError(f"it took longer than {config.request_timeout:g} s")
    finally:
        for task in (sending, leaving):
            task.cancel()
        # a connection that is in use by one of them must not be returned
        await run_to_completion(asyncio.wait((sending, leaving)))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


__all__ = ["ExportEndpoint"]
