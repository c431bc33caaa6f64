"""Opening a connection by a ``Dsn``: to several hosts in turn, each within its time."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, TypeAlias, TypeVar

import asyncpg
from asyncpg.exceptions import ClientConfigurationError, TargetServerAttributeNotMatched
from sqlalchemy.exc import DBAPIError

from ..errors import ConfigurationError
from ..forks import leave_socket
from .dsn import Dsn
from .errors import (
    INSUFFICIENT_PRIVILEGE,
    INVALID_AUTHORIZATION,
    INVALID_CATALOG_NAME,
    INVALID_PASSWORD,
    postgres_error,
)
from .parameters import SSL_FILES
from .ping import ping

# the next host is tried, as libpq does: no answer, a server that starts or stops, one of another kind
_NEXT = (OSError, asyncpg.CannotConnectNowError, TargetServerAttributeNotMatched)

PEER_SECONDS: Final = 30
"""Seconds after which a connection is closed if the other side's machine acknowledges nothing."""

# The kernel closes such a connection within about PEER_SECONDS. A long statement is not affected while the server's
# machine acknowledges. Without this, the kernel repeats what was sent to a lost machine for some 15 minutes, and waits
# for an answer of a lost machine for ever.
PEER_KEEPALIVES: Final = {
    "keepalives_idle": PEER_SECONDS // 2,
    "keepalives_interval": PEER_SECONDS // 6,
    "keepalives_count": 3,
    "tcp_user_timeout": PEER_SECONDS * 1_000,
}
"""libpq's parameters for that."""

Check: TypeAlias = Callable[[Dsn, str | None, str | None], None]
"""Gets where a connection leads, and the role and the database that it asks for."""

_checks: list[Check] = []

_SKIP_SECONDS: Final = 3.0
_PING_SECONDS: Final = 2.0
_skipped_until: dict[tuple[str, int], float] = {}
_pings: set[asyncio.Task[None]] = set()

_ONE_PRIMARY: Final = ("read-write", "primary")
_primaries: dict[tuple[tuple[str, int], ...], tuple[str, int]] = {}  # by the hosts of a DSN, the one that matched last
# A standby may not have replayed yet that a database or role was made, a right was granted or a password changed. It
# refuses such a login before the driver can see that it is a standby.
_NOT_REPLAYED: Final = (INVALID_CATALOG_NAME, INVALID_AUTHORIZATION, INVALID_PASSWORD, INSUFFICIENT_PRIVILEGE)

C = TypeVar("C", bound="asyncpg.Connection[Any]")
E = TypeVar("E", bound=BaseException)


def add_check(added: Check) -> None:
    """Call ``added`` before every connection of this process; it raises where there may be none.

    For test runs, which may reach the server of the tests alone.
    """
    _checks.append(added)


def check(dsn: Dsn, *, user: str | None, database: str | None) -> None:
    """Call what ``add_check`` was given. A connection that ``connect`` does not open calls it before it is opened."""
    for one in _checks:
        one(dsn, user, database)


def remove_check(added: Check) -> None:
    """Undo ``add_check``."""
    if added in _checks:
        _checks.remove(added)


def hosts_to_try(dsn: Dsn) -> tuple[tuple[str, int], ...]:
    """Return the hosts of a DSN in their order, without those that have not answered within the last seconds.

    Otherwise each new connection would wait for a lost machine that the DSN names first. Now and then one connection
    tries it again. Where no other host is left, all are returned. Where the primary is asked for, the host that was it
    at the last connection comes first. In any thread.
    """
    if len(dsn.hosts) <= 1:
        return dsn.hosts
    now = time.monotonic()
    found = []
    for host in dsn.hosts:
        until = _skipped_until.get(host)
        if until is None or now >= until:
            found.append(host)
            if until is not None:
                _skipped_until[host] = now + _SKIP_SECONDS  # this one tries it, and the others need not wait for it
    found = found or list(dsn.hosts)
    if (primary := _primaries.get(dsn.hosts)) in found and _wants_primary(dsn):
        found.sort(key=lambda host: host != primary)
    return tuple(found)


def _wants_primary(dsn: Dsn) -> bool:
    return dsn.parameters.get("target_session_attrs") in _ONE_PRIMARY


def suspect_hosts(dsn: Dsn, *hosts: tuple[str, int]) -> None:
    """Ask hosts, in the background, whether they answer; the next connections leave out one that does not.

    A time-out alone does not show that: a login also waits for whoever locks its database.
    """
    for host in hosts:
        task = asyncio.get_running_loop().create_task(_ask(replace(dsn, hosts=(host,))), context=Context())
        _pings.add(task)
        task.add_done_callback(_pings.discard)


async def _ask(dsn: Dsn) -> None:
    try:
        await ping(dsn, timeout=_PING_SECONDS)
    except OSError:
        _skipped_until[dsn.hosts[0]] = time.monotonic() + _SKIP_SECONDS


async def connect(
    dsn: Dsn,
    *,
    purpose: str,
    timeout: float,
    settings: Mapping[str, str] = MappingProxyType({}),
    password: str | Callable[[], str] | None = None,
    connection_class: type[C] = asyncpg.Connection,
    **options: Any,
) -> C:
    """Open a connection. Its keep-alives are the DSN's own, or else those that ``PEER_SECONDS`` stands for.

    Args:
        dsn: Where to.
        purpose: What the connection is for, as its application_name says.
        timeout: Seconds that this may take; several hosts share them.
        settings: Further settings of the server, in force from the start.
        password: The password, or a function that returns it as late as possible; the DSN's own where None.
        connection_class: The class of the connection.
        options: Further arguments of ``asyncpg.connect``; they win over what the DSN says.

    Raises:
        ConfigurationError: the DSN names a file that cannot be read, or asyncpg refuses its parameters.
        asyncpg.PostgresError, asyncpg.InterfaceError, OSError: the server refuses, or does not answer.
    """
    given = {**dsn.arguments(), **options}
    check(dsn, user=given.get("user"), database=given.get("database"))
    given["server_settings"] = dsn.server_settings(**{"application_name": dsn.application_name(purpose), **settings})
    if password is None and dsn.password is not None:
        password = dsn.secret

    async def attempt(seconds: float, **chosen: Any) -> C:
        opened: C = await asyncpg.connect(
            **{**given, **chosen}, password=password, timeout=seconds, connection_class=connection_class
        )
        return opened

    try:
        connection = await _first_host(dsn, attempt, timeout)
    except ClientConfigurationError as exc:
        raise ConfigurationError(f"a connection to {dsn} cannot be opened: {exc}") from clear_tracebacks(exc)
    except BaseException as exc:
        # a cancellation or a time-out as well: the frames of every failed connect hold the password
        clear_tracebacks(exc)
        if isinstance(exc, OSError) and (name := _unreadable(dsn)):
            raise ConfigurationError(f"the file of {name} for {dsn} cannot be read") from exc
        raise
    set_keepalive(connection, {**PEER_KEEPALIVES, **dsn.keepalives})
    leave_socket(connection, _descriptor)
    return connection


def _descriptor(connection: asyncpg.Connection[Any]) -> int:
    # uvloop's object goes on to name the descriptor of a socket that is closed
    peer = None if connection.is_closed() else connection._transport.get_extra_info("socket")
    return -1 if peer is None else int(peer.fileno())


async def _first_host(dsn: Dsn, attempt: Callable[..., Awaitable[C]], timeout: float) -> C:
    """Try the hosts in turn. A host that does not answer does not take the time of the others."""
    hosts = list(hosts_to_try(dsn))
    if dsn.parameters.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    if len(dsn.hosts) <= 1:
        return await attempt(timeout)
    rounds: list[dict[str, Any]] = [{}]
    if dsn.parameters.get("target_session_attrs") == "prefer-standby":
        rounds = [{"target_session_attrs": "standby"}, {"target_session_attrs": "any"}]
    attempts = [{"host": host, "port": port, **kind} for kind in rounds for host, port in hosts]
    ends = asyncio.get_running_loop().time() + timeout
    refusal: asyncpg.PostgresError | None = None
    while True:
        seconds = (ends - asyncio.get_running_loop().time()) / len(attempts)
        chosen = attempts.pop(0)
        host = (chosen["host"], chosen["port"])
        try:
            opened = await attempt(max(seconds, 0.001), **chosen)
        except _NEXT as exc:
            if isinstance(exc, TimeoutError):
                suspect_hosts(dsn, host)
            else:
                _skipped_until.pop(host, None)  # it costs nothing to ask it again
            if not attempts:
                if refusal is not None and isinstance(exc, TargetServerAttributeNotMatched):
                    raise refusal from exc
                raise
            clear_tracebacks(exc)
        except asyncpg.PostgresError as exc:
            if exc.sqlstate not in _NOT_REPLAYED or not _wants_primary(dsn):
                raise
            refusal = refusal or exc
            if not attempts:
                raise
            clear_tracebacks(exc)
        else:
            _skipped_until.pop(host, None)
            if _wants_primary(dsn):
                _primaries[dsn.hosts] = host
            return opened


def _unreadable(dsn: Dsn) -> str | None:
    """The parameter that names a file which cannot be read, if there is one."""
    for name in SSL_FILES:
        path = dsn.parameters.get(name)
        if path and path != "system" and not os.access(path, os.R_OK):
            return name
    return None


def set_keepalive(connection: asyncpg.Connection[Any], values: Mapping[str, int]) -> None:
    """Let the kernel close a connection to a machine that does not answer any more.

    Args:
        connection: An open one. One over a Unix socket is left as it is.
        values: libpq's ``keepalives`` (0 is off), ``keepalives_idle``, ``keepalives_interval`` (seconds),
            ``keepalives_count`` and ``tcp_user_timeout`` (milliseconds); 0 is the system's own.
    """
    transport = getattr(connection, "_transport", None)
    peer: socket.socket | None = transport.get_extra_info("socket") if transport is not None else None
    if peer is None or peer.family not in (socket.AF_INET, socket.AF_INET6):
        return
    on = values.get("keepalives", 1) != 0
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, on)
    for option, name in (
        ("TCP_KEEPIDLE", "keepalives_idle"),
        ("TCP_KEEPINTVL", "keepalives_interval"),
        ("TCP_KEEPCNT", "keepalives_count"),
        ("TCP_USER_TIMEOUT", "tcp_user_timeout"),
    ):
        value = values.get(name, 0)
        number = getattr(socket, option, None)  # not every system has them
        if value > 0 and number is not None and (on or name == "tcp_user_timeout"):
            peer.setsockopt(socket.IPPROTO_TCP, number, value)


def peer_of(connection: asyncpg.Connection[Any]) -> tuple[str, int]:
    """Return the host and the port that a connection leads to, as its DSN names them; a path for a local socket."""
    address: Any = connection._addr
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) else (str(address), 0)


def clear_tracebacks(error: E) -> E:
    """Drop the tracebacks of ``error`` and of its causes: asyncpg's frames hold the password in local variables."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def reason_of(error: BaseException) -> str:
    """Return why a connection could not be opened: PostgreSQL's message, or the system's. Neither has a secret."""
    if (refused := postgres_error(error)) is not None:
        return f"{refused.args[0] if refused.args else type(refused).__name__} ({refused.sqlstate})"
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig.__cause__ or error.orig
    if isinstance(error, TimeoutError) and not error.args:
        return "no answer in time"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = [
    "PEER_KEEPALIVES",
    "PEER_SECONDS",
    "add_check",
    "check",
    "clear_tracebacks",
    "connect",
    "hosts_to_try",
    "peer_of",
    "reason_of",
    "remove_check",
    "set_keepalive",
    "suspect_hosts",
]
