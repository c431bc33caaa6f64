"""Whether a server answers at all: the beginning of a login, without a password.

A whole login would tell less. It waits for whoever locks the database, which a tenant's role can do. PostgreSQL asks
for the password before that.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final

from .dsn import DEFAULT_PORT, Dsn

_SSL_REQUEST: Final = struct.pack("!II", 8, 80877103)
_PROTOCOL: Final = 196608  # 3.0
_MOST_BYTES: Final = 8_192
# Classes of SQLSTATEs by which a server says that it serves nobody: it starts, stops, or waits for another's crash.
_AWAY: Final = "57P"


async def ping(dsn: Dsn, *, timeout: float) -> None:
    """Return once a server of ``dsn`` answers, whatever it answers, unless it says that it is starting or stopping.

    Several hosts are asked at the same time, and one answer is enough.

    Args:
        dsn: Where.
        timeout: Seconds that this may take.

    Raises:
        OSError: nothing answers.
    """
    hosts = dsn.hosts or (("localhost", DEFAULT_PORT),)
    try:
        async with asyncio.timeout(timeout):
            await _first(_ask(dsn, host, port) for host, port in hosts)
    except TimeoutError:
        raise TimeoutError from None


async def _first(attempts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Return when one attempt succeeds; raise the last error where none does."""
    waiting = {asyncio.ensure_future(attempt) for attempt in attempts}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            errors = [task.exception() for task in done]
            if None in errors:
                return
            if not waiting and errors[0] is not None:
                raise errors[0]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _ask(dsn: Dsn, host: str, port: int) -> None:
    if host.startswith(("/", "@")):
        reader, writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        encrypts = False
    else:
        reader, writer = await asyncio.open_connection(host, port)
        encrypts = dsn.parameters.get("sslmode") != "disable"
    try:
        if encrypts:
            writer.write(_SSL_REQUEST)
            # "S": a new process of the server has answered; what follows is encrypted
            if await reader.readexactly(1) == b"S":
                return
        writer.write(_startup(user=dsn.user or "postgres", database=dsn.database or "postgres"))
        kind, size = struct.unpack("!cI", await reader.readexactly(5))
        if kind == b"E":
            fields = (await reader.readexactly(min(size - 4, _MOST_BYTES))).split(b"\0")
            sqlstate = next((field[1:].decode("ascii", "replace") for field in fields if field[:1] == b"C"), "")
            if sqlstate.startswith(_AWAY):
                message = next((field[1:] for field in fields if field[:1] == b"M"), b"").decode("utf-8", "replace")
                raise ConnectionRefusedError(f"{message} ({sqlstate})")
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the connection was closed without an answer") from None
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


def _startup(**parameters: str) -> bytes:
    pairs = b"".join(f"{name}\0{value}\0".encode() for name, value in parameters.items()) + b"\0"
    return struct.pack("!II", len(pairs) + 8, _PROTOCOL) + pairs


__all__ = ["ping"]
