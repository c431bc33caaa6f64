"""Short-lived logins to one tenant's database, for a command, a program or an operation.

A temporary login is a role that is a member of the tenant's role, and begins each session by ``SET ROLE`` to it. It has
no right of its own: it may do what the tenant's role may, what it creates belongs to that role, and where that role
loses its right to connect (suspension, deletion) it has none either. From the expiry on, PostgreSQL refuses its
password; ``reconcile``, and so housekeeping, then ends its sessions and drops it. So a killed process leaves nothing
that lasts.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import asyncpg

from ...audit.actor import SYSTEM, Actor
from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...context import refuse_other_tenant
from ...control.names import Names
from ...errors import ConfigurationError, DatabaseExistsError, ProvisioningError, TenancyError
from ...loops import HomeLoop
from ...postgres import connections
from ...postgres.connections import Connection
from ...postgres.dsn import Dsn
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...postgres.quoting import quote_identifier, quote_literal
from ...registry.lifecycle import check_usable
from ...registry.registry import Registry
from ...secrets.keyring import new_password
from ...servers import Server, Servers
from ...tenant import Tenant, placement_of
from ..rights import role_settings
from ..server_objects import removal, roles
from ..server_objects.blockers import Blockers
from ..server_objects.scram import scram_verifier

logger = logging.getLogger("tenancy_orm.provisioning")

LONGEST_SECONDS = 7 * 86_400.0
"""For how long a temporary login may be valid, in seconds."""
DEFAULT_SECONDS = 600.0
"""For how long it is valid by default, in seconds."""
DEFAULT_CONNECTIONS = 5
"""How many connections it may have at once, by default."""

_ATTEMPTS = 5  # names are random, and short
_ATTRIBUTES = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE INHERIT NOREPLICATION NOBYPASSRLS"
# expired, ended, or with an expiry that this package does not give
_OVER = """
SELECT rolname::text AS name FROM pg_roles
 WHERE starts_with(rolname::text, $1) AND rolname ~ '_[a-z2-7]{6}$'
   AND (NOT rolcanlogin OR rolvaliduntil IS NULL OR rolvaliduntil <= clock_timestamp() OR rolvaliduntil = 'infinity')
"""
# that name a role: after a restore, a tenant's database has another name than its role
_DATABASES = """
SELECT DISTINCT d.datname::text FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid
  JOIN pg_roles r ON s.refclassid = 'pg_authid'::regclass AND s.refobjid = r.oid WHERE r.rolname = $1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporaryLogin:
    """A login to one tenant's database.

    Attributes:
        tenant: The tenant.
        role: The name of the login.
        password: Its password; neither in the ``repr`` nor stored anywhere.
        database: The only database that it can connect to.
        server: The server's name.
        expires_at: When PostgreSQL refuses it, by the server's clock.
    """

    tenant: Tenant
    role: str
    password: str = field(repr=False)
    database: str
    server: str
    expires_at: datetime
    _dsn: Dsn = field(repr=False)
    _purpose: str = field(repr=False)

    @property
    def url(self) -> str:
        """A URL with the password, as ``postgresql://``. Give it to a program by its environment, never by argument."""
        return self._dsn.uri(user=self.role, password=self.password, database=self.database, purpose=self._purpose)

    def environment(self) -> dict[str, str]:
        """Return ``DATABASE_URL`` and libpq's variables, the password included."""
        libpq = self._dsn.environment(user=self.role, database=self.database, purpose=self._purpose)
        return {**libpq, "PGPASSWORD": self.password, "DATABASE_URL": self.url}


class TemporaryLogins:
    """Makes and removes temporary logins (``tenancy.internals.provisioner.logins``).

    Args:
        config: ``provisioning.role_settings`` and ``provisioning.timeout`` are read from it.
        registry: The tenants, and the audit log.
        servers: The servers by name.
        names: Of this installation.
        blockers: Returns the ``Blockers`` of a server.
    """

    def __init__(
        self,
        config: TenancyConfig,
        registry: Registry,
        servers: Servers,
        names: Names,
        blockers: Callable[[Server], Blockers],
    ) -> None:
        self._config = config
        self._registry = registry
        self._servers = servers
        self._names = names
        self._blockers = blockers
        self._home = HomeLoop()

    async def issue(
        self,
        tenant: Tenant,
        *,
        seconds: float = DEFAULT_SECONDS,
        connection_limit: int = DEFAULT_CONNECTIONS,
        purpose: str = "tenancy-login",
        actor: Actor = SYSTEM,
    ) -> TemporaryLogin:
        """Make a login that ends by itself, and record it in the audit log.

        Args:
            tenant: The tenant.
            seconds: For how long it is valid.
            connection_limit: How many connections it may have at once, beside those of the tenant's role.
            purpose: What it is for: the application_name of its sessions, and in the audit log.
            actor: Who gets it.

        Raises:
            ConfigurationError: ``seconds`` or ``connection_limit`` is no such value.
            TenantUnavailableError: the tenant's status admits no sessions; maintenance does.
            TenantNotFoundError: the tenant has been purged.
            ProvisioningError: the server refused, or did not finish in time.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant)
        self._home.check()
        if not 1 <= seconds <= LONGEST_SECONDS:
            raise ConfigurationError(f"a temporary login is valid for 1 second to {LONGEST_SECONDS / 86_400:g} days")
        if not 1 <= connection_limit <= 1_000:
            raise ConfigurationError("connection_limit must be 1 to 1000")
        current = await self._registry.get(tenant.id)
        check_usable(current, operator=True)
        place, password = placement_of(current), new_password()
        # the login's programs get none of the administrator's credentials
        dsn = self._servers[place.server].dsn.without_service()
        verifier = scram_verifier(password)
        async with self._connected(current) as (connection, blockers):
            statements = partial(_statements, connection, place.role, verifier, connection_limit)
            settings = await role_settings.resolve(connection, self._config.provisioning.role_settings)
            create = partial(_create, connection, self._names, current, place.role, seconds, statements, settings)
            name, expires_at = await blockers.run(connection, create)
        login = TemporaryLogin(
            tenant=current,
            role=name,
            password=password,
            database=place.database,
            server=place.server,
            expires_at=expires_at,
            _dsn=dsn,
            _purpose=purpose,
        )
        try:
            detail = {"role": name, "purpose": purpose, "expires_at": expires_at}
            await self._registry.record(current.id, "tenant.login", detail=detail, actor=actor)
        except BaseException:
            await run_to_completion(self._try_to_drop(login))
            raise
        return login

    @asynccontextmanager
    async def open(
        self,
        tenant: Tenant,
        *,
        seconds: float = DEFAULT_SECONDS,
        connection_limit: int = DEFAULT_CONNECTIONS,
        purpose: str = "tenancy-login",
        actor: Actor = SYSTEM,
    ) -> AsyncIterator[TemporaryLogin]:
        """Make a login for the body, however long that takes: ``async with logins.open(tenant) as login``.

        It is prolonged before it expires, and dropped at the end, with its sessions. If this process is killed, it
        expires ``seconds`` later at most.

        Raises:
            TenancyError: as ``issue``.
        """
        login = await self.issue(
            tenant, seconds=seconds, connection_limit=connection_limit, purpose=purpose, actor=actor
        )
        renewal = asyncio.create_task(self._renew_repeatedly(login, seconds), name="tenancy-renew-login")
        try:
            yield login
        finally:
            renewal.cancel()
            await run_to_completion(self._finish(renewal, login))

    async def drop(self, tenant: Tenant, role: str) -> None:
        """End a temporary login of this tenant, with its sessions, and drop it. Does nothing if there is none.

        Raises:
            ConfigurationError: this is no name of a temporary login of the tenant.
            ProvisioningError: the server refused, or did not finish in time; ``reconcile`` repeats it.
            ServerUnavailableError: the server does not answer.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant)
        self._home.check()
        own = None if tenant.placement is None else tenant.placement.role
        if own is None or self._names.role_of(role) != own or role == own:
            raise ConfigurationError(f"role {role!r} is no temporary login of tenant {tenant.slug!r}")
        async with self._connected(tenant) as (connection, blockers):
            await drop(connection, blockers, self._names, role)

    async def _finish(self, renewal: asyncio.Task[None], login: TemporaryLogin) -> None:
        await asyncio.wait((renewal,))
        await self._try_to_drop(login)

    async def _try_to_drop(self, login: TemporaryLogin) -> None:
        try:
            async with self._connected(login.tenant) as (connection, blockers):
                await drop(connection, blockers, self._names, login.role)
        except TenancyError as exc:
            logger.warning("temporary login %s was not dropped; reconcile will drop it: %s", login.role, exc)

    async def _renew_repeatedly(self, login: TemporaryLogin, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds / 3)
            try:
                async with self._connected(login.tenant) as (connection, _):
                    await _prolong(connection, login.role, seconds)
            except (TenancyError, *SERVER_FAILURES) as exc:
                logger.warning("temporary login %s was not prolonged: %s", login.role, describe(exc))

    @asynccontextmanager
    async def _connected(self, tenant: Tenant) -> AsyncIterator[tuple[Connection, Blockers]]:
        """An administrative connection to the tenant's server, for a limited time."""
        blockers = self._blockers(self._servers[placement_of(tenant).server])
        timeout = self._config.provisioning.timeout
        try:
            async with asyncio.timeout(timeout):
                connection = await blockers.connect(purpose="tenancy-login")
                try:
                    yield connection, blockers
                finally:
                    await run_to_completion(connections.close(connection))
        except SERVER_FAILURES as exc:
            raise ProvisioningError(
                f"the temporary login for tenant {tenant.slug!r} failed on its server "
                f"({type(exc).__name__}, {getattr(exc, 'sqlstate', None)})",
                tenant=tenant.slug,
                step="login",
            ) from exc


async def find_over(connection: Connection, names: Names) -> list[str]:
    """Return the temporary logins that have expired or were ended, by name."""
    rows = await connection.fetch(_OVER, names.tenant_stem)
    return [row["name"] for row in rows if names.role_of(row["name"]) not in (None, row["name"])]


async def drop(connection: Connection, blockers: Blockers, names: Names, role: str) -> None:
    """End a temporary login and its sessions, give what it owns to the tenant's role, and drop it.

    Raises:
        TimeoutError: its sessions did not end in time.
        asyncpg.PostgresError: PostgreSQL refuses.
    """
    try:
        await blockers.run(connection, partial(roles.expire, connection, role), role=role)
    except ProvisioningError:
        return  # there is none
    await roles.terminate(connection, role, timeout=connections.CLOSE_SECONDS)
    try:
        await blockers.run(connection, partial(roles.drop, connection, role))
    except asyncpg.DependentObjectsStillExistError:
        # a session has left the tenant's role (SET ROLE NONE) and created something, or was granted something
        await _give_away(connection, blockers, names, role)
        await removal.remove_role(connection, blockers, names, role)


async def _give_away(connection: Connection, blockers: Blockers, names: Names, role: str) -> None:
    """Give what a temporary login owns in the tenant's databases to the tenant's role."""
    owner = names.role_of(role)
    assert owner is not None  # noqa: S101 - for the type checker
    for (database,) in await connection.fetch(_DATABASES, role):
        with suppress(TenancyError, asyncpg.InvalidCatalogNameError, asyncpg.ObjectNotInPrerequisiteStateError):
            inside = await blockers.connect(database)
            try:
                async with roles.joined(inside, role, owner):
                    give = (
                        f"REASSIGN OWNED BY {quote_identifier(role)} TO {quote_identifier(owner)}; "
                        f"DROP OWNED BY {quote_identifier(role)}"
                    )
                    await blockers.run(inside, partial(inside.execute, give))
            finally:
                await run_to_completion(connections.close(inside))


async def _create(
    connection: Connection,
    names: Names,
    tenant: Tenant,
    owner: str,
    seconds: float,
    statements: Callable[[str, datetime], list[str]],
    settings: role_settings.RoleSettings,
) -> tuple[str, datetime]:
    expires_at: datetime = await connection.fetchval(
        "SELECT clock_timestamp() + make_interval(secs => $1)", float(seconds)
    )
    # to name a role in a setting one must be able to SET ROLE to it
    async with roles.joined(connection, owner):
        for _ in range(_ATTEMPTS):
            name = names.login(owner, _token())
            try:
                await connection.execute("; ".join([*statements(name, expires_at), *settings.statements(name)]))
            except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
                continue  # another login has that name
            return name, expires_at
    raise DatabaseExistsError(f"the names of {_ATTEMPTS} temporary logins for tenant {tenant.slug!r} were all taken")


def _statements(
    connection: Connection, owner: str, verifier: str, connection_limit: int, name: str, expires_at: datetime
) -> list[str]:
    role, granted = quote_identifier(name), quote_identifier(owner)
    until = f"PASSWORD {quote_literal(verifier)} VALID UNTIL {quote_literal(expires_at.isoformat())}"
    # by the right of the tenant's role to connect it can connect, as long as that role has it
    options = " WITH INHERIT TRUE, SET TRUE, ADMIN FALSE" if connections.version(connection) >= 16 else ""
    return [
        f"CREATE ROLE {role} {_ATTRIBUTES} CONNECTION LIMIT {int(connection_limit)} {until}",
        f"GRANT {granted} TO {role}{options}",
        f"ALTER ROLE {role} SET role TO {quote_literal(owner)}",
    ]


async def _prolong(connection: Connection, role: str, seconds: float) -> None:
    """Move a login's expiry; one that was ended or dropped stays so."""
    expires_at: datetime | None = await connection.fetchval(
        "SELECT clock_timestamp() + make_interval(secs => $2) FROM pg_roles "
        "WHERE rolname = $1 AND rolcanlogin AND rolvaliduntil > '-infinity'",
        role,
        float(seconds),
    )
    if expires_at is not None:
        with suppress(asyncpg.UndefinedObjectError):
            until = quote_literal(expires_at.isoformat())
            await connection.execute(f"ALTER ROLE {quote_identifier(role)} VALID UNTIL {until}")


def _token() -> str:
    return base64.b32encode(secrets.token_bytes(4)).decode("ascii").lower()[:6]


__all__ = [
    "DEFAULT_CONNECTIONS",
    "DEFAULT_SECONDS",
    "LONGEST_SECONDS",
    "TemporaryLogin",
    "TemporaryLogins",
    "drop",
    "find_over",
]
