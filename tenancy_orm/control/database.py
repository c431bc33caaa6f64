"""The control database: its engine, its schema, and its absence told apart from every other error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ..config.values import plain_url
from ..context import refuse_other_tenant, refuse_while_bound
from ..errors import (
    AdministratorNeededError,
    ConfigurationError,
    ControlSchemaError,
    ControlUnavailableError,
    TenancyError,
)
from ..loops import HomeLoop
from ..postgres.errors import (
    INSUFFICIENT_PRIVILEGE,
    INVALID_PARAMETER_VALUE,
    NO_ACTIVE_TRANSACTION,
    sqlstate_of,
)
from ..postgres.failures import SERVER_FAILURES
from .grants import grant_application
from .models import SCHEMA, installation, servers
from .viewer import VIEW_AS, prepare_viewer

# One migration of the control database at a time, whoever runs it: a lock key of our own in the database's key space.
_MIGRATION_LOCK = 0x74656E616E637900

_NO_SUCH_ROLE = (INVALID_PARAMETER_VALUE, INSUFFICIENT_PRIVILEGE)  # it does not exist, or is not granted
_OUT_OF_RESOURCES = "53"
_CONNECT_SQLSTATES = ("08", "57P", _OUT_OF_RESOURCES)  # connection, operator intervention


def is_unavailable(error: BaseException) -> bool:
    """Whether ``error`` means that the server could not be reached, rather than that it refused a statement."""
    if isinstance(error, (OSError, PoolTimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    # not behind any other error: that is the caller's own
    return isinstance(error, (DBAPIError, asyncpg.PostgresError)) and _has_class(error, _CONNECT_SQLSTATES)


def _has_class(error: BaseException, classes: str | tuple[str, ...]) -> bool:
    return (sqlstate_of(error) or "").startswith(classes)


def _drop_unusable(context: ExceptionContext) -> None:
    """Give a connection up after an error from which asyncpg does not recover.

    Where a BEGIN fails, for want of a lock, say, asyncpg takes the transaction for open, and sends a SAVEPOINT in place
    of every further BEGIN, which is refused: the pool would keep a connection that never works again.
    """
    error = context.original_exception
    if _has_class(error, _OUT_OF_RESOURCES) or sqlstate_of(error) == NO_ACTIVE_TRANSACTION:
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


class ControlDatabase:
    """The one database that knows the tenants.

    Args:
        url: ``postgresql://`` URL.
        pool_size: Connections kept; as many again are opened under load and closed when returned.
        connect_timeout: Seconds for a connect, and for waiting for one of the pool.
        command_timeout: Seconds any one statement may take.
        name_prefix: ``TenancyConfig.name_prefix``, for the name of the role that ``upgrade`` makes.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 5,
        connect_timeout: float = 10.0,
        command_timeout: float = 30.0,
        name_prefix: str = "tenancy",
    ) -> None:
        self.home = HomeLoop()
        plain = plain_url(url)
        self.listen_dsn = plain.render_as_string(hide_password=False)
        self.database = plain.database or ""
        self.address = (plain.host or "localhost", plain.port or 5432)
        self._installation: UUID | None = None
        self._name_prefix = name_prefix
        self._viewer: str | None = None
        self.engine: AsyncEngine = create_async_engine(
            plain.set(drivername="postgresql+asyncpg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=connect_timeout,
            pool_use_lifo=True,
            # parameters hold customers' data, digests and sealed passwords, which have no place in an error
            hide_parameters=True,
            connect_args={
                "timeout": connect_timeout,
                "command_timeout": command_timeout,
                "server_settings": {"application_name": "tenancy-control"},
            },
        )
        event.listen(self.engine.sync_engine, "handle_error", _drop_unusable)

    def __repr__(self) -> str:
        """Name the database, without host or credentials."""
        return f"ControlDatabase({self.database!r})"

    @property
    def installation(self) -> UUID:
        """The id of this installation, known after ``open``."""
        if self._installation is None:
            raise ControlSchemaError("the control database is not open; open the Tenancy first")
        return self._installation

    async def open(self) -> None:
        """Connect, check the schema's revision, and read the installation's id.

        Raises:
            ControlUnavailableError: the server does not answer.
            ControlSchemaError: the schema is missing or at another revision; run ``tenancy init``.
        """
        expected = _script_directory().get_current_head()
        async with self.connect() as connection:
            found = await connection.scalar(text("SELECT to_regclass('tenancy.alembic_version')::text"))
            if found is None:
                raise ControlSchemaError("the control database is not initialised; run: tenancy init")
            revision = await connection.scalar(text("SELECT version_num FROM tenancy.alembic_version"))
            if revision != expected:
                raise ControlSchemaError(
                    f"the control database is at revision {revision}, this version needs {expected}; run: tenancy init"
                )
            row = (await connection.execute(select(installation.c.id, installation.c.viewer))).one()
            self._installation, self._viewer = row.id, row.viewer

    async def close(self) -> None:
        """Close every pooled connection."""
        self.home.check()
        await self.engine.dispose()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in AUTOCOMMIT: for one reading statement, at one round trip.

        Raises:
            ControlUnavailableError: the server does not answer.
        """
        async with self._translating_errors(), self._pooled() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in a transaction that commits when the body succeeds.

        Raises:
            ControlUnavailableError: the server does not answer, or went away; whether a commit took place is unknown
                if the connection was lost during it.
        """
        async with self._translating_errors(), self._pooled() as connection, connection.begin():
            yield connection

    @asynccontextmanager
    async def viewing(self, tenant_id: UUID) -> AsyncIterator[AsyncConnection]:
        """Yield a connection that sees this tenant's rows alone, even in a query that does not ask for them.

        It is a transaction that reads only, as the installation's viewer role, under row-level security. Columns that
        are no tenant's business are refused (``viewer.VIEWER_COLUMNS``). When it ends the connection is as before.

        Raises:
            ControlUnavailableError: the server does not answer.
            ControlSchemaError: there is no viewer role; run ``tenancy init``.
            ConfigurationError: the role of the control URL may not take it on; run ``grant_application``.
        """
        refuse_other_tenant(tenant_id)
        if self._viewer is None:
            raise ControlSchemaError("the control database has no role that reads for a tenant; run: tenancy init")
        async with self.transaction() as connection:
            try:
                await connection.execute(VIEW_AS, {"tenant": str(tenant_id), "role": self._viewer})
            except DBAPIError as exc:
                if sqlstate_of(exc) not in _NO_SUCH_ROLE:
                    raise
                raise ConfigurationError(
                    f"the control database's role cannot take on {self._viewer!r}; "
                    "run tenancy init, and grant_application for the application's role"
                ) from exc
            yield connection

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AsyncConnection]:
        """A connection of the pool. Whatever keeps one from being opened makes the database unavailable."""
        self.home.check()
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self.engine.connect())
            except (DBAPIError, *SERVER_FAILURES) as exc:
                # the class alone: a message may quote the address
                cause = (exc.orig and exc.orig.__cause__) or exc.orig if isinstance(exc, DBAPIError) else exc
                name = type(cause).__name__
                raise ControlUnavailableError(f"the control database is not available ({name})") from exc
            yield connection

    @asynccontextmanager
    async def _translating_errors(self) -> AsyncIterator[None]:
        try:
            yield
        except TenancyError:
            raise  # the body's own; some are a PermissionError too, and so an OSError
        except Exception as exc:
            if not is_unavailable(exc):
                raise
            raise ControlUnavailableError("the control database is not available") from exc

    # --- schema -----------------------------------------------------------------------------------------------------

    async def upgrade(self, revision: str = "head", *, administrator: asyncpg.Connection[Any] | None = None) -> None:
        """Bring the schema to ``revision``; one process at a time, the others wait and find it done.

        At the head it also makes the role that ``viewing`` takes on, and gives it its rights.

        Args:
            revision: A revision of the package's own migrations.
            administrator: A connection to the same server, any database of it, as a role that may create roles: for
                what this one may not do. The caller closes it.

        Raises:
            ControlUnavailableError: the server does not answer.
            AdministratorNeededError: this role may not create that one, and there is no administrator.
        """
        refuse_while_bound("migrating the control database")
        self.home.check()
        async with self._translating_errors(), self.engine.connect() as connection:
            await self._lock(connection)
            try:
                await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
                await connection.commit()
                await connection.run_sync(_migrate, revision)
                await connection.commit()
                if revision == "head":
                    await self._prepare_viewer(connection, administrator)
            finally:
                await connection.rollback()
                await connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})
                await connection.commit()

    async def _prepare_viewer(self, connection: AsyncConnection, administrator: asyncpg.Connection[Any] | None) -> None:
        # twice refused at the most: the role is created by one statement, and granted by another
        for attempt in range(3):
            try:
                self._viewer = await prepare_viewer(connection, self._name_prefix)
                await connection.commit()
            except AdministratorNeededError as exc:
                await connection.rollback()
                if administrator is None or attempt == 2:
                    raise
                for statement in exc.statements:
                    await administrator.execute(statement)
            else:
                return

    @staticmethod
    async def _lock(connection: AsyncConnection, *, timeout: float = 60.0) -> None:
        """Poll for the lock: waiting in PostgreSQL would hold a snapshot that CREATE INDEX CONCURRENTLY waits for."""
        async with asyncio.timeout(timeout):
            while not await connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _MIGRATION_LOCK}):
                await connection.rollback()
                await asyncio.sleep(0.05)
        await connection.commit()

    async def grant_application(self, role: str) -> None:
        """Give the application's own role what it needs in this database and nothing else; run as the tables' owner.

        Raises:
            ConfigurationError: the role does not exist, or has rights that nothing here could take away.
        """
        refuse_while_bound("granting rights")
        async with self.transaction() as connection:
            await grant_application(connection, role)

    async def save_servers(self, addresses: Mapping[str, tuple[str, int]]) -> None:
        """Write the configured servers into the registry, where foreign keys need them.

        Args:
            addresses: Host and port of each server by name; credentials stay in the configuration.
        """
        refuse_while_bound("changing servers")
        async with self.transaction() as connection:
            for name, (host, port) in addresses.items():
                added = insert(servers).values(name=name, host=host, port=port)
                address = {"host": added.excluded.host, "port": added.excluded.port}
                await connection.execute(added.on_conflict_do_update(index_elements=["name"], set_=address))


def _alembic_config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _script_directory() -> ScriptDirectory:
    return ScriptDirectory.from_config(_alembic_config())


def _migrate(connection: Connection, revision: str) -> None:
    command.upgrade(_alembic_config(connection), revision)
