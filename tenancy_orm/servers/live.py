"""``Servers``: the servers by name, as their rows and this process's settings say now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context
from typing import TypeVar, overload

from ..config import ServerAddresses, TenancyConfig
from ..config.sections import ROLE_SETTINGS
from ..errors import SecretError, UnknownServerError
from ..postgres.errors import describe
from ..postgres.failures import FAILURES
from .rows import ServerRow
from .sealed import SealedAddresses
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
        self._unusable: dict[str, Exception] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[str], None]] = []
        self._owner: str | None = None
        self._source: SealedAddresses | None = None
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._again = False
        self._servers = {name: self.make(name, addresses) for name, addresses in self._addresses.items()}

    def __getitem__(self, name: str) -> Server:
        """The server of that name.

        Raises:
            UnknownServerError: there is none, or this process does not know its address.
            SecretError: the address in its row does not open.
        """
        try:
            return self._servers[name]
        except KeyError:
            if name in self._unusable:
                raise self._unusable[name] from None
            if self._source is not None and asyncio._get_running_loop() is not None:
                # its row may be newer than what was read
                self.refresh_soon()
            raise UnknownServerError(name) from None

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

    def follow(self, source: SealedAddresses, owner: str) -> None:
        """Read the rows from ``source`` from now on, whenever ``refresh`` is called.

        Args:
            source: Reads the rows, and opens the addresses in them.
            owner: The installation's owner role.
        """
        self._source, self._owner = source, owner
        for server in self._servers.values():
            server.owner = owner

    async def refresh(self, *, bootstrapping: bool = False) -> None:
        """Read the rows again, and call the callbacks for every server that differs.

        Args:
            bootstrapping: Keep servers of the settings that have no row yet.

        Raises:
            ControlUnavailableError: the control database does not answer; everything stays as it is.
            SecretProviderError: a new data key cannot be unwrapped.
        """
        assert self._source is not None  # noqa: S101 - for the type checker: an opening calls follow first
        async with self._lock:  # a read that began earlier must not be applied later
            self.apply(await self._source.read(), self._source.open, bootstrapping=bootstrapping)

    def refresh_soon(self) -> None:
        """Have the rows read again in the background: they have changed, or a change may have been missed."""
        if self._refreshing is None:
            # unbound: whoever happens to run now
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh_until_done(), context=Context())
        else:
            self._again = True

    async def _refresh_until_done(self) -> None:
        try:
            while True:
                self._again = False
                try:
                    await self.refresh()
                except FAILURES as exc:
                    logger.warning(
                        "the rows of the servers cannot be read (%s); they are read again later", describe(exc)
                    )
                if not self._again:
                    return
        finally:
            self._refreshing = None

    def apply(
        self,
        rows: Sequence[ServerRow],
        open_addresses: Callable[[ServerRow], ServerAddresses],
        *,
        bootstrapping: bool = False,
    ) -> None:
        """Take over what the rows say, and call the callbacks for every server that differs.

        Args:
            rows: The rows of all servers.
            open_addresses: Returns the addresses in a row; it may raise ``SecretError``.
            bootstrapping: Keep servers of the settings that have no row yet.
        """
        changed = []
        configured = self._config.server_addresses
        unusable: dict[str, Exception] = {}
        for row in rows:
            try:
                addresses = configured.get(row.name) if row.sealed_addresses is None else open_addresses(row)
            except SecretError as exc:
                logger.error("the addresses of server %s cannot be opened: %s", row.name, exc)
                # a process that knows the server goes on with what it knows
                addresses = self._addresses.get(row.name) if row.name in self._servers else None
                if addresses is None:
                    unusable[row.name] = exc
            if addresses is None:
                continue
            known = self._servers.get(row.name)
            if known is None or self._addresses[row.name] != addresses:
                self._replace(row.name, self.make(row.name, addresses))
                self._addresses[row.name] = addresses
            elif known.row == row:
                continue
            self._servers[row.name].row = row
            changed.append(row.name)
        kept = {row.name for row in rows if row.name not in unusable}
        if bootstrapping and not (rows and self._config.servers is None):
            # the server of control_url is one where nothing else is said
            kept.update(configured)
        for name in [name for name in self._servers if name not in kept]:
            self._replace(name, None)
            changed.append(name)
        self._unusable = unusable
        for name in changed:
            self._call_back(name)

    async def close(self) -> None:
        """Cancel the servers' background work. Their connections are closed by the code that opened them."""
        self._source = None
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await asyncio.gather(*self._closing, *(server.close() for server in self._servers.values()))

    def make(self, name: str, addresses: ServerAddresses) -> Server:
        """Return a server with this process's settings; it is not among these."""
        config = self._config
        server = Server(
            name,
            addresses.admin_dsn,
            tenants=addresses.tenants_dsn,
            connect_timeout=config.pool.connect_timeout,
            statement_timeout=config.sessions.statement_timeout,
            answer_timeout=config.sessions.answer_timeout,
            session_settings=config.sessions.settings,
            bounds=self._bounds,
            replicas=addresses.replica_dsns,
            peer=addresses.peer_dsn,
            breaker=config.breaker,
        )
        server.owner = self._owner
        return server

    def _replace(self, name: str, server: Server | None) -> None:
        former = self._servers.pop(name, None)
        if former is not None:
            # what it does in the background; sessions that are open there go on
            task = asyncio.get_running_loop().create_task(former.close(), context=Context())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        if server is not None:
            self._servers[name] = server

    def _call_back(self, name: str) -> None:
        for callback in self._callbacks:
            try:
                callback(name)
            except Exception:
                logger.exception("a callback for the change of server %s failed", name)


__all__ = ["Servers"]
