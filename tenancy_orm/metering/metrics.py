"""Metrics of each tenant's database, sampled in the background: size, connections, transactions, errors.

``pg_database_size`` walks a database's files: 0.5 s for a thousand databases. It is never called on the path of a
request. The last sample is read from ``tenancy.tenant_metrics``, and its size is the usage of a storage quota.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.lookup import resolve_tenant_id
from ..errors import ControlUnavailableError, RoutingError
from ..postgres.errors import without_detail
from ..postgres.failures import SERVER_FAILURES
from ..provisioning import Provisioner
from ..quotas.manager import QuotaManager
from ..tenant import Tenant

logger = logging.getLogger("tenancy_orm.metrics")

STORAGE = "storage_bytes"


@dataclass(frozen=True, slots=True)
class TenantSample:
    """One sample of a tenant's database.

    Args:
        tenant_id: The tenant.
        sampled_at: When it was taken, UTC.
        size_bytes: Size on disk.
        connections: How many connections were open to it.
        queries: Transactions that ended (committed or rolled back) since PostgreSQL's statistics were last reset.
        errors: Deadlocks, conflicts with recovery, and sessions that ended abnormally, since then.
    """

    tenant_id: UUID
    sampled_at: datetime
    size_bytes: int
    connections: int
    queries: int
    errors: int


@dataclass(frozen=True, slots=True)
class ActiveTenant:
    """A tenant in use, with its last sample (None before the first one)."""

    id: UUID
    slug: str
    status: str
    tier: str
    server: str
    created_at: datetime
    sample: TenantSample | None


@dataclass(frozen=True, slots=True)
class TierShare:
    """How many tenants a tier has, without purged ones."""

    tier: str
    tenants: int
    active: int
    trials: int
    suspended: int


@dataclass(frozen=True, slots=True)
class WarmCount:
    """How many warm databases a server has: ``ready`` for a tenant, and ``incomplete``, being made or dropped."""

    server: str
    ready: int
    incomplete: int


@dataclass(frozen=True, slots=True)
class SampleReport:
    """The result of one run of the sampler: tenants sampled, and servers that did not answer."""

    sampled: int
    unavailable: tuple[str, ...]


class TenantMetrics:
    """Reads samples, and counts tenants of the registry."""

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def history(
        self, tenant: str | UUID | Tenant, *, since: datetime | None = None, limit: int = 1_000
    ) -> list[TenantSample]:
        """Return a tenant's samples taken at ``since`` or later, newest first.

        Raises:
            TenantNotFoundError: no tenant has this slug.
            CrossTenantError: another tenant is bound.
        """
        tenant_id = await resolve_tenant_id(self._control, tenant)
        async with self._control.viewing(tenant_id) as connection:
            parameters = {"tenant_id": tenant_id, "since": since, "limit": limit}
            rows = (await connection.execute(_HISTORY, parameters)).all()
        return [TenantSample(*row) for row in rows]

    async def active_tenants(self, *, limit: int = 100, after: UUID | None = None) -> list[ActiveTenant]:
        """Return tenants in use with their last sample, in order of creation, beginning after the id ``after``.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing tenants")
        async with self._control.connect() as connection:
            rows = (await connection.execute(_ACTIVE, {"limit": limit, "after": after})).all()
        return [_active(row) for row in rows]

    async def tier_distribution(self) -> list[TierShare]:
        """Return how many tenants each tier has, in ascending order of rank.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("counting tenants")
        async with self._control.connect() as connection:
            return [TierShare(*row) for row in (await connection.execute(_TIERS)).all()]

    async def warm_databases(self) -> list[WarmCount]:
        """Return how many warm databases each server has, by name. It asks the control database alone.

        ``tenancy.warm_pool.status()`` asks the servers as well, and counts those that a creation could claim now.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("counting warm databases")
        async with self._control.connect() as connection:
            return [WarmCount(*row) for row in (await connection.execute(_WARM)).all()]

    async def prune(self, *, days: float = 90) -> int:
        """Remove samples older than this many days; returns how many.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("removing samples")
        async with self._control.transaction() as connection:
            return int((await connection.execute(_PRUNE, {"days": days})).rowcount)


class StorageSampler:
    """Samples every tenant's database.

    Args:
        control: The control database, which stores the samples.
        quotas: Counts the size as the usage of ``storage_bytes``, and emits events for its soft limits.
        provisioner: Connects to the servers as their administrators.
        chunk: How many databases one query measures; it bounds the time that a query keeps the disk busy.
        timeout: How long one query may take, in seconds.
    """

    def __init__(
        self,
        control: ControlDatabase,
        quotas: QuotaManager,
        provisioner: Provisioner,
        *,
        chunk: int = 100,
        timeout: float = 30.0,
    ) -> None:
        self._control = control
        self._quotas = quotas
        self._provisioner = provisioner
        self._chunk = chunk
        self._timeout = timeout

    async def run(self, *, unless_within: float = 0.0) -> SampleReport:
        """Sample every tenant once, all servers at the same time. The report names servers that did not answer.

        Args:
            unless_within: Do nothing if any process sampled less than this many seconds ago.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("sampling tenants")
        async with self._control.connect() as connection:
            if unless_within and await connection.scalar(_RECENT, {"seconds": unless_within}):
                return SampleReport(0, ())
            rows = (await connection.execute(_DATABASES)).all()
        servers: dict[str, dict[str, UUID]] = {}
        for row in rows:
            servers.setdefault(row.server, {})[row.database_name] = row.id
        work = (self._sample_server(name, found) for name, found in servers.items())
        counts: dict[str, int | None] = {}
        # all of them end before an error is raised, so that none is still running when the caller gets it
        for name, count in zip(servers, await asyncio.gather(*work, return_exceptions=True), strict=True):
            if isinstance(count, BaseException):
                raise count
            counts[name] = count
        missing = tuple(name for name, count in counts.items() if count is None)
        return SampleReport(sum(count or 0 for count in counts.values()), missing)

    async def run_every(self, seconds: float) -> None:
        """Sample every so many seconds until cancelled; of several processes, one at a time.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("sampling tenants")
        self._control.home.check()
        while True:
            try:
                await self.run(unless_within=seconds * 0.75)
            except ControlUnavailableError as exc:
                logger.warning("tenants could not be sampled: %s", exc)
            except Exception as exc:
                # whatever it is, the next sample must still be taken
                logger.error("tenants could not be sampled", exc_info=without_detail(exc))
            await asyncio.sleep(seconds)

    async def _sample_server(self, server: str, databases: dict[str, UUID]) -> int | None:
        names = sorted(databases)
        try:
            async with asyncio.timeout(self._timeout):
                connection = await self._provisioner.connect_admin(server)
        except (RoutingError, *SERVER_FAILURES) as exc:
            logger.warning("server %s could not be sampled: %s", server, type(exc).__name__)
            return None
        sampled = 0
        try:
            for start in range(0, len(names), self._chunk):
                chunk = names[start : start + self._chunk]
                samples = await connection.fetch(_SAMPLE, chunk, timeout=self._timeout)
                # without a size its files are gone already: it is being dropped
                found = [(databases[row["datname"]], row) for row in samples if row["size_bytes"] is not None]
                await self._store(found)
                sampled += len(found)
        except SERVER_FAILURES as exc:
            logger.warning("server %s could be sampled in part only: %s", server, type(exc).__name__)
            return None
        except ControlUnavailableError:
            raise
        except Exception as exc:
            # the other servers are still sampled
            logger.error("server %s could be sampled in part only", server, exc_info=without_detail(exc))
            return None
        finally:
            connection.terminate()
        return sampled

    async def _store(self, samples: Sequence[tuple[UUID, Any]]) -> None:
        values = [
            {
                "tenant_id": tenant_id,
                "size": row["size_bytes"],
                "connections": row["connections"],
                "queries": row["queries"],
                "errors": row["errors"],
            }
            for tenant_id, row in samples
        ]
        if not values:
            return
        async with self._control.transaction() as connection:
            await connection.execute(_STORE, values)
        await self._quotas.measure_many(STORAGE, {tenant_id: row["size_bytes"] for tenant_id, row in samples})


_DATABASES = text(
    "SELECT id, server, database_name FROM tenancy.tenants "
    "WHERE status IN ('trial', 'active', 'suspended', 'maintenance', 'deleted') ORDER BY server, id"
)
_RECENT = text(
    "SELECT max(sampled_at) > statement_timestamp() - make_interval(secs => :seconds) FROM tenancy.tenant_metrics"
)
# PostgreSQL's own counters; every one of these columns exists from version 14 on
_SAMPLE = """
SELECT d.datname, pg_database_size(d.oid) AS size_bytes, s.numbackends AS connections,
    s.xact_commit + s.xact_rollback AS queries,
    s.deadlocks + s.conflicts + s.sessions_abandoned + s.sessions_fatal + s.sessions_killed AS errors
FROM pg_database AS d JOIN pg_stat_database AS s ON s.datid = d.oid
WHERE d.datname = ANY($1::text[])
"""
_STORE = text(
    "INSERT INTO tenancy.tenant_metrics (tenant_id, sampled_at, size_bytes, connections, queries, errors) "
    "SELECT id, statement_timestamp(), :size, :connections, :queries, :errors FROM tenancy.tenants "
    "WHERE id = :tenant_id ON CONFLICT DO NOTHING"
)
_HISTORY = text(
    "SELECT tenant_id, sampled_at, size_bytes, connections, queries, errors FROM tenancy.tenant_metrics "
    "WHERE tenant_id = :tenant_id AND (CAST(:since AS timestamptz) IS NULL OR sampled_at >= :since) "
    "ORDER BY sampled_at DESC LIMIT :limit"
)
_ACTIVE = text(
    "SELECT * FROM tenancy.active_tenants WHERE CAST(:after AS uuid) IS NULL OR id > :after ORDER BY id LIMIT :limit"
)
_TIERS = text("SELECT tier, tenants, active, trials, suspended FROM tenancy.tier_distribution ORDER BY rank, tier")
_WARM = text(
    "SELECT s.name, count(w.name) FILTER (WHERE w.state = 'ready'), count(w.name) FILTER (WHERE w.state <> 'ready') "
    "FROM tenancy.servers s LEFT JOIN tenancy.warm_databases w ON w.server = s.name GROUP BY s.name ORDER BY s.name"
)
_PRUNE = text("DELETE FROM tenancy.tenant_metrics WHERE sampled_at < now() - make_interval(secs => 86400 * :days)")


def _active(row: Any) -> ActiveTenant:
    sample = None
    if row.sampled_at is not None:
        sample = TenantSample(row.id, row.sampled_at, row.size_bytes, row.connections, row.queries, row.errors)
    return ActiveTenant(row.id, row.slug, row.status, row.tier, row.server, row.created_at, sample)
