"""Logging in to a server that does not answer, and noticing one that stops answering."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tenancy_orm import Tenancy
from tenancy_orm.postgres.dsn import Dsn
from tenancy_orm.servers.server import PEER_SECONDS, Server

URL = "postgresql://admin:hunter2@127.0.0.1:{port}/postgres"


@pytest.fixture
async def silent() -> AsyncIterator[Server]:
    """A server that accepts connections and never answers."""
    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    yield Server("default", Dsn.parse(URL.format(port=port)), connect_timeout=30)
    for writer in writers:
        writer.transport.abort()
    listener.close()
    await listener.wait_closed()


def texts_in_frames(error: BaseException) -> str:
    """Return all local variables in the frames of an error and its causes, as an error tracker records them."""
    shown = []
    current: BaseException | None = error
    while current is not None:
        frames = traceback.walk_tb(current.__traceback__)
        stack = traceback.StackSummary.extract(frames, capture_locals=True)
        # not those of this file: a test knows the password
        shown += [str(frame.locals) for frame in stack if frame.filename != __file__]
        current = current.__cause__ or current.__context__
    return "\n".join(shown)


async def test_a_deadline_around_a_login_shows_no_password(silent: Server) -> None:
    """After a time-out or a cancellation, the error's frames do not contain the password: asyncpg's are dropped."""
    with pytest.raises(TimeoutError) as bare:
        async with asyncio.timeout(0.2):
            await asyncpg.connect(URL.format(port=silent.port))
    assert "hunter2" in texts_in_frames(bare.value)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.2):
            await silent.connect_admin()
    assert "hunter2" not in texts_in_frames(caught.value)


async def test_every_connection_notices_a_dead_peer(tenancy: Tenancy) -> None:
    """The socket has the options with which the kernel closes a connection that gets no acknowledgement."""
    await tenancy.tenants.create("acme")
    control, server = tenancy.internals.control, tenancy.internals.servers["default"]
    admin = await server.connect_admin()
    try:
        async with (
            tenancy.internals.router.connection(await tenancy.tenants.get("acme")) as of_tenant,
            control.connect() as of_control,
        ):
            raw = [(await connection.get_raw_connection()).driver_connection for connection in (of_tenant, of_control)]
            for driver in (*raw, admin):
                peer: socket.socket = driver._transport.get_extra_info("socket")
                assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == PEER_SECONDS * 1_000
    finally:
        await admin.close()
