"""Connections to tenants' databases, as the role that owns their schemas."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from sqlalchemy.engine import URL

from ..control.database import is_unavailable
from ..errors import (
    ExtensionUnavailableError,
    MigrationError,
    ServerUnavailableError,
    TemplateError,
    TenantNotFoundError,
)
from ..postgres.connections import Connection
from ..postgres.errors import TOO_MANY_CONNECTIONS, sqlstate_of
from ..routing.marker import marker_text
from ..tenant import Placement, Tenant
from .data_batches import DataLimits
from .database import ConnectionAdapter, Target, close
from .extensions import WantedExtensions
from .failures import describe
from .limits import Limits
from .logs import logger
from .services import FleetServices
from .timeouts import milliseconds

_FAILURES = 2  # failed connects in a row after which a server's other tenants are not tried
_PAUSE = 5.0  # for so many seconds; one of them is tried then


class Health:
    """Which servers are down, in one run: their remaining tenants fail at once, so that the others need not wait.

    Args:
        patience: For how many seconds a server that has answered in this run is awaited once it is down. It may only be
            restarting. Nobody tries its tenants in that time.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self._patience = patience
        self._failures: dict[str, int] = {}
        self._tried: dict[str, float] = {}  # when a server that is down was tried last
        self._known: set[str] = set()  # those that have answered
        self._since: dict[str, float] = {}  # since when those of them are down that are

    @property
    def unreached(self) -> frozenset[str]:
        """The servers that are down, as far as this process knows, and not awaited."""
        down = frozenset(server for server, number in self._failures.items() if number >= _FAILURES)
        return down - self.awaited

    @property
    def awaited(self) -> frozenset[str]:
        """The servers that are down, and were not for ``patience``."""
        return frozenset(server for server in self._since if self.may_await(server))

    def may_await(self, server: str) -> bool:
        """Whether this server is awaited where it is down."""
        if not self._patience or server not in self._known:
            return False
        now = time.monotonic()
        return now - self._since.get(server, now) < self._patience

    def check(self, server: str, tenant: str | None) -> None:
        """Refuse to connect to a server that is down.

        Raises:
            ServerUnavailableError: the server is down.
        """
        if self._failures.get(server, 0) < _FAILURES:
            return
        if time.monotonic() - self._tried.get(server, -math.inf) < _PAUSE:
            raise ServerUnavailableError(server=server, tenant=tenant)
        self._tried[server] = time.monotonic()

    def failed(self, server: str) -> None:
        """Count a failed connect; after the second one in a row the server is down, and from the first one awaited."""
        self._failures[server] = self._failures.get(server, 0) + 1
        self._note(server)

    def answered(self, server: str) -> None:
        """Record that a connect succeeded."""
        self._failures[server] = 0
        self._known.add(server)
        self._since.pop(server, None)

    def down(self, server: str) -> None:
        """Record that the server is down."""
        self._failures[server] = _FAILURES
        self._note(server)

    def _note(self, server: str) -> None:
        now = self._tried[server] = time.monotonic()
        if server in self._known:
            self._since.setdefault(server, now)


class Connections:
    """Connects to tenants' databases.

    Args:
        services: The services of an open ``Tenancy``.
    """

    def __init__(self, services: FleetServices) -> None:
        self._services = services
        self._adapters: dict[str, ConnectionAdapter] = {}
        config = services.config
        self.limits = Limits(
            connect=config.pool.connect_timeout,
            wait=config.migration.wait,
            total=config.migration.timeout,
            attempts=config.migration.attempts,
            pause=config.migration.retry_pause,
            longest_pause=config.migration.max_retry_pause,
            statement=config.migration.statement_timeout,
            notice=config.migration.notice,
            preflight=config.migration.preflight_timeout,
            data=DataLimits.of(config.migration),
        )

    def adapter(self, server: str) -> ConnectionAdapter:
        """Return the adapter that makes SQLAlchemy connections for databases of ``server``."""
        if server not in self._adapters:
            self._adapters[server] = ConnectionAdapter()
        return self._adapters[server]

    def url(self, server: str, database: str) -> URL:
        """Return the URL of a database, for messages: it has neither user nor password."""
        address = self._services.servers[server]
        return URL.create("postgresql+asyncpg", host=address.host, port=address.port, database=database)

    def target(self, tenant: Tenant, health: Health) -> Target:
        """Return a tenant's database as a migration target."""
        placement = placement_of(tenant)

        async def install(names: Sequence[str]) -> None:
            await self._services.provisioner.extensions.install(placement.server, placement.database, names)

        return Target(
            label=tenant.slug,
            url=self.url(placement.server, placement.database),
            connect=lambda: self.connect(placement.server, placement.database, health, tenant=tenant.slug),
            tenant=tenant,
            connect_watch=lambda: self._services.provisioner.connect_admin(
                placement.server, placement.database, purpose="tenancy-lock-watch"
            ),
            marker=marker_text(self._services.names.installation, tenant.id),
            extensions=WantedExtensions(self._services.config.extensions, install),
        )

    async def connect(
        self, server: str, database: str | None, health: Health, *, tenant: str | None = None
    ) -> Connection:
        """Connect to ``database`` (the administrator's own where None).

        Raises:
            ServerUnavailableError: the server does not answer, or is known to be down.
            asyncpg.PostgresError: the server refuses.
        """
        config, names = self._services.config, self._services.names
        health.check(server, tenant)
        # the administrator's role may have a statement_timeout; building an index must not be bounded by it
        settings = {
            "lock_timeout": milliseconds(config.migration.lock_timeout),
            "statement_timeout": milliseconds(config.migration.statement_timeout),
        }
        try:
            connection = await self._services.provisioner.connect_admin(
                server, database, role=names.owner, settings=settings, purpose="tenancy-migration"
            )
        except Exception as exc:
            if is_down(exc):
                health.failed(server)
            raise
        health.answered(server)
        return connection

    async def reach(self, server: str, health: Health) -> bool:
        """Ask whether a server that is down answers again, and record it. It may refuse for another reason then."""
        try:
            connection = await self._services.provisioner.connect_admin(server, None, purpose="tenancy-migration")
        except Exception as exc:  # noqa: BLE001 - whatever else it is, is the next tenant's error
            if is_down(exc):
                health.failed(server)
                return False
        else:
            await close(connection)
        health.answered(server)
        return True


def placement_of(tenant: Tenant) -> Placement:
    """Return a tenant's placement.

    Raises:
        TenantNotFoundError: the tenant has been purged.
    """
    if tenant.placement is None:
        raise TenantNotFoundError(tenant.slug)
    return tenant.placement


def is_down(error: BaseException) -> bool:
    """Whether ``error`` means that a server does not answer at all, and not that it is busy or refuses."""
    if sqlstate_of(error) == TOO_MANY_CONNECTIONS:
        return False
    return isinstance(error, ServerUnavailableError) or is_unavailable(error)


async def prepare_servers(names: Iterable[str], prepare: Callable[[str], Awaitable[None]], health: Health) -> None:
    """Prepare the servers of a run, before a tenant is touched. Those that do not answer are recorded in ``health``.

    Raises:
        MigrationError: a template could not be built, or a server lacks an extension.
    """
    names = tuple(names)
    errors = await asyncio.gather(*(prepare(name) for name in names), return_exceptions=True)
    for name, error in zip(names, errors, strict=True):
        if error is None:
            continue
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, ExtensionUnavailableError):
            raise MigrationError(f"no tenant was touched: {describe(error)}") from error
        if isinstance(error, MigrationError | TemplateError):
            raise MigrationError(
                f"the template could not be built, no tenant was touched: {describe(error)}"
            ) from error
        if not is_down(error):
            raise error
        logger.error("server %s does not answer: %s", name, describe(error))
        health.down(name)
