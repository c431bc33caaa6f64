"""Connections to the databases of the fleet, as the owner of every tenant's schema."""

from __future__ import annotations

from sqlalchemy.engine import URL

from ..control.database import is_unavailable
from ..errors import ServerUnavailableError, TenantNotFoundError
from ..postgres.connections import Connection
from ..postgres.errors import TOO_MANY_CONNECTIONS, sqlstate_of
from ..routing.marker import marker_text
from ..tenant import Placement, Tenant
from .database import ConnectionAdapter, Limits, Target
from .services import FleetServices

_FAILURES = 2  # connects in a row that fail before a server's other tenants are not tried any more


class Health:
    """Which servers do not answer, within one run: the tenants left on one fail at once, and the others do not wait."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}

    def check(self, server: str, tenant: str | None) -> None:
        """Refuse to connect to a server that is down.

        Raises:
            ServerUnavailableError: it is.
        """
        if self._failures.get(server, 0) >= _FAILURES:
            raise ServerUnavailableError(server=server, tenant=tenant)

    def failed(self, server: str) -> None:
        """A connect failed; the second one in a row means that the server is down."""
        self._failures[server] = self._failures.get(server, 0) + 1

    def answered(self, server: str) -> None:
        """A connect succeeded."""
        self._failures[server] = 0

    def down(self, server: str) -> None:
        """The server is down."""
        self._failures[server] = _FAILURES


class Connections:
    """Connects to tenants' databases.

    Args:
        services: The parts of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        self._services = services
        self._adapters: dict[str, ConnectionAdapter] = {}
        config = services.config
        self.limits = Limits(
            connect=config.pool.connect_timeout, wait=config.migration.wait, total=config.migration.timeout
        )

    def adapter(self, server: str) -> ConnectionAdapter:
        """What makes SQLAlchemy connections for databases of ``server``."""
        return self._adapters.setdefault(server, ConnectionAdapter())

    def url(self, server: str, database: str) -> URL:
        """The URL of a database, for people to read: it has neither user nor password."""
        address = self._services.servers[server]
        return URL.create("postgresql+asyncpg", host=address.host, port=address.port, database=database)

    def target(self, tenant: Tenant, health: Health) -> Target:
        """A tenant's database, as something to migrate."""
        placement = placement_of(tenant)
        return Target(
            label=tenant.slug,
            url=self.url(placement.server, placement.database),
            connect=lambda: self.connect(placement.server, placement.database, health, tenant=tenant.slug),
            tenant=tenant,
            marker=marker_text(self._services.names.installation, tenant.id),
        )

    async def connect(
        self, server: str, database: str | None, health: Health, *, tenant: str | None = None
    ) -> Connection:
        """Connect to ``database`` (the administrator's own where None).

        Raises:
            ServerUnavailableError: the server does not answer, or did not a moment ago.
            asyncpg.PostgresError: it refuses.
        """
        config, names = self._services.config, self._services.names
        health.check(server, tenant)
        # statement_timeout may have been set for the administrator's role; an index takes as long as it takes
        settings = {"lock_timeout": f"{round(config.migration.lock_timeout * 1000)}ms", "statement_timeout": "0"}
        try:
            connection = await self._services.provisioner.connect_admin(
                server, database, role=names.owner, settings=settings, timeout=config.pool.connect_timeout
            )
        except Exception as exc:
            if is_down(exc):
                health.failed(server)
            raise
        health.answered(server)
        return connection


def placement_of(tenant: Tenant) -> Placement:
    """Where a tenant's database is.

    Raises:
        TenantNotFoundError: it has been purged.
    """
    if tenant.placement is None:
        raise TenantNotFoundError(tenant.slug)
    return tenant.placement


def is_down(error: BaseException) -> bool:
    """Whether ``error`` says that a server does not answer at all, rather than that it is busy or refuses."""
    if sqlstate_of(error) == TOO_MANY_CONNECTIONS:
        return False
    return isinstance(error, ServerUnavailableError) or is_unavailable(error)
