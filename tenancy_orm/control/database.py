"""The control database: its engine, its schema, and errors that say that it is not available."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, case, event, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ..context import refuse_other_tenant, refuse_while_bound
from ..errors import (
    AdministratorNeededError,
    ConfigurationError,
    ControlSchemaError,
    ControlUnavailableError,
    PoolerError,
    TenancyError,
)
from ..loops import HomeLoop
from ..postgres import connections, login
from ..postgres.connections import Connection as DriverConnection
from ..postgres.dsn import Dsn
from ..postgres.errors import (
    DEADLOCK_DETECTED,
    INSUFFICIENT_PRIVILEGE,
    INVALID_CATALOG_NAME,
    INVALID_PARAMETER_VALUE,
    LOCK_NOT_AVAILABLE,
    NO_ACTIVE_TRANSACTION,
    sqlstate_of,
)
from ..postgres.failures import SERVER_FAILURES
from ..postgres.login import reason_of
from ..postgres.poolers import connect_directly
from .direct import ControlRow, DirectPool, pool_of, rows_of
from .grants import grant_application
from .models import SCHEMA, installation, servers
from .names import Names
from .notifications import CONNECTIONS_CHANNEL, ConnectionRequest
from .process import one_migration, proxies_restored
from .viewer import VIEW_AS, prepare_viewer

logger = logging.getLogger("tenancy_orm.control")

# The advisory lock key of the control database's migrations: one process at a time runs them.
_MIGRATION_LOCK = 0x74656E616E637900

# Who comes after an ALTER TABLE that waits for a lock waits behind it, so a migration waits for a moment at a time.
_LOCK_TIMEOUT = "2s"
_LOCK_PAUSE = 1.0
_LOCK_SECONDS = 60.0
_SET_LOCK_TIMEOUT = text("SELECT set_config('lock_timeout', :timeout, true)")
_BUSY = (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED)

# PostgreSQL would plan "= ANY" for the number of keys each time, which takes longer than the query. And a plan that was
# made while the tables were small, and reads all their rows, would stay until they are next analysed.
_HOT_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}

_NOTIFY = text("SELECT pg_notify(:channel, payload) FROM unnest(CAST(:payloads AS text[])) AS payload")

_CONTROL_POOLER = (
    "control_url leads to a connection pooler at {address}: {reason}; set control.listen_url to the database's own "
    "address, which LISTEN and tenancy init need"
)
_LISTEN_POOLER = (
    "control.listen_url must be the database's own address, and a connection pooler answers at {address}: {reason}"
)
# Tables in a schema of the same name that no migration of this package has made: its first one makes "installation".
_HAS_REVISION = text("SELECT to_regclass('tenancy.alembic_version') IS NOT NULL")
_REVISION = text("SELECT version_num FROM tenancy.alembic_version")
_IS_INITIALISED = text("SELECT to_regclass('tenancy.installation') IS NOT NULL")
_OTHERS_SCHEMA = text(
    "SELECT to_regclass('tenancy.installation') IS NULL AND EXISTS (SELECT FROM pg_class c WHERE c.relkind IN "
    "('r', 'p', 'v', 'm', 'f') AND c.relnamespace = to_regnamespace('tenancy') AND c.relname <> 'alembic_version')"
)

_NO_SUCH_ROLE = (INVALID_PARAMETER_VALUE, INSUFFICIENT_PRIVILEGE)  # it does not exist, or is not granted
_OUT_OF_RESOURCES = "53"
_CONNECT_SQLSTATES = ("08", "57P", _OUT_OF_RESOURCES)  # connection, operator intervention


def foreign_schema(database: str) -> str:
    """The message of the error where another application has tables in a schema of the same name."""
    return (
        f"the schema {SCHEMA!r} in database {database!r} holds tables of another application, and the control database "
        "needs that schema for itself: name another database in control_url"
    )


def is_unavailable(error: BaseException) -> bool:
    """Whether ``error`` means that the server is not available, rather than that it refused a statement."""
    if isinstance(error, (OSError, PoolTimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    # an error of another class is the caller's own, whatever its cause
    return isinstance(error, (DBAPIError, asyncpg.PostgresError)) and _has_class(error, _CONNECT_SQLSTATES)


def _has_class(error: BaseException, classes: str | tuple[str, ...]) -> bool:
    return (sqlstate_of(error) or "").startswith(classes)


def _drop_unusable(context: ExceptionContext) -> None:
    """Invalidate a connection after an error from which asyncpg does not recover.

    Where a BEGIN fails, for example for lack of memory for locks, asyncpg considers the transaction open and sends a
    SAVEPOINT in place of every further BEGIN, which PostgreSQL refuses: the pool would keep a broken connection.
    """
    error = context.original_exception
    if _has_class(error, _OUT_OF_RESOURCES) or sqlstate_of(error) == NO_ACTIVE_TRANSACTION:
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


class ControlDatabase:
    """The one database that knows the tenants.

    Args:
        dsn: The database, as a URL or a ``Dsn``.
        pool_size: Connections kept; as many again are opened under load and closed when returned.
        connect_timeout: Seconds for a connect, and for waiting for a connection of the pool; a shorter one in the DSN
            bounds the connect.
        command_timeout: Seconds that one statement may take.
        name_prefix: ``TenancyConfig.name_prefix``, for the name of the role that ``upgrade`` creates.
        purpose: What the connections are for, as their application_name says.
        direct: Another DSN of the database, which leads to PostgreSQL itself; needed if ``dsn`` leads to a pooler.
        pooled: Whether ``dsn`` leads to a pooler; the first connection finds out where None.
        hot: Whether it is for a few statements that are run again and again and look rows up by an index: PostgreSQL
            plans each of them once.
    """

    def __init__(
        self,
        dsn: Dsn | str,
        *,
        pool_size: int = 5,
        connect_timeout: float = 10.0,
        command_timeout: float = 30.0,
        name_prefix: str = "tenancy",
        purpose: str = "tenancy-control",
        direct: Dsn | None = None,
        pooled: bool | None = None,
        hot: bool = False,
    ) -> None:
        self.home = HomeLoop()
        self.dsn = dsn = dsn if isinstance(dsn, Dsn) else Dsn.parse(dsn)
        self.database = dsn.database or ""
        self.upgraded_from: str | None = None
        """The revision that an opening has upgraded the schema from; None where it was at the head, or new."""
        self._connect_timeout = min(connect_timeout, dsn.connect_timeout or connect_timeout)
        self._command_timeout = command_timeout
        self._login: dict[str, Any] = {
            "purpose": purpose,
            "timeout": self._connect_timeout,
            "command_timeout": command_timeout,
        }
        self._settings = _HOT_SETTINGS if hot else {}
        self._installation: UUID | None = None
        self._name_prefix = name_prefix
        self._viewer: str | None = None
        self._direct = direct
        self._pooled_reason: str | None = None
        self._checking = asyncio.Lock()
        self._checked: DriverConnection | None = None  # the connection that has shown where the DSN leads
        self.is_pooled = pooled
        """Whether a connection pooler answers; None before the first connection."""
        self.engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            poolclass=DirectPool,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=connect_timeout,
            pool_use_lifo=True,
            # parameters contain customers' data, digests and sealed passwords, which must not be in an error
            hide_parameters=True,
            connect_args={"async_creator_fn": self._log_in, **_cache_size(dsn)},
        )
        event.listen(self.engine.sync_engine, "handle_error", _drop_unusable)
        event.listen(self.engine.sync_engine, "do_connect", self._keep_no_statements)

    def __repr__(self) -> str:
        """Name the database, without host or credentials."""
        return f"ControlDatabase({self.database!r})"

    async def _log_in(self) -> DriverConnection:
        checked, self._checked = self._checked, None
        if checked is not None and not checked.is_closed():
            return checked
        if self.is_pooled:
            return await login.connect(self.dsn, **self._login, statement_cache_size=0)
        return await login.connect(self.dsn, **self._login, settings=self._settings)

    def _keep_no_statements(self, dialect: object, record: object, arguments: object, options: dict[str, Any]) -> None:
        """Prepare nothing that a pooler's next client would find: an unnamed statement is parsed when it is run."""
        if self.is_pooled:
            options.update(prepared_statement_cache_size=0, prepared_statement_name_func=lambda: "")

    async def _check_address(self) -> None:
        """Find out once whether a pooler answers."""
        async with self._checking:
            if self.is_pooled is not None:
                return
            try:
                self._checked = await connect_directly(
                    self.dsn, refusal="{reason}", settings=self._settings, **self._login
                )
                self.is_pooled = False
            except PoolerError as exc:
                self._pooled_reason = str(exc)
                self.is_pooled = True

    @property
    def installation(self) -> UUID:
        """The id of this installation; known once ``open`` has run."""
        if self._installation is None:
            raise ControlSchemaError("the control database is not open; open the Tenancy first")
        return self._installation

    async def open(self) -> None:
        """Connect, check the schema's revision, and read the installation's id.

        Raises:
            ControlUnavailableError: the server does not answer.
            ControlSchemaError: the schema is missing or at another revision; run ``tenancy init``.
            PoolerError: no DSN leads to PostgreSQL itself, or the one that should does not.
        """
        await self._check_direct()
        expected = head()
        async with self.connect() as connection:
            if not await connection.scalar(_HAS_REVISION):
                raise ControlSchemaError("the control database is not initialised; run: tenancy init")
            revision = await connection.scalar(_REVISION)
            if revision != expected:
                _refuse_later([revision])
                raise ControlSchemaError(
                    f"the control database is at revision {revision}, this version needs {expected}; run: tenancy init"
                )
            row = (await connection.execute(select(installation.c.id, installation.c.viewer))).one()
            self._installation, self._viewer = row.id, row.viewer

    async def _check_direct(self) -> None:
        """Check that there is a DSN that leads to PostgreSQL itself, for LISTEN and for locks."""
        if self._direct is not None:
            try:
                connection = await connect_directly(self._direct, refusal=_LISTEN_POOLER, **self._login)
                await connections.close(connection)
            except SERVER_FAILURES as exc:
                # the listener tries again, and reports it
                logger.warning("control.listen_url cannot be checked now: %s", reason_of(exc))
            return
        async with self._translating_errors(), self._pooled():
            pass
        if self.is_pooled:
            raise PoolerError(_CONTROL_POOLER.format(address=self.dsn, reason=self._pooled_reason))

    async def close(self) -> None:
        """Close every pooled connection."""
        self.home.check()
        checked, self._checked = self._checked, None
        if checked is not None:
            await connections.close(checked)
        await self.engine.dispose()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in AUTOCOMMIT, for one reading statement in one round trip.

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
            ControlUnavailableError: the server does not answer, or the connection was lost; if that was during the
                commit, whether it took place is unknown.
        """
        async with self._translating_errors(), self._pooled() as connection, connection.begin():
            yield connection

    async def fetch(self, query: str, *args: Any) -> list[ControlRow]:
        """Run one statement on asyncpg's connection, outside a transaction, and return its rows.

        It is prepared once for each connection of the pool and takes one round trip, without SQLAlchemy's own work for
        each statement: for what requests wait for.

        Args:
            query: The statement, with ``$1`` and so on.
            args: Its parameters, as asyncpg takes them.

        Raises:
            ControlUnavailableError: the server does not answer.
            asyncpg.PostgresError: it refuses the statement.
        """
        self.home.check()
        try:
            if self.is_pooled is None:
                await self._check_address()
            pool = pool_of(self.engine)
            record = await pool.check_out()
        except (DBAPIError, *SERVER_FAILURES) as exc:
            raise self._unavailable(exc) from exc
        try:
            rows = await rows_of(record, query, args)
        except BaseException as exc:
            await pool.check_in_after(record, exc, lost=is_unavailable(exc))
            if isinstance(exc, Exception) and is_unavailable(exc):
                raise self._unavailable(exc) from exc
            raise
        await pool.check_in(record)
        return rows

    def check_names(self, names: Names) -> None:
        """Refuse another ``name_prefix`` than the one that this installation's roles and databases are named with.

        Under another one its tenants belong to a role that this process does not use as their owner.

        Raises:
            ConfigurationError: it is another one.
        """
        if self._viewer not in (None, names.viewer):
            recorded = str(self._viewer).removesuffix(names.viewer.removeprefix(names.prefix))
            raise ConfigurationError(
                f"name_prefix is {names.prefix!r}, and the names of this installation's roles and databases begin "
                f"with {recorded!r}; set name_prefix (TENANCY_NAME_PREFIX) to {recorded!r}"
            )

    @asynccontextmanager
    async def viewing(self, tenant_id: UUID) -> AsyncIterator[AsyncConnection]:
        """Yield a connection that sees this tenant's rows alone, even in a query that does not filter them.

        It is in a read-only transaction, as the installation's viewer role, under row-level security. Only the columns
        in ``viewer.VIEWER_COLUMNS`` may be read. When the transaction ends, the connection is as before.

        Raises:
            ControlUnavailableError: the server does not answer.
            ControlSchemaError: there is no viewer role; run ``tenancy init``.
            ConfigurationError: the role of the control URL may not use the viewer role; run ``grant_application``.
        """
        refuse_other_tenant(tenant_id)
        if self._viewer is None:
            raise ControlSchemaError("the control database has no viewer role; run: tenancy init")
        async with self.transaction() as connection:
            try:
                await connection.execute(VIEW_AS, {"tenant": str(tenant_id), "role": self._viewer})
            except DBAPIError as exc:
                if sqlstate_of(exc) not in _NO_SUCH_ROLE:
                    raise
                raise ConfigurationError(
                    f"the control database's role may not SET ROLE to {self._viewer!r}; "
                    "run tenancy init, and grant_application for the application's role"
                ) from exc
            yield connection

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection of the pool; any error in opening one means that the database is not available."""
        self.home.check()
        async with AsyncExitStack() as stack:
            try:
                if self.is_pooled is None:
                    await self._check_address()
                connection = await stack.enter_async_context(self.engine.connect())
            except (DBAPIError, *SERVER_FAILURES) as exc:
                raise self._unavailable(exc) from exc
            yield connection

    def _unavailable(self, error: BaseException) -> ControlUnavailableError:
        hint = "; tenancy init creates it" if sqlstate_of(error) == INVALID_CATALOG_NAME else ""
        return ControlUnavailableError(f"the control database {self.dsn} is not available: {reason_of(error)}{hint}")

    @asynccontextmanager
    async def _translating_errors(self) -> AsyncIterator[None]:
        try:
            yield
        except TenancyError:
            raise  # the body's own: some are also a PermissionError, and so an OSError
        except Exception as exc:
            if not is_unavailable(exc):
                raise
            raise self._unavailable(exc) from exc

    # --- schema -----------------------------------------------------------------------------------------------------

    async def revision(self) -> str | None:
        """Return the revision that the schema is at; None where the database is not initialised.

        Raises:
            ControlUnavailableError: the server does not answer.
            ControlSchemaError: a later version of this package has upgraded the schema.
        """
        async with self.connect() as connection:
            if not await connection.scalar(_IS_INITIALISED):
                return None
            revision: str | None = await connection.scalar(_REVISION)
        _refuse_later([revision])
        return revision

    async def upgrade(self, revision: str = "head", *, administrator: asyncpg.Connection[Any] | None = None) -> None:
        """Upgrade the schema to ``revision``; one process does so at a time, and the others wait for it.

        Where another session holds a lock that it needs, a backup for example, it tries again for a minute, and lets
        the application's work through in between.

        At the head it also creates the viewer role that ``viewing`` uses, and grants its rights.

        Args:
            revision: A revision of the package's own migrations.
            administrator: A connection to any database of the same server, as a role that may create roles, in case
                this one may not. The caller closes it.

        Raises:
            ControlUnavailableError: the server does not answer, or another session holds a lock for too long.
            ControlSchemaError: a later version of this package has upgraded the schema.
            ConfigurationError: the schema ``tenancy`` is another application's.
            AdministratorNeededError: this role may not create the viewer role, and there is no administrator.
            PoolerError: no DSN leads to PostgreSQL itself.
        """
        refuse_while_bound("migrating the control database")
        await self._check_direct()
        if self._direct is not None:
            control = ControlDatabase(
                self._direct,
                connect_timeout=self._connect_timeout,
                command_timeout=self._command_timeout,
                name_prefix=self._name_prefix,
            )
            try:
                await control.upgrade(revision, administrator=administrator)
            finally:
                await control.close()
            return
        async with self._translating_errors(), self._pooled() as connection:
            await self._lock(connection)
            try:
                if await connection.scalar(_OTHERS_SCHEMA):
                    raise ConfigurationError(foreign_schema(self.database))
                await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
                revisions = await self._revisions(connection)
                await connection.commit()
                if revision not in ("head", "heads") or revisions != [head()]:
                    _refuse_later(revisions)
                    # Alembic reads every revision and runs an environment, even where there is nothing to do
                    async with one_migration():
                        await self._migrate(connection, revision)
                if revision == "head":
                    await self._prepare_viewer(connection, administrator)
            finally:
                await connection.rollback()
                await connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})
                await connection.commit()

    @staticmethod
    async def _revisions(connection: AsyncConnection) -> list[str]:
        """The revisions that a control database is at; none if nothing was ever migrated."""
        return list(await connection.scalars(_REVISION)) if await connection.scalar(_HAS_REVISION) else []

    async def _migrate(self, connection: AsyncConnection, revision: str) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                # for this transaction, which Alembic joins
                await connection.execute(_SET_LOCK_TIMEOUT, {"timeout": _LOCK_TIMEOUT})
                await connection.run_sync(_migrate, revision)
                await connection.commit()
                return
            except (DBAPIError, asyncpg.PostgresError) as exc:
                if sqlstate_of(exc) not in _BUSY:
                    raise
                await connection.rollback()
                if time.monotonic() >= deadline:
                    raise ControlUnavailableError(
                        f"the control database {self.dsn} cannot be upgraded: another session, a backup or a long "
                        "query for example, keeps a table locked; end it, or try again when it has ended; nothing was "
                        "changed"
                    ) from exc
            logger.info("the control database is not upgraded yet: another session keeps a table locked; trying again")
            await asyncio.sleep(_LOCK_PAUSE)

    async def _prepare_viewer(self, connection: AsyncConnection, administrator: asyncpg.Connection[Any] | None) -> None:
        # it is refused twice at most: one statement creates the role, and another grants it
        for attempt in range(3):
            try:
                self._viewer = await prepare_viewer(connection, self._name_prefix)
                await connection.commit()
            except AdministratorNeededError as exc:
                await connection.rollback()
                if administrator is None or attempt == 2:
                    raise
                for statement in exc.statements:
                    try:
                        await administrator.execute(statement)
                    except asyncpg.InsufficientPrivilegeError as refused:
                        # the role is there already, and somebody else's
                        raise exc from refused
            else:
                return

    @staticmethod
    async def _lock(connection: AsyncConnection, *, timeout: float = 60.0) -> None:
        """Poll for the lock: a wait in PostgreSQL would keep a snapshot that CREATE INDEX CONCURRENTLY waits for."""
        async with asyncio.timeout(timeout):
            while not await connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _MIGRATION_LOCK}):
                await connection.rollback()
                await asyncio.sleep(0.05)
        await connection.commit()

    async def grant_application(self, role: str) -> None:
        """Grant the application's own role what it needs in this database and nothing else; run as the tables' owner.

        Raises:
            ConfigurationError: the role does not exist, or has rights that cannot be revoked here.
        """
        refuse_while_bound("granting rights")
        async with self.transaction() as connection:
            await grant_application(connection, role)

    async def ask_for_connections(self, requests: Sequence[ConnectionRequest]) -> None:
        """Send requests for connections to the other processes, in one transaction.

        Raises:
            ControlUnavailableError: the server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("asking for connections")
        async with self.connect() as connection:
            payloads = [request.payload for request in requests]
            await connection.execute(_NOTIFY, {"channel": CONNECTIONS_CHANNEL, "payloads": payloads})

    async def save_servers(
        self,
        addresses: Mapping[str, tuple[str, int]],
        *,
        maintenance: Mapping[str, str | None] = MappingProxyType({}),
        identities: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        """Insert or update the rows of the known servers, which tenants refer to.

        Args:
            addresses: Host and port of each server, by name; credentials stay in the configuration.
            maintenance: The database in which each server's administrator takes advisory locks, where it is known.
            identities: Which cluster each server is, where it is known; one that is recorded stays.

        Raises:
            ConfigurationError: another process takes a server's locks in another database. Nothing is changed.
        """
        refuse_while_bound("changing servers")
        async with self.transaction() as connection:
            # in one order, so that two processes that open do not wait for each other
            for name, (host, port) in sorted(addresses.items()):
                database = maintenance.get(name)
                added = insert(servers).values(
                    name=name, host=host, port=port, maintenance_database=database, identity=identities.get(name)
                )
                # the row of a server that has its addresses itself is changed by command alone
                own = servers.c.sealed_addresses.is_not(None)
                changes = {
                    "host": case((own, servers.c.host), else_=added.excluded.host),
                    "port": case((own, servers.c.port), else_=added.excluded.port),
                    "maintenance_database": func.coalesce(
                        servers.c.maintenance_database, added.excluded.maintenance_database
                    ),
                    "identity": func.coalesce(servers.c.identity, added.excluded.identity),
                }
                saved = added.on_conflict_do_update(index_elements=["name"], set_=changes)
                recorded = await connection.scalar(saved.returning(servers.c.maintenance_database))
                if database is not None and recorded != database:
                    raise ConfigurationError(
                        f"the administrative URL of server {name!r} names the database {database!r}, and locks on this "
                        f"server are taken in {recorded!r}: name that one; to change it, stop every process and run: "
                        f"tenancy servers set-maintenance-database {name} {database}"
                    )


def _cache_size(dsn: Dsn) -> dict[str, int]:
    """SQLAlchemy's argument for its cache of prepared statements."""
    name = "prepared_statement_cache_size"
    size = dsn.client_size(name)
    return {} if size is None else {name: size}


def _alembic_config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


@functools.cache
def _own_revisions() -> tuple[str, ...]:
    """The revisions of this package's own migrations, the newest first, read once."""
    script = ScriptDirectory.from_config(_alembic_config())
    return tuple(found.revision for found in script.walk_revisions())


def head() -> str | None:
    """The newest revision."""
    return next(iter(_own_revisions()), None)


def _refuse_later(revisions: Sequence[str | None]) -> None:
    """Refuse a schema at a revision of a later version of this package."""
    own = _own_revisions()
    if later := [revision for revision in revisions if revision is not None and revision not in own]:
        raise ControlSchemaError(
            f"the control database is at revision {later[0]}, which this version of tenancy_orm does not have: a later "
            "one has upgraded it; install that version"
        )


def _migrate(connection: Connection, revision: str) -> None:
    with proxies_restored():
        command.upgrade(_alembic_config(connection), revision)
