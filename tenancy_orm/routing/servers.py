"""The PostgreSQL servers that hold tenants' databases: their addresses, and logins to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context
from types import MappingProxyType
from typing import Any, Final, TypeVar

import asyncpg
from sqlalchemy.engine import URL

from ..config import TenancyConfig
from ..config.sections import ROLE_SETTINGS
from ..context import refuse_while_bound
from ..errors import ConfigurationError, LoginRefusedError, ServerUnavailableError, TenancyError, UnknownServerError
from ..loops import HomeLoop
from ..postgres import connections, login
from ..postgres.connections import Connection
from ..postgres.dsn import DEFAULT_PORT, Dsn
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import clear_tracebacks, reason_of, set_keepalive
from ..tenant import Placement
from .settings import BOUNDS, named_in, read_settings, without

logger = logging.getLogger("tenancy_orm.routing")

# invalid authorization, invalid password, no CONNECT, no such database: the server works, but not for this role
_REFUSED = frozenset({"28000", "28P01", "42501", "3D000"})
# connection exceptions, out of resources (too many connections, among others), operator intervention (shutting down)
_AWAY = ("08", "53", "57P")
CLOSE_SECONDS = 2.0
"""How long closing a connection may take; then its socket is cut."""

PEER_SECONDS = 30
"""Seconds after which a tenant's connection is closed if the other side acknowledges nothing."""

# The kernel closes such a connection within about PEER_SECONDS. A long statement is not affected while the server's
# machine acknowledges. Without this, the kernel repeats what was sent to a lost machine for some 15 minutes, and its
# connections would count as busy for that time.
_KEEPALIVES: Final = {
    "keepalives_idle": PEER_SECONDS // 2,
    "keepalives_interval": PEER_SECONDS // 6,
    "keepalives_count": 3,
    "tcp_user_timeout": PEER_SECONDS * 1_000,
}

SETTINGS_SECONDS = 300.0
"""Seconds after which a server's own settings are read again, in the background, when a connection is opened."""

C = TypeVar("C", bound="asyncpg.Connection[Any]")


class Server:
    """One PostgreSQL server.

    Args:
        name: Its name in the configuration.
        dsn: Its administrator's DSN. Its parameters (``sslmode``, ``sslrootcert``, ``target_session_attrs``, and server
            settings) apply to tenants' connections as well, and so do ``statement_cache_size`` and
            ``prepared_statement_cache_size`` (0 for PgBouncer in transaction mode).
        connect_timeout: Seconds that opening a connection may take, where the DSN does not say.
        statement_timeout: PostgreSQL's statement_timeout for tenants, in seconds; 0 leaves it to the server.
        session_settings: Further settings for tenants' connections; a value in the URL overrides one here.
        bounds: Values of ``settings.BOUNDS`` in tenants' roles.
    """

    def __init__(
        self,
        name: str,
        dsn: Dsn,
        *,
        connect_timeout: float,
        statement_timeout: float = 0.0,
        session_settings: Mapping[str, str] = MappingProxyType({}),
        bounds: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.dsn = dsn
        self.home = HomeLoop()
        self.connect_timeout = connect_timeout = dsn.connect_timeout or connect_timeout
        self._tenant_base = URL.create("postgresql+asyncpg", host=self.host, port=self.port)
        self._named = named_in(dsn)
        self._bounds = bounds
        self._refuses_settings = False  # set when a login was refused with 08P01, as PgBouncer does
        given = {setting.lower(): value for setting, value in session_settings.items()}
        self.further_settings = without(given, self._named)
        self._tenant_settings = {"application_name": dsn.application_name("tenancy"), **self.further_settings}
        self.session_settings: Mapping[str, str] = {}
        self._pins: Mapping[str, str] | None = None
        self._pinned_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        # the server ends a statement that runs too long; the client stops waiting for a server that does not answer
        self._command_timeout: float | None = None
        if statement_timeout > 0:
            self._tenant_settings["statement_timeout"] = f"{round(statement_timeout * 1000)}ms"
            self._command_timeout = statement_timeout + connect_timeout

    def __repr__(self) -> str:
        """Return the server's name and address."""
        return f"Server({self.name!r}, {self.dsn})"

    @property
    def host(self) -> str:
        """The first host name or address, or the directory of its socket."""
        return self.dsn.hosts[0][0] if self.dsn.hosts else "localhost"

    @property
    def port(self) -> int:
        """The first host's TCP port, or the number in the name of its socket."""
        return self.dsn.hosts[0][1] if self.dsn.hosts else DEFAULT_PORT

    @property
    def prepared_statement_cache_size(self) -> int:
        """How many prepared statements SQLAlchemy keeps for each connection."""
        size = self.dsn.client_size("prepared_statement_cache_size")
        return 100 if size is None else size

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler in front refuses startup parameters: by its URL, or since it has refused them (08P01)."""
        return self._refuses_settings or self.dsn.client_size("statement_cache_size") == 0

    def tenant_url(self, placement: Placement) -> URL:
        """The URL of a tenant's database in SQLAlchemy's form, without the password; it is not used to connect."""
        return self._tenant_base._replace(username=placement.role, database=placement.database)

    async def connect_admin(
        self,
        database: str | None = None,
        *,
        role: str | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        timeout: float | None = None,
        purpose: str = "tenancy-admin",
    ) -> Connection:
        """Log in as the administrator. These connections are not part of the budget; the caller closes them.

        Args:
            database: The database; the one in the URL where None.
            role: The role to act as from the first statement on.
            settings: Further server settings, in force from the start.
            timeout: Seconds this may take; ``connect_timeout`` where None.
            purpose: What it is for, as its application_name says.

        Raises:
            ServerUnavailableError: the server does not answer, or accepts no connections now.
            asyncpg.PostgresError: the server refuses this one: no such database, for example.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("logging in as the administrator")
        startup = dict(settings)
        if role is not None:
            startup["role"] = role
        options = {"database": database} if database else {}
        try:
            return await self._connect(purpose, startup, timeout=timeout, **options)
        except SERVER_FAILURES as exc:
            clear_tracebacks(exc)
            if isinstance(exc, asyncpg.PostgresError) and not (exc.sqlstate or "").startswith(_AWAY):
                raise
            raise self.unavailable(exc, database=database) from exc

    async def connect_tenant(
        self,
        placement: Placement,
        password: str | Callable[[], str],
        *,
        tenant: str | None = None,
        connection_class: type[C] = asyncpg.Connection,
        timeout: float | None = None,
    ) -> C:
        """Log in to a tenant's database as its role. The caller checks the marker and closes the connection.

        Args:
            placement: Database and role.
            password: The role's password, or a function that returns it, called as late as possible.
            tenant: The tenant's slug, for errors; the role where None.
            connection_class: The class of the connection.
            timeout: Seconds this may take; ``connect_timeout`` where None.

        Raises:
            LoginRefusedError: PostgreSQL refuses the password or the role, or the role lacks a right.
            ServerUnavailableError: the server does not answer, or accepts no connections now.
            SecretError: (from ``password``) the sealed password does not open.
            CrossTenantError: a tenant is bound; get its sessions from the router.
        """
        refuse_while_bound("logging in as a tenant's role")
        label = tenant or placement.role

        async def connect(settings: Mapping[str, str]) -> C:
            opened: C = await self._connect(
                "tenancy",
                settings,
                timeout=timeout,
                user=placement.role,
                database=placement.database,
                password=password,
                connection_class=connection_class,
                command_timeout=self._command_timeout,
            )
            return opened

        startup = await self._startup_settings()
        try:
            try:
                connection = await connect(startup)
            except asyncpg.ProtocolViolationError:
                if self.is_pooled:
                    raise
                connection = await connect(self._without_pins())
        except SERVER_FAILURES as exc:
            raise self.unavailable(exc, tenant=label, database=placement.database) from clear_tracebacks(exc)
        set_keepalive(connection, {**_KEEPALIVES, **self.dsn.keepalives})
        return connection

    def _without_pins(self) -> Mapping[str, str]:
        """Pin no settings from now on, and return those that are still sent."""
        self._refuses_settings = True
        logger.warning(
            "server %s refuses startup parameters (08P01), as PgBouncer does: settings that a tenant's role has given "
            "itself are in force for that tenant until reconcile; let PgBouncer ignore these parameters, or name them "
            "in its track_extra_parameters",
            self.name,
        )
        return self._tenant_settings

    # --- settings ---------------------------------------------------------------------------------------------------

    async def read_settings(self, connection: Connection) -> None:
        """Read the settings that tenants' connections start with, over an administrative connection.

        They are in ``session_settings`` afterwards.

        Raises:
            asyncpg.PostgresError: the server refuses.
        """
        found = await read_settings(connection, self._bounds)
        self._pins = {**without(found, self._named), **self._tenant_settings}
        self.session_settings = {**found, **self.further_settings}
        self._pinned_at = time.monotonic()

    async def _startup_settings(self) -> Mapping[str, str]:
        if self.is_pooled:
            return self._tenant_settings
        if self._pins is None:
            await self._read_settings()
        elif time.monotonic() - self._pinned_at > SETTINGS_SECONDS and self._reading is None:
            # the server's configuration may have changed; this connection may still use settings some minutes old
            self._reading = asyncio.get_running_loop().create_task(self._renew_settings(), context=Context())
        assert self._pins is not None  # noqa: S101 - for the type checker
        return self._pins

    async def _read_settings(self) -> None:
        try:
            connection = await self.connect_admin()
            try:
                async with asyncio.timeout(self.connect_timeout):
                    await self.read_settings(connection)
            finally:
                await connections.close(connection, timeout=CLOSE_SECONDS)
        except SERVER_FAILURES as exc:
            # the administrator's login failed: the tenant was not refused
            raise self.unavailable(exc) from clear_tracebacks(exc)

    async def _renew_settings(self) -> None:
        try:
            await self._read_settings()
        except TenancyError as exc:
            self._pinned_at = time.monotonic()  # the next try is as late as after a success
            logger.warning("the settings of server %s cannot be read again: %s", self.name, exc)
        finally:
            self._reading = None

    async def close(self) -> None:
        """Cancel the background read of the settings, if there is one."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    # --- errors -----------------------------------------------------------------------------------------------------

    def unavailable(
        self, error: BaseException, *, tenant: str | None = None, database: str | None = None
    ) -> ServerUnavailableError:
        """Return the error to raise when opening a connection failed with ``error``.

        Args:
            error: What PostgreSQL, asyncpg or the system raised.
            tenant: The slug of the tenant that the connection is for; None for an administrative one.
            database: The database; the one in the DSN where None.
        """
        sqlstate = getattr(error, "sqlstate", None)
        kind = LoginRefusedError if tenant is not None and sqlstate in _REFUSED else ServerUnavailableError
        return kind(
            server=self.name,
            tenant=tenant,
            sqlstate=sqlstate,
            address=self.dsn.address(database),
            reason=reason_of(error),
        )

    async def _connect(
        self, purpose: str, settings: Mapping[str, str], *, timeout: float | None, **options: Any
    ) -> Any:
        self.home.check()
        seconds = self.connect_timeout if timeout is None else timeout
        try:
            return await login.connect(self.dsn, purpose=purpose, timeout=seconds, settings=settings, **options)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the URL of server {self.name!r} cannot be used: {exc}") from exc


class Servers(Mapping[str, Server]):
    """The configured servers by name.

    Args:
        config: ``server_dsns`` and the timeouts are read from it.
    """

    def __init__(self, config: TenancyConfig) -> None:
        given = {name.lower(): value for name, value in {**ROLE_SETTINGS, **config.provisioning.role_settings}.items()}
        bounds = {name: value for name in BOUNDS if (value := given.get(name))}
        self._servers = {
            name: Server(
                name,
                dsn,
                connect_timeout=config.pool.connect_timeout,
                statement_timeout=config.sessions.statement_timeout,
                session_settings=config.sessions.settings,
                bounds=bounds,
            )
            for name, dsn in config.server_dsns.items()
        }

    def __getitem__(self, name: str) -> Server:
        """The server of that name.

        Raises:
            UnknownServerError: there is none.
        """
        try:
            return self._servers[name]
        except KeyError:
            raise UnknownServerError(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._servers

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    def __repr__(self) -> str:
        """Return the servers' names."""
        return f"Servers({', '.join(self._servers)})"

    async def close(self) -> None:
        """Cancel the servers' background work. Their connections are closed by the code that opened them."""
        for server in self._servers.values():
            await server.close()


__all__ = ["Server", "Servers"]
