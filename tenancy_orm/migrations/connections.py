"""Connections to tenants' databases, as the role that owns their schemas."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import URL

from ..control.database import is_unavailable
from ..errors import (
    ExtensionUnavailableError,
    MigrationError,
    ServerUnavailableError,
    TemplateError,
)
from ..postgres.connections import Connection
from ..postgres.errors import TOO_MANY_CONNECTIONS, sqlstate_of
from ..routing.marker import marker_text
from ..tenant import Tenant, placement_of
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
_LATELY = 30.0  # for how many seconds an outage explains what fails after it
_SERVER = "SELECT pg_catalog.pg_postmaster_start_time() AS started, pg_catalog.pg_is_in_recovery() AS is_standby"


@dataclass(slots=True)
class _ServerHealth:
    """What a run knows of one server; times are of ``time.monotonic``."""

    failures: int = 0  # failed connects in a row
    tried: float = -math.inf  # when it was tried last while it was down
    has_answered: bool = False
    down_since: float | None = None  # where it has answered before
    is_silent: bool = False  # whether it was asked itself, and does not answer
    silent_until: float = -math.inf  # when it has answered again after that
    odd: int = 0  # tenants in a row that cannot be connected to, although it answers


class Health:
    """Which servers are down, in one run: their remaining tenants fail at once, so that the others need not wait.

    Args:
        patience: For how many seconds a server that has answered in this run is awaited once it is down. It may only be
            restarting. Nobody tries its tenants in that time.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self._patience = patience
        self._servers: defaultdict[str, _ServerHealth] = defaultdict(_ServerHealth)

    @property
    def unreached(self) -> frozenset[str]:
        """The servers that are down, as far as this process knows, and not awaited."""
        return frozenset(name for name, one in self._servers.items() if one.failures >= _FAILURES) - self.awaited

    @property
    def awaited(self) -> frozenset[str]:
        """The servers that are down, and were not for ``patience``."""
        return frozenset(name for name in self._servers if self.has_gone(name) and self.may_await(name))

    def may_await(self, server: str) -> bool:
        """Whether this server is awaited where it is down."""
        one = self._servers[server]
        if not self._patience or not one.has_answered:
            return False
        return one.down_since is None or time.monotonic() - one.down_since < self._patience

    def has_gone(self, server: str) -> bool:
        """Whether a server that has answered is down now."""
        return self._servers[server].down_since is not None

    def was_down(self, server: str, since: float) -> bool:
        """Whether a server is down, or was down lately and since a time of ``time.monotonic``."""
        one = self._servers[server]
        return one.is_silent or one.silent_until >= max(since, time.monotonic() - _LATELY)

    def check(self, server: str, tenant: str | None) -> None:
        """Refuse to connect to a server that is down.

        Raises:
            ServerUnavailableError: the server is down.
        """
        one = self._servers[server]
        if one.failures < _FAILURES:
            return
        if time.monotonic() - one.tried < _PAUSE:
            raise ServerUnavailableError(server=server, tenant=tenant)
        one.tried = time.monotonic()

    def failed(self, server: str) -> None:
        """Count a failed connect; after the second one in a row the server is down, and from the first one awaited."""
        self._note(self._servers[server], self._servers[server].failures + 1)

    def answered(self, server: str) -> None:
        """Record that a connect succeeded. One to a server that is a standby yet says nothing; only ``back`` does."""
        one = self._servers[server]
        if not one.is_silent:
            one.odd = 0
            self.back(server)

    def back(self, server: str) -> None:
        """Record that a server answers. That changes nothing where its tenants still cannot be connected to."""
        one = self._servers[server]
        if one.odd >= _FAILURES:
            return
        one.has_answered, one.failures, one.down_since = True, 0, None
        if one.is_silent:
            one.is_silent, one.silent_until = False, time.monotonic()

    def silent(self, server: str) -> None:
        """Record that a server was asked itself and does not answer: it is not a tenant's connect alone that fails."""
        one = self._servers[server]
        one.is_silent, one.odd = True, 0
        self.failed(server)

    def odd(self, server: str) -> None:
        """Count a tenant that cannot be connected to although its server answers.

        After the second one in a row that server counts as one that has not answered: its others fail at once.
        """
        one = self._servers[server]
        one.odd += 1
        if one.odd >= _FAILURES:
            one.has_answered, one.down_since = False, None
            self.down(server)

    def down(self, server: str) -> None:
        """Record that the server is down."""
        self._note(self._servers[server], _FAILURES)

    @staticmethod
    def _note(one: _ServerHealth, failures: int) -> None:
        one.failures, one.tried = failures, time.monotonic()
        if one.has_answered and one.down_since is None:
            one.down_since = one.tried


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

    async def ask(self, server: str, health: Health) -> datetime:
        """Return when a server was started, and record that it answers.

        Raises:
            ServerUnavailableError: it does not answer, or is a standby: one that is to be promoted, for example.
            asyncpg.PostgresError: it refuses.
        """
        connection = await self._services.provisioner.connect_admin(server, None, purpose="tenancy-migration")
        try:
            row = await connection.fetchrow(_SERVER, timeout=self.limits.connect)
        finally:
            await close(connection)
        if row["is_standby"]:
            raise ServerUnavailableError(server=server)
        health.back(server)
        started: datetime = row["started"]
        return started

    async def reach(self, server: str, health: Health) -> datetime | None:
        """Ask whether a server answers, and record it; return when it was started, None where it does not."""
        try:
            return await self.ask(server, health)
        except Exception as exc:  # noqa: BLE001 - whatever it is, its tenants are not tried now
            logger.debug("server %s does not answer: %s", server, describe(exc))
            health.silent(server)
            return None


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
