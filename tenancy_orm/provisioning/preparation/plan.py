"""``PreparationPlan``: what ``tenancy init`` is about to change on the servers, read before anything is changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from ...config import TenancyConfig
from ...control.database import ControlDatabase, foreign_schema, head
from ...control.models import SCHEMA
from ...errors import ConfigurationError, ControlUnavailableError, DatabaseExistsError, ServerUnavailableError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import INVALID_CATALOG_NAME, NOT_IN_PREREQUISITE_STATE, sqlstate_of
from ...postgres.failures import SERVER_FAILURES
from ...postgres.login import reason_of
from ...postgres.quoting import quote_identifier
from ...servers import Server, Servers
from ..rights import public_access
from ..rights.public_access import Closing, ControlFacts, SharedDatabases
from ..server_objects import databases
from .steps import LOCK

# where to connect to a server on which the database of the URL does not exist
_OTHERS = ("postgres", "template1")


@dataclass(frozen=True, slots=True)
class PreparationPlan:
    """What preparing the servers of a configuration would change.

    ``read`` only reads. ``apply`` creates the control database if it is missing, and revokes PUBLIC's rights; the
    rest is ``Tenancy.open(initialise=True)``.
    """

    control_database: str
    """The control database's name."""
    control_address: str
    """``host:port/database``."""
    creates_control: bool
    """Whether it does not exist."""
    other_tables: tuple[str, ...]
    """Tables of somebody else in a control database that is not initialised yet, 20 at most."""
    closings: tuple[Closing, ...]
    """The databases on which PUBLIC has rights, on the servers that answered."""
    upgrade: tuple[str, str] | None = None
    """The revisions that the control database is upgraded from and to; None where it is new or needs no upgrade."""
    unavailable: tuple[ServerUnavailableError, ...] = ()
    """Why servers did not answer. Their own preparation refuses to take access from anybody."""

    @classmethod
    async def read(cls, config: TenancyConfig) -> PreparationPlan:
        """Read the state of the control database and of every server.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ControlSchemaError: a later version of this package has upgraded it.
            ServerUnavailableError: it is not initialised yet, and a server does not answer.
            ConfigurationError: a URL cannot be used.
        """
        async with _parts(config) as (control, servers):
            return await cls.read_from(config, control, servers)

    @classmethod
    async def read_from(cls, config: TenancyConfig, control: ControlDatabase, servers: Servers) -> PreparationPlan:
        """As ``read``, through a control database and servers that the caller has opened."""
        facts = await _control_facts(control, config)
        shared = SharedDatabases(config.name_prefix, facts, (control.dsn.user,) if control.dsn.user else ())
        revision = await control.revision() if facts is not None and facts.is_initialised else None
        closings: list[Closing] = []
        unavailable: list[ServerUnavailableError] = []
        if config.provisioning.revoke_public:
            timeout = config.provisioning.timeout
            reading = (_closings(server, shared, timeout=timeout) for server in servers.values())
            for answer in await asyncio.gather(*reading, return_exceptions=True):
                if isinstance(answer, ServerUnavailableError) and revision is not None:
                    unavailable.append(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    closings += answer
        target = head()
        return cls(
            control_database=control.database,
            control_address=str(control.dsn),
            creates_control=facts is None,
            other_tables=() if facts is None or facts.is_initialised else facts.other_tables,
            closings=tuple(closings),
            upgrade=(revision, target) if revision and target and revision != target else None,
            unavailable=tuple(unavailable),
        )

    @property
    def losing(self) -> frozenset[str]:
        """The roles that would lose access to a database."""
        return frozenset(role for closing in self.closings for role in closing.losing)

    @property
    def connected(self) -> frozenset[str]:
        """Those of them that are connected to it now."""
        return frozenset(session.role for closing in self.closings for session in closing.connected)

    def check_control(self, *, shared: bool = False) -> None:
        """Refuse a control database that somebody else's tables are in.

        Args:
            shared: Accept such tables, except in the schema of this package's own.

        Raises:
            ConfigurationError: there are such tables, and this package has not used the database before.
        """
        if self.other_tables and not shared:
            shown = ", ".join(self.other_tables[:3]) + (", ..." if len(self.other_tables) > 3 else "")
            own = self.control_address.removesuffix(self.control_database) + "tenancy_control"
            raise ConfigurationError(
                f"database {self.control_database!r} holds tables of another application ({shown}), and a control "
                "database should be one of its own: name one that does not exist in control_url, for example "
                f"postgresql://...@{own}, and tenancy init makes it; or use this one all the same with "
                "--shared-control-database"
            )
        if any(name.startswith(f"{SCHEMA}.") for name in self.other_tables):
            raise ConfigurationError(foreign_schema(self.control_database))

    async def apply(self, config: TenancyConfig, *, keep: Iterable[str] = ()) -> None:
        """Create the control database if it is missing, and revoke PUBLIC's rights.

        Args:
            config: The configuration that the plan was read for.
            keep: Roles among ``losing`` that are granted CONNECT and TEMPORARY on what they would lose first.

        Raises:
            ConfigurationError: the control database cannot be created; the message has the statement.
            ControlUnavailableError, ServerUnavailableError: a server does not answer.
        """
        kept = frozenset(keep)
        async with _parts(config) as (control, servers):
            if self.creates_control:
                await _create_control(control, servers, config)
            # the others are a superuser's to close; the caller has shown what to run
            for name, closings in _by_server(closing for closing in self.closings if closing.may_revoke):
                async with _administrator(servers[name]) as connection:
                    await locks.lock(connection, locks.lock_key(LOCK), timeout=config.provisioning.timeout)
                    for closing in closings:
                        await public_access.close(connection, closing, keep=kept.intersection(closing.losing))


@asynccontextmanager
async def _parts(config: TenancyConfig) -> AsyncIterator[tuple[ControlDatabase, Servers]]:
    control = ControlDatabase(
        config.control_url, pool_size=1, connect_timeout=config.pool.connect_timeout, purpose="tenancy-admin"
    )
    servers = Servers(config)
    try:
        yield control, servers
    finally:
        await servers.close()
        await control.close()


async def _control_facts(control: ControlDatabase, config: TenancyConfig) -> ControlFacts | None:
    """The control database's state; None if it does not exist.

    Raises:
        ControlUnavailableError: it does not answer.
        ConfigurationError: it accepts no connections.
    """
    try:
        return await public_access.read_control(control, config)
    except ControlUnavailableError as exc:
        sqlstate = sqlstate_of(exc.__cause__ or exc)
        if sqlstate == INVALID_CATALOG_NAME:
            return None
        if sqlstate == NOT_IN_PREREQUISITE_STATE:
            name = quote_identifier(control.database)
            raise ConfigurationError(
                f"{exc}; a tenancy init that is killed while it makes the database leaves it so. In this case run, as "
                f"an administrator: DROP DATABASE {name}; in others: ALTER DATABASE {name} ALLOW_CONNECTIONS true; "
                "then run tenancy init again"
            ) from exc
        raise


async def _closings(server: Server, shared: SharedDatabases, *, timeout: float) -> tuple[Closing, ...]:
    async with _administrator(server) as connection:
        try:
            async with asyncio.timeout(timeout):
                closings = await shared.closings(connection, server.name)
                await server.learn(connection)  # an opening asks next
                return closings
        except OSError as exc:  # no answer in time, for example
            raise server.unavailable(exc) from exc


@asynccontextmanager
async def _administrator(server: Server) -> AsyncIterator[Connection]:
    connection = await _log_in(server)
    try:
        yield connection
    finally:
        await connections.close(connection)


async def _log_in(server: Server) -> Connection:
    """Log in as the administrator; to another database if that of the URL does not exist, as before ``apply``."""
    try:
        return await server.connect_admin()
    except asyncpg.InvalidCatalogNameError:
        for name in _OTHERS:
            try:
                return await server.connect_admin(name)
            except asyncpg.PostgresError:
                continue
        raise
    except asyncpg.PostgresError as exc:
        raise server.unavailable(exc) from exc


async def _create_control(control: ControlDatabase, servers: Servers, config: TenancyConfig) -> None:
    """Create the control database as the administrator of its server; the control URL's role owns it."""
    own = config.listen_dsn or control.dsn
    server = next((found for found in servers.values() if found.dsn.shares_host(own)), None)
    if server is None:
        server = Server("of the control database", own, connect_timeout=config.pool.connect_timeout)
    name = control.database
    try:
        async with _administrator(server) as connection:
            administrator = str(await connection.fetchval("SELECT current_user"))
            owner = control.dsn.user or administrator
            try:
                # closed to PUBLIC from its first moment on
                await databases.create(connection, name, template="template0", owner=owner, open_to_connections=False)
            except DatabaseExistsError:
                return  # another process was faster
            await databases.open_to_owner(connection, name)
    except SERVER_FAILURES as exc:
        owner = quote_identifier(control.dsn.user or "...")
        raise ConfigurationError(
            f"the control database {control.dsn} does not exist, and cannot be created: {reason_of(exc)}; run as an "
            f"administrator: CREATE DATABASE {quote_identifier(name)} OWNER {owner}"
        ) from exc


def _by_server(closings: Iterable[Closing]) -> Iterator[tuple[str, list[Closing]]]:
    found: dict[str, list[Closing]] = {}
    for closing in closings:
        found.setdefault(closing.server, []).append(closing)
    yield from found.items()


__all__ = ["PreparationPlan"]
