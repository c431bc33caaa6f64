"""``TenantMigration``: the migration of one tenant, with its rights, its outcome and its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..cancellation import run_to_completion
from ..errors import ControlUnavailableError, JobLostError
from ..events import TenantMigrated, TenantMigrationFailed
from ..migrations.connections import Connections
from ..migrations.data_batches import DataObserver
from ..migrations.database import DatabaseMigration
from ..migrations.failures import describe
from ..migrations.logs import TENANT_FAILED, logger
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..postgres.errors import sqlstate_of, without_detail
from ..tenant import Tenant, placement_of
from .outages import Outages
from .patience import repeat
from .report import TenantOutcome

Begin = Callable[[str | None, str | None], Awaitable[None]]
"""Is called before a tenant's first change, with the revision that it has then, and the one that it is brought to; what
it raises prevents the change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationResult:
    """How the migration of one tenant ended.

    ``outcome`` is None where the tenant has been purged, or ``is_interrupted``: it was cancelled, or waits for its
    server, and is whole, at ``revision``. ``has_read`` is whether its revision could be read, ``is_announced`` whether
    every process was told of a change, and ``is_granted`` whether the rights on what was committed are set: before that
    the registry does not learn of it. ``error`` is why it waits for its server, and ``is_lost``
    whether it was under way there: it may be what has ended the server.
    """

    outcome: TenantOutcome | None
    revision: str | None = None
    has_read: bool = False
    is_announced: bool = False
    is_granted: bool = True
    is_interrupted: bool = False
    error: str | None = None
    is_lost: bool = False


class _ElsewhereError(Exception):
    """The tenant has another database by now; in this one, nothing was changed."""


class TenantMigration:
    """Migrates tenants one by one.

    Args:
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        outages: Which servers are down.
    """

    def __init__(self, services: FleetServices, connections: Connections, outages: Outages) -> None:
        self._services = services
        self._connections = connections
        self._selection = Selection(services.registry)
        self._outages = outages

    async def run(
        self,
        plan: Plan,
        tenant: Tenant,
        begin: Begin,
        *,
        asks: Callable[[str], bool] | None = None,
        observe_data: DataObserver | None = None,
        origin: Heads | None = None,
    ) -> MigrationResult:
        """Apply ``plan`` to ``tenant``; an error is its outcome, and a cancellation is in the result.

        A tenant that got another database while this waited for its lock, by a move or a restore, is migrated there.
        ``asks`` says of a revision with checks whether they are asked right before it runs; all are where it is None.
        ``observe_data`` is called after each batch of a data migration. ``origin`` are the heads that it had when this
        was tried first: a relative target is counted from there.
        """
        while True:
            try:
                return await self._run(plan, tenant, begin, asks, observe_data, origin)
            except _ElsewhereError:
                tenant = await self._services.registry.get(tenant.id)

    async def _run(
        self,
        plan: Plan,
        tenant: Tenant,
        begin: Begin,
        asks: Callable[[str], bool] | None,
        observe_data: DataObserver | None,
        origin: Heads | None,
    ) -> MigrationResult:
        started = time.monotonic()
        if tenant.placement is None:
            return MigrationResult(outcome=None)

        async def announce() -> None:
            # under the database's migration lock, which a move and a restore hold until the tenant has another one
            if not await repeat(lambda: self._services.registry.is_placed_as(tenant)):
                raise _ElsewhereError
            await begin(_revision(migration.after), migration.target_revision)

        error: Exception | None = None
        migration: DatabaseMigration
        is_granted = has_ended = False
        try:
            migration = self._migration(plan, tenant, announce, asks, observe_data, origin)
        except Exception as exc:  # noqa: BLE001 - its server may not be configured
            return MigrationResult(outcome=self._failure(tenant, exc, started))
        try:
            await migration.run()
            has_ended = True
            if _lacks_grants(tenant, migration):
                await self._services.provisioner.apply_grants(tenant)
            is_granted = True
        except JobLostError:
            # others may be migrating it
            return MigrationResult(outcome=None, is_announced=migration.announced, is_interrupted=True)
        except asyncio.CancelledError:
            # of several revisions, some may be committed
            has_read = migration.announced and await run_to_completion(migration.read_again())
            return MigrationResult(
                outcome=None,
                revision=_revision(migration.after),
                has_read=has_read,
                is_announced=migration.announced,
                is_granted=has_read and await run_to_completion(self._try_grants(tenant, migration)),
                is_interrupted=True,
            )
        except _ElsewhereError:
            raise
        except Exception as exc:
            if await self._selection.is_gone(tenant, exc):
                return MigrationResult(outcome=None, is_announced=migration.announced)
            if await self._selection.is_elsewhere(tenant, exc):
                raise _ElsewhereError from exc
            try:
                is_lost = not migration.may_have_committed and await self._outages.waits(
                    tenant, exc, since=started, server_started=migration.server_started
                )
            except asyncio.CancelledError:
                return MigrationResult(outcome=None, is_announced=migration.announced, is_interrupted=True)
            if is_lost:
                return MigrationResult(
                    outcome=None,
                    is_announced=migration.announced,
                    is_interrupted=True,
                    error=describe(exc),
                    is_lost=migration.has_connected,
                )
            logger.debug("tenant %s failed", tenant.slug, exc_info=without_detail(exc))
            error = exc
            if migration.announced and migration.after is None:
                await run_to_completion(migration.read_again())
            if not has_ended:
                is_granted = await run_to_completion(self._try_grants(tenant, migration))
        return MigrationResult(
            outcome=_outcome(tenant, migration, error, time.monotonic() - started),
            has_read=migration.after is not None,
            is_announced=migration.announced,
            is_granted=is_granted,
        )

    async def _try_grants(self, tenant: Tenant, migration: DatabaseMigration) -> bool:
        """Set the rights on what a migration has committed before it failed, or was interrupted."""
        if not _lacks_grants(tenant, migration):
            return True
        try:
            await self._services.provisioner.apply_grants(tenant)
        except Exception as exc:  # noqa: BLE001 - how the migration has ended is what counts
            logger.warning("tenant %s: the rights on what was migrated are not set: %s", tenant.slug, describe(exc))
            return False
        return True

    def _migration(
        self,
        plan: Plan,
        tenant: Tenant,
        announce: Callable[[], Awaitable[None]],
        asks: Callable[[str], bool] | None,
        observe_data: DataObserver | None,
        origin: Heads | None,
    ) -> DatabaseMigration:
        async def reached(revision: str | None) -> None:
            """Record the revision before its data migrations: requests are served at it, for as long as they take.

            The grant hook is first: they may need what it gives on the revision's new objects.
            """
            await self._services.provisioner.apply_grants(tenant)
            try:
                await self._services.registry.set_revision(tenant.id, revision)
            except ControlUnavailableError as exc:
                logger.warning("the revision cannot be recorded before the data migrations: %s", exc)

        return DatabaseMigration(
            plan,
            self._connections.target(tenant, self._outages.health),
            adapter=self._connections.adapter(placement_of(tenant).server),
            limits=self._connections.limits,
            announce=announce,
            asks=asks,
            observe_data=observe_data,
            reached=reached,
            origin=origin,
        )

    def _failure(self, tenant: Tenant, error: Exception, started: float) -> TenantOutcome:
        return TenantOutcome(
            tenant_id=tenant.id,
            slug=tenant.slug,
            server=tenant.placement.server if tenant.placement else "",
            before=None,
            after=None,
            changed=False,
            seconds=time.monotonic() - started,
            error=describe(error),
        )

    def emit(self, outcome: TenantOutcome) -> None:
        """Log a failure, and emit the event of a migration."""
        names = {"tenant_id": outcome.tenant_id, "slug": outcome.slug}
        if outcome.error is None:
            event = TenantMigrated(
                **names,  # type: ignore[arg-type]
                revision=outcome.after,
                changed=outcome.changed,
                seconds=outcome.seconds,
            )
            self._services.events.emit(event)
        else:
            logger.error(TENANT_FAILED, outcome.slug, outcome.error)
            self._services.events.emit(TenantMigrationFailed(**names, error=outcome.error))  # type: ignore[arg-type]


def _lacks_grants(tenant: Tenant, migration: DatabaseMigration) -> bool:
    """Whether something was committed here, or by an attempt that was ended before it could set the rights on it.

    The registry has a revision only once they are set.
    """
    return migration.changed or (migration.after is not None and _revision(migration.after) != tenant.schema_revision)


def _revision(heads: Heads | None) -> str | None:
    return None if heads is None else format_revision(heads)


def _outcome(tenant: Tenant, migration: DatabaseMigration, error: Exception | None, seconds: float) -> TenantOutcome:
    return TenantOutcome(
        tenant_id=tenant.id,
        slug=tenant.slug,
        server=placement_of(tenant).server,
        before=_revision(migration.before),
        after=_revision(migration.after),
        changed=migration.changed,
        seconds=seconds,
        error=None if error is None else describe(error),
        sqlstate=None if error is None else sqlstate_of(error),
        extensions=migration.installed,
    )


__all__ = ["Begin", "MigrationResult", "TenantMigration"]
