"""The replication of a move: the address that the other server uses, its password, and what it waits for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.config import ServerAddresses
from tenancy_orm.errors import OperationError
from tenancy_orm.moves import streams
from tenancy_orm.moves.streams import Stream
from tenancy_orm.operations import Switch
from tests.support.moving import Pair, moving_config, rows
from tests.support.replication import TestServer

pytestmark = pytest.mark.new_installation

LOGGING = {"log_statement": "all", "log_min_duration_statement": "0", "log_min_error_statement": "debug5"}


@pytest.fixture
def logged(pair: Pair) -> Iterator[Pair]:
    """Both servers log every statement, and its parameters."""
    servers = (pair.one, pair.two)
    for server in servers:
        for name, value in LOGGING.items():
            server.query(f"ALTER SYSTEM SET {name} = '{value}'")
        server.query("SELECT pg_reload_conf()")
    yield pair
    for server in servers:
        for name in LOGGING:
            server.query(f"ALTER SYSTEM RESET {name}")
        server.query("SELECT pg_reload_conf()")


def log_of(server: TestServer) -> str:
    """What a server has logged."""
    return (server.data_dir / "server.log").read_text("utf-8", "replace")


@pytest.mark.parametrize("superuser", [True, False])
async def test_no_server_logs_the_password_of_a_subscription(
    logged: Pair, control_url: str, name_prefix: str, monkeypatch: pytest.MonkeyPatch, superuser: bool
) -> None:
    """Nor where creating it fails, nor where the administrator may not change what is logged."""
    servers: dict[str, str | ServerAddresses] = {}
    for name in ("one", "two"):
        server = logged.on(name)
        servers[name] = server.url("postgres")
        if not superuser:
            admin = f"{name_prefix}_quiet"
            server.query(f"CREATE ROLE {admin} LOGIN CREATEDB CREATEROLE REPLICATION PASSWORD 'secret'")
            server.query(f"GRANT CONNECT ON DATABASE postgres TO {admin}")
            server.query(f"GRANT pg_read_all_stats, pg_signal_backend, pg_create_subscription TO {admin}")
            servers[name] = f"postgresql://{admin}:secret@127.0.0.1:{server.port}/postgres"
    tenancy = Tenancy(moving_config(logged, control_url, name_prefix, servers=servers))
    await tenancy.open(initialise=True)
    secrets: list[str] = []
    original = Stream._set_password

    async def note(stream: Stream, password: str) -> None:
        secrets.append(password)
        await original(stream, password)

    async def refuse(stream: Stream, password: str) -> None:
        secrets.append(password)  # the login keeps another one

    try:
        await tenancy.tenants.create("acme")
        monkeypatch.setattr(Stream, "_set_password", refuse)
        with pytest.raises(OperationError, match=r"cannot follow server 'one' .*password authentication failed"):
            await tenancy.moves.move("acme", to="two")
        monkeypatch.setattr(Stream, "_set_password", note)
        await tenancy.moves.move("acme", to="two")
        used = logged.one.query("SELECT subconninfo FROM pg_subscription")
        await tenancy.moves.rollback("acme")
    finally:
        await tenancy.close()
    assert len(set(secrets)) == 3 and secrets[-1] in used
    for server in (logged.one, logged.two):
        assert "CREATE SUBSCRIPTION" in log_of(server)
        assert not [secret for secret in secrets if secret in log_of(server)]
        assert not re.search(r"postgresql://[^\s:]+:(?!TENANCYPASSWORD)[^\s@]+@", log_of(server))


async def test_the_other_server_uses_the_address_that_is_meant_for_servers(
    plane: Tenancy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.tenants.create("acme")
    await plane.servers.update(
        "one", from_settings=True, peer_address=f"postgresql://127.0.0.1:{pair.one.port}?connect_timeout=7"
    )
    known = await plane.servers.get("one")
    assert (known.source, known.peer_address) == ("row", f"127.0.0.1:{pair.one.port}")
    found: list[str] = []
    original = Switch._close

    async def close(switch: Switch, *arguments: object) -> None:
        found.append(pair.two.query("SELECT subconninfo FROM pg_subscription"))
        await original(switch, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Switch, "_close", close)
    await plane.moves.move("acme", to="two")
    assert "connect_timeout=7" in found[0]
    assert "connect_timeout" not in pair.one.query("SELECT subconninfo FROM pg_subscription")
    await plane.moves.confirm("acme")
    await plane.servers.update("one", peer_address=None)
    assert (await plane.servers.get("one")).peer_address is None


async def test_a_server_without_a_worker_that_is_left_ends_a_move_soon(
    plane: Tenancy, pair: Pair, moving: TenancyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.tenants.create("acme")
    monkeypatch.setattr(streams, "WORKER_SECONDS", 2.0)
    original = Stream.subscribe

    async def subscribe(stream: Stream, *arguments: object, **options: object) -> None:
        await original(stream, *arguments, **options)  # type: ignore[arg-type]
        rows(pair.two, stream.target.database, f"ALTER SUBSCRIPTION {stream.name} DISABLE")

    monkeypatch.setattr(Stream, "subscribe", subscribe)
    async with asyncio.timeout(120):
        with pytest.raises(OperationError, match=r"has not read from server 'one' for 2 s; .*max_logical_replication"):
            await plane.moves.move("acme", to="two")
    assert pair.left(moving.name_prefix) == []
