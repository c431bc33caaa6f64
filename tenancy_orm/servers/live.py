"""``Servers``: the servers by name, as their rows and this process's settings say now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, overload
from weakref import WeakSet

from ..config import ServerAddresses, TenancyConfig
from ..config.sections import ROLE_SETTINGS
from ..errors import SecretError, UnknownServerError
from .rows import ServerRow
from .server import Server
from .settings import BOUNDS

logger = logging.getLogger("tenancy_orm.servers")

T = TypeVar("T")


class Servers(Mapping[str, Server]):
    """The servers by name. It changes when their rows do, while it is being iterated over too: take a copy.

    A server has its addresses from its row where a command has put them there, and from this process's settings
    otherwise. Where its addresses change, another ``Server`` takes its place; whatever else changes is in its ``row``.
    Do not keep a ``Server`` for longer than a piece of work: ask for it by its name again, or subscribe to
    ``on_change``.

    Args:
        config: ``server_addresses`` and the timeouts are read from it.
    """

    def __init__(self, config: TenancyConfig) -> None:
        given = {name.lower(): value for name, value in {**ROLE_SETTINGS, **config.provisioning.role_settings}.items()}
        self._bounds = {name: value for name in BOUNDS if (value := given.get(name))}
        self._config = config
        self._addresses = dict(config.server_addresses)
        self._servers = {name: self._make(name, addresses) for name, addresses in self._addresses.items()}
        self._unusable: dict[str, Exception] = {}
        self._replaced: WeakSet[Server] = WeakSet()
        self._callbacks: list[Callable[[str], None]] = []

    def __getitem__(self, name: str) -> Server:
        """The server of that name.

        Raises:
            UnknownServerError: there is none, or this process does not know its address.
            SecretError: the address in its row does not open.
        """
        try:
            return self._servers[name]
        except KeyError:
            raise self._unusable.get(name) or UnknownServerError(name) from None

    @overload
    def get(self, name: str, /) -> Server | None: ...
    @overload
    def get(self, name: str, default: T, /) -> Server | T: ...
    def get(self, name: str, default: T | None = None, /) -> Server | T | None:
        """The server of that name, or ``default`` where it cannot be used."""
        return self._servers.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._servers

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    def __repr__(self) -> str:
        """Return the servers' names."""
        return f"Servers({', '.join(self._servers)})"

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with a server's name, in the event loop, after it was added, changed or removed."""
        self._callbacks.append(callback)

    def apply(self, rows: Sequence[ServerRow], open_addresses: Callable[[ServerRow], ServerAddresses]) -> None:
        """Take over what the rows say, and call the callbacks for every server that differs.

        Args:
            rows: The rows of all servers.
            open_addresses: Returns the addresses in a row; it may raise ``SecretError``.
        """
        changed = []
        configured = self._config.server_addresses
        unusable: dict[str, Exception] = {}
        for row in rows:
            try:
                addresses = configured.get(row.name) if row.sealed_addresses is None else open_addresses(row)
            except SecretError as exc:
                logger.error("the addresses of server %s cannot be opened: %s", row.name, exc)
                unusable[row.name] = exc
                addresses = None
            if addresses is None:
                continue
            known = self._servers.get(row.name)
            if known is None or self._addresses[row.name] != addresses:
                self._replace(row.name, self._make(row.name, addresses))
                self._addresses[row.name] = addresses
            elif known.row == row:
                continue
            self._servers[row.name].row = row
            changed.append(row.name)
        kept = {row.name for row in rows if row.name not in unusable}
        for name in [name for name in self._servers if name not in kept]:
            self._replace(name, None)
            changed.append(name)
        self._unusable = unusable
        for name in changed:
            self._call_back(name)

    async def close(self) -> None:
        """Cancel the servers' background work. Their connections are closed by the code that opened them."""
        await asyncio.gather(*(server.close() for server in [*self._servers.values(), *self._replaced]))

    def _make(self, name: str, addresses: ServerAddresses) -> Server:
        config = self._config
        return Server(
            name,
            addresses.admin_dsn,
            tenants=addresses.tenants_dsn,
            connect_timeout=config.pool.connect_timeout,
            statement_timeout=config.sessions.statement_timeout,
            answer_timeout=config.sessions.answer_timeout,
            session_settings=config.sessions.settings,
            bounds=self._bounds,
            replicas=addresses.replica_dsns,
            breaker=config.breaker,
        )

    def _replace(self, name: str, server: Server | None) -> None:
        former = self._servers.pop(name, None)
        if former is not None:
            self._replaced.add(former)
        if server is not None:
            self._servers[name] = server

    def _call_back(self, name: str) -> None:
        for callback in self._callbacks:
            try:
                callback(name)
            except Exception:
                logger.exception("a callback for the change of server %s failed", name)


__all__ = ["Servers"]
