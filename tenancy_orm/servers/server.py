"""The PostgreSQL servers that hold tenants' databases: their addresses, and logins to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar, cast

import asyncpg
from sqlalchemy.engine import URL

from ..config.sections import BreakerConfig
from ..context import refuse_while_bound
from ..errors import (
    ConfigurationError,
    LoginRefusedError,
    PoolerError,
    ServerIdentityError,
    ServerUnavailableError,
    TenancyError,
)
from ..loops import HomeLoop
from ..postgres import connections, login
from ..postgres.connections import Connection
from ..postgres.dsn import DEFAULT_PORT, Dsn
from ..postgres.errors import (
    INSUFFICIENT_PRIVILEGE,
    INVALID_AUTHORIZATION,
    INVALID_CATALOG_NAME,
    INVALID_PASSWORD,
)
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import PEER_SECONDS, clear_tracebacks, reason_of
from ..postgres.ping import ping
from ..postgres.poolers import connect_directly
from ..tenant import Placement
from .breaker import Breaker
from .identity import differ, read_identity
from .positions import standby_proof
from .rows import ServerRow
from .settings import read_settings
from .traffic import TenantAddress

logger = logging.getLogger("tenancy_orm.servers")

# the server works, but not for this role
_REFUSED = frozenset({INVALID_AUTHORIZATION, INVALID_PASSWORD, INSUFFICIENT_PRIVILEGE, INVALID_CATALOG_NAME})
# connection exceptions, out of resources (too many connections, among others), operator intervention (shutting down)
_AWAY = ("08", "53", "57P")
CLOSE_SECONDS = 2.0
"""How long closing a connection may take; then its socket is cut."""

IDENTITY_SECONDS = 60.0
"""Seconds after which a login as the administrator makes sure again which cluster answers."""

SETTINGS_SECONDS = 300.0
"""Seconds after which a server's own settings are read again, in the background, when a connection is opened."""

_POOLER = (
    "server {server!r} must be administered directly, and a connection pooler answers at {address}: {reason}; give the "
    "server's own address as admin and the pooler's as tenants, in ServerAddresses or in [servers.{server}]"
)

_ISOLATION = "default_transaction_isolation"
_NAME = "application_name"

C = TypeVar("C", bound="asyncpg.Connection[Any]")


_FACTS = (
    "SELECT pg_catalog.current_database()::text, (pg_catalog.sum(CASE s.name WHEN 'max_connections' "
    "THEN s.setting::int ELSE -s.setting::int END))::int FROM pg_catalog.pg_settings AS s "
    "WHERE s.name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')"
)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        database: The database that the administrative URL leads to.
        connections: How many connections it accepts, without those that are reserved.
        identity: Which cluster it is, as ``identity.read_identity`` says.
    """

    database: str
    connections: int
    identity: str | None = None


class Server:
    """One PostgreSQL server.

    Args:
        name: Its name in the configuration.
        dsn: Its administrator's DSN. Its parameters (``sslmode``, ``sslrootcert``, ``target_session_attrs``, and server
            settings) apply to tenants' connections as well where there is no other address for them.
        tenants: Where tenants' sessions connect to, if that is another address: a pooler, for example.
        connect_timeout: Seconds that opening a connection may take, where the DSN does not say.
        statement_timeout: PostgreSQL's statement_timeout for tenants, in seconds; 0 leaves it to the server.
        answer_timeout: Seconds to wait for the answer to a tenant's statement where that is 0; 0 is for ever.
        session_settings: Further settings for tenants' connections; a value in the URL overrides one here.
        bounds: Values of ``settings.BOUNDS`` in tenants' roles.
        replicas: The standbys that follow it, without a user, a password or a database.
        peer: Where other servers reach it, if that is another address.
        breaker: When its breaker opens.
        is_replica: Whether it is a standby.
    """

    def __init__(
        self,
        name: str,
        dsn: Dsn,
        *,
        tenants: Dsn | None = None,
        connect_timeout: float,
        statement_timeout: float = 0.0,
        answer_timeout: float = 0.0,
        session_settings: Mapping[str, str] = MappingProxyType({}),
        bounds: Mapping[str, str] = MappingProxyType({}),
        replicas: Sequence[Dsn] = (),
        peer: Dsn | None = None,
        breaker: BreakerConfig = BreakerConfig(),  # noqa: B008 - it is frozen
        is_replica: bool = False,
    ) -> None:
        self.name = name
        self.dsn = dsn
        self.peer = dsn if peer is None else peer
        """Where other servers reach it, which follow it while a tenant is moved."""
        self.is_replica = is_replica
        self.instance: str | None = None
        """Of a replica: which running server its address leads to, as far as it was seen to be a standby."""
        self.replicas = tuple(
            Server(
                f"{name}/{number}",
                _with_login_of(dsn, replica),
                connect_timeout=connect_timeout,
                statement_timeout=statement_timeout,
                answer_timeout=answer_timeout,
                session_settings=session_settings,
                bounds=bounds,
                breaker=breaker,
                is_replica=True,
            )
            for number, replica in enumerate(replicas, 1)
        )
        """The standbys that follow it, named after it: ``eu/1``."""
        self.row: ServerRow | None = None
        """Its row in the control database; another one where that was changed. None before the rows are read."""
        self.owner: str | None = None
        """The installation's owner role there; None before it is known."""
        self._identified_at = 0.0  # when it was last seen which cluster answers
        self.home = HomeLoop()
        self._admin_timeout = dsn.connect_timeout or connect_timeout
        self.connect_timeout = (tenants or dsn).connect_timeout or connect_timeout
        given = {setting.lower(): value for setting, value in session_settings.items()}
        if is_replica and _ISOLATION in given:
            given[_ISOLATION] = _on_standby(given[_ISOLATION])
        # the server ends a statement that runs too long; the client stops waiting for a server that does not answer
        self._command_timeout: float | None = answer_timeout or None
        limits = {}
        if statement_timeout > 0:
            limits["statement_timeout"] = f"{round(statement_timeout * 1000)}ms"
            self._command_timeout = statement_timeout + self.connect_timeout
        self._direct = TenantAddress(name, dsn, given, limits, direct=True)
        self.traffic = self._direct if tenants is None else TenantAddress(name, tenants, given, limits, direct=False)
        """Where tenants' sessions connect to."""
        self.breaker = Breaker(name, breaker, self._ping, address=str(self.traffic.dsn), is_replica=is_replica)
        """Whether it answers."""
        host, port = _first_host(self.traffic.dsn)
        self._tenant_base = URL.create("postgresql+asyncpg", host=host, port=port)
        self._bounds = bounds
        self.session_settings: Mapping[str, str] = {}
        self._is_proved = False  # whether the administrator's address has been seen to lead to PostgreSQL itself
        self._facts: ServerFacts | None = None
        self._found: Mapping[str, str] | None = None
        self._found_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        """Return the server's name and address."""
        return f"Server({self.name!r}, {self.dsn})"

    @property
    def host(self) -> str:
        """The first host name or address for administration, or the directory of its socket."""
        return _first_host(self.dsn)[0]

    @property
    def port(self) -> int:
        """That host's TCP port, or the number in the name of its socket."""
        return _first_host(self.dsn)[1]

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler answers tenants' sessions, as far as is known: its address or a login has shown it."""
        return self.traffic.is_pooled

    @property
    def prepared_statement_cache_size(self) -> int:
        """How many prepared statements SQLAlchemy keeps for each connection of a tenant."""
        return self.traffic.prepared_statement_cache_size

    @property
    def has_stable_snapshots(self) -> bool:
        """Whether transactions keep the snapshot of their first statement unless told otherwise."""
        return self.session_settings.get("default_transaction_isolation") in ("repeatable read", "serializable")

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
        always: bool = False,
    ) -> Connection:
        """Log in as the administrator. These connections are not part of the budget; the caller closes them.

        Args:
            database: The database; the one in the URL where None.
            role: The role to act as from the first statement on.
            settings: Further server settings, in force from the start.
            timeout: Seconds this may take, and again the question which cluster it is; ``connect_timeout`` where None.
            purpose: What it is for, as its application_name says.
            always: Whether to try even while the server's breaker is open.

        Raises:
            ServerUnavailableError: the server does not answer, or accepts no connections now.
            ServerIdentityError: another cluster answers than the one in its row.
            asyncpg.PostgresError: the server refuses this one: no such database, for example.
            PoolerError: the address leads to a connection pooler.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("logging in as the administrator")
        if not always:
            self.breaker.check()
        startup = dict(settings)
        if role is not None:
            startup["role"] = role
        options: dict[str, Any] = {"database": database} if database else {}
        seconds = self._admin_timeout if timeout is None else timeout
        try:
            if self._is_proved:
                connection = await self._connect(login.connect, purpose, startup, timeout=seconds, **options)
            else:
                refusal = _POOLER.format(server=self.name, address="{address}", reason="{reason}")
                connection = await self._connect(
                    connect_directly, purpose, startup, timeout=seconds, refusal=refusal, **options
                )
                self._is_proved = True
            await self._check_identity(connection, timeout=seconds)
            return cast("Connection", connection)
        except SERVER_FAILURES as exc:
            clear_tracebacks(exc)
            if self.traffic is self._direct:
                self.breaker.failed(exc)
            if isinstance(exc, asyncpg.PostgresError) and not (exc.sqlstate or "").startswith(_AWAY):
                raise
            raise self.unavailable(exc, database=database) from exc

    async def inspect(self, *, timeout: float) -> ServerFacts:
        """Return what an opening needs to know of the server; log in as the administrator, unless it is known already.

        Args:
            timeout: Seconds that the login may take, if ``connect_timeout`` is longer, and the answer.

        Raises:
            ServerUnavailableError, PoolerError, CrossTenantError: as ``connect_admin``.
            asyncpg.PostgresError: the server refuses.
        """
        if self._facts is not None:
            return self._facts
        connection = await self.connect_admin(timeout=min(timeout, self._admin_timeout))
        try:
            async with asyncio.timeout(timeout):
                return await self.learn(connection)
        except OSError as exc:
            raise self.unavailable(exc) from clear_tracebacks(exc)
        finally:
            await connections.close(connection, timeout=CLOSE_SECONDS)

    async def learn(self, connection: Connection) -> ServerFacts:
        """Read what an opening, and a tenant's first login, need to know, over an administrative connection.

        Raises:
            asyncpg.PostgresError: the server refuses.
        """
        identity = await read_identity(connection, self.owner)
        database, accepted = await connection.fetchrow(_FACTS)
        facts = ServerFacts(database, accepted, identity)
        if self.traffic is self._direct:
            await self.read_settings(connection)
        if facts.database == self.dsn.database:  # where that does not exist yet, the caller is connected to another
            self._facts = facts
        return facts

    async def _check_identity(self, connection: Connection, *, timeout: float) -> None:
        """Refuse another cluster than the one in the row; at times, since an address may lead elsewhere one day."""
        known = None if self.row is None else self.row.identity
        if known is None or time.monotonic() - self._identified_at < IDENTITY_SECONDS:
            return
        try:
            async with asyncio.timeout(timeout):
                found = await read_identity(connection, self.owner)
            if differ(known, found):
                raise ServerIdentityError(
                    server=self.name,
                    address=self.dsn.address(),
                    reason=f"another cluster answers, {found or 'one without a marker'}, than the one that holds its "
                    f"tenants, {known}; correct the address; if the server has moved to a new cluster on purpose, run: "
                    f"tenancy servers update {self.name} --accept-identity",
                )
        except BaseException:
            connection.terminate()
            raise
        self._identified_at = time.monotonic()

    def tenant_startup(self) -> Mapping[str, str]:
        """Return the settings that a tenant's login sends, once an asynchronous one has found out what is taken.

        In any thread. Have ``read_again_if_old`` called as well.
        """
        assert self._found is not None  # noqa: S101 - for the type checker: read by that login
        return self.traffic.startup(self._found)

    @property
    def answer_seconds(self) -> float | None:
        """How long to wait for the answer to a tenant's statement; None is for ever."""
        return self._command_timeout

    async def connect_tenant(
        self,
        placement: Placement,
        password: str | Callable[[], str],
        *,
        tenant: str | None = None,
        connection_class: type[C] = asyncpg.Connection,
        timeout: float | None = None,
        direct: bool = False,
        rename: Callable[[str], str] | None = None,
    ) -> C:
        """Log in to a tenant's database as its role. The caller checks the marker and closes the connection.

        Args:
            placement: Database and role.
            password: The role's password, or a function that returns it, called as late as possible.
            tenant: The tenant's slug, for errors; the role where None.
            connection_class: The class of the connection.
            timeout: Seconds this may take; ``connect_timeout`` where None.
            direct: Whether to log in at the administrator's address, and not where sessions do.
            rename: Returns the ``application_name`` for the one that it is given; not for sessions of a pooler, which
                would set it with every change of clients.

        Raises:
            LoginRefusedError: PostgreSQL refuses the password or the role, or the role lacks a right.
            ServerUnavailableError: the server does not answer, or accepts no connections now.
            SecretError: (from ``password``) the sealed password does not open.
            CrossTenantError: a tenant is bound; get its sessions from the router.
        """
        refuse_while_bound("logging in as a tenant's role")
        label = tenant or placement.role

        address = self._direct if direct else self.traffic

        async def log_in(settings: Mapping[str, str], **options: Any) -> C:
            if rename is not None and not address.is_pooled:
                settings = {**settings, _NAME: rename(settings[_NAME])}
            opened: C = await self._connect(
                login.connect,
                "tenancy",
                settings,
                dsn=address.dsn,
                timeout=self.connect_timeout if timeout is None else timeout,
                user=placement.role,
                database=placement.database,
                password=password,
                connection_class=connection_class,
                command_timeout=self._command_timeout,
                **options,
            )
            return opened

        found = await self._found_settings()
        try:
            return await address.connect(found, log_in)
        except SERVER_FAILURES as exc:
            raise self.unavailable(
                exc, tenant=label, database=placement.database, dsn=address.dsn
            ) from clear_tracebacks(exc)

    def standby_proof(self, tenant: str) -> str | None:
        """Return the statement with which a connection to a replica proves that it leads there; None of a primary.

        Its command tag is ``positions.PROVED``.

        Args:
            tenant: The slug of the tenant that the connection is for, for the error.

        Raises:
            ServerUnavailableError: the replica was not seen to be a standby of its primary.
        """
        if not self.is_replica:
            return None
        if self.instance is None:
            raise self.no_standby(tenant)
        return standby_proof(self.instance)

    def no_standby(self, tenant: str) -> ServerUnavailableError:
        """Return the error for a connection that does not lead to the standby that was asked for its position."""
        return ServerUnavailableError(
            server=self.name,
            tenant=tenant,
            sqlstate=None,
            address=self.dsn.address(),
            reason="no standby of the primary answers there, or another one than before",
        )

    # --- settings ---------------------------------------------------------------------------------------------------

    async def read_settings(self, connection: Connection) -> None:
        """Read the settings that tenants' connections start with, over an administrative connection.

        They are in ``session_settings`` afterwards.

        Raises:
            asyncpg.PostgresError: the server refuses.
        """
        separate = self.traffic is not self._direct
        found = await read_settings(connection, self._bounds, named=self.traffic.named if separate else None)
        if self.is_replica:
            found[_ISOLATION] = _on_standby(found[_ISOLATION])
        self._found = found
        self.session_settings = {**found, **self.traffic.further_settings}
        self._found_at = time.monotonic()

    async def connect_as_tenants_do(self) -> Connection:
        """Log in as the administrator, with the settings in the URL of tenants' sessions.

        Raises:
            ServerUnavailableError, asyncpg.PostgresError, PoolerError: as ``connect_admin``.
        """
        separate = self.traffic is not self._direct
        return await self.connect_admin(settings=self.traffic.dsn.server_settings() if separate else {})

    async def _found_settings(self) -> Mapping[str, str]:
        if self._found is None:
            await self._read_settings()
        self.read_again_if_old()
        assert self._found is not None  # noqa: S101 - for the type checker
        return self._found

    def read_again_if_old(self) -> None:
        """Have the settings that tenants' connections start with read again, in the background, once they are old."""
        if time.monotonic() - self._found_at > SETTINGS_SECONDS and self._reading is None:
            # the server's configuration may have changed; this connection may still use settings some minutes old
            self._reading = asyncio.get_running_loop().create_task(self._renew_settings(), context=Context())

    async def _read_settings(self) -> None:
        try:
            connection = await self.connect_as_tenants_do()
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
            self._found_at = time.monotonic()  # the next try is as late as after a success
            logger.warning("the settings of server %s cannot be read again: %s", self.name, exc)
        finally:
            self._reading = None

    async def close(self) -> None:
        """Cancel the background read of the settings, if there is one, and the breaker's probes; its replicas' too."""
        await self.breaker.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        for replica in self.replicas:
            await replica.close()

    # --- errors -----------------------------------------------------------------------------------------------------

    async def _ping(self) -> None:
        """Ask whether the server answers where tenants connect to; where that is a pooler, also beside it.

        Raises:
            OSError: it does not.
        """
        addresses = {self.traffic.dsn.hosts: self.traffic.dsn}
        if self.traffic.is_pooled:
            addresses[self.dsn.hosts] = self.dsn
        for dsn in addresses.values():
            await ping(dsn, timeout=self.breaker.config.timeout)

    def unavailable(
        self,
        error: BaseException,
        *,
        tenant: str | None = None,
        database: str | None = None,
        dsn: Dsn | None = None,
    ) -> ServerUnavailableError:
        """Return the error to raise when opening a connection failed with ``error``.

        Args:
            error: What PostgreSQL, asyncpg or the system raised.
            tenant: The slug of the tenant that the connection is for; None for an administrative one.
            database: The database; the one in the DSN where None.
            dsn: The address; a tenant's connection is for ``traffic`` and another for the administrator's where None.
        """
        if dsn is None:
            dsn = self.dsn if tenant is None else self.traffic.dsn
        sqlstate = getattr(error, "sqlstate", None)
        kind = LoginRefusedError if tenant is not None and sqlstate in _REFUSED else ServerUnavailableError
        return kind(
            server=self.name,
            tenant=tenant,
            sqlstate=sqlstate,
            address=dsn.address(database),
            reason=reason_of(error),
        )

    async def _connect(
        self,
        connect: Callable[..., Awaitable[Any]],
        purpose: str,
        settings: Mapping[str, str],
        *,
        dsn: Dsn | None = None,
        **options: Any,
    ) -> Any:
        self.home.check()
        try:
            return await connect(dsn or self.dsn, purpose=purpose, settings=settings, **options)
        except PoolerError:
            raise
        except ConfigurationError as exc:
            raise ConfigurationError(f"the URL of server {self.name!r} cannot be used: {exc}") from exc


def _with_login_of(admin: Dsn, replica: Dsn) -> Dsn:
    """The address of a replica for the administrator of its primary: roles and passwords are the same there."""
    passfile = {name: value for name, value in admin.parameters.items() if name == "passfile"}
    return replace(
        replica,
        user=admin.user,
        password=admin.password,
        database=admin.database,
        parameters={**replica.parameters, **passfile},
    )


def _on_standby(isolation: str) -> str:
    """The isolation that a standby has in place of the one that it refuses: the same for reads alone."""
    return "repeatable read" if isolation == "serializable" else isolation


def _first_host(dsn: Dsn) -> tuple[str, int]:
    return dsn.hosts[0] if dsn.hosts else ("localhost", DEFAULT_PORT)


__all__ = ["PEER_SECONDS", "Server", "ServerFacts"]
