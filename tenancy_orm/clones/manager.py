"""``CloneManager``: makes other tenants of copies of tenants, for a time (``tenancy.clones``)."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..drift import catalogue
from ..drift.policy import RevisionPolicy
from ..errors import (
    ConfigurationError,
    InvalidTransitionError,
    LoginNotBlockedError,
    OperationError,
    TenancyError,
    TenantNotFoundError,
)
from ..events import EventBus, TenantCloned
from ..jobs.claims import Claimant
from ..migrations.connections import Connections
from ..migrations.scripts import Environment
from ..operations import Operations
from ..operations.progress import StepProgress, silent
from ..postgres import connections as postgres_connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..postgres.snapshots import begin_snapshot
from ..provisioning.copies.database_properties import DatabaseProperties, read_properties
from ..provisioning.copies.empty_databases import InstalledExtension, read_extensions
from ..provisioning.copies.restoring import programs_for
from ..provisioning.creation import clone_marks
from ..provisioning.creation.clone_marks import METADATA, CloneMark
from ..provisioning.creation.filled_creation import Filling
from ..provisioning.creation.new_databases import NewDatabase
from ..provisioning.rights.grants import CHECKPOINTS_SCHEMA
from ..provisioning.rights.tenant_rights import RECORD_SCHEMA
from ..registry.lifecycle import check_database_in_use
from ..runs import FleetMigrator
from ..tenant import Tenant, TenantRef
from ..tenants.manager import CreatedTenant, TenantManager
from .plan import Table, plan_tables, read_names
from .records import Clone, CloneRecords
from .rules import AnonymisationRules, RulesSource
from .transfer import READING, CloneTransfer
from .values import Replacing

logger = logging.getLogger("tenancy_orm.clones")

LONGEST = timedelta(days=365)
"""For how long a clone is kept at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneReport:
    """A clone that was made.

    Attributes:
        tenant: The clone.
        api_key: Its API key, which is shown once.
        clone: What is recorded of it.
        rows: How many rows it has.
        tables: How many tables.
        differences: How its schema differs from that of its revision.
        left_out: What the tenant's database has and the clone has not, as ``pg_restore`` lists it.
        seconds: How long it took.
    """

    tenant: Tenant
    api_key: str = field(repr=False)
    clone: Clone
    rows: int
    tables: int
    differences: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredClones:
    """Slugs of clones that were deleted because their time was over, and what failed."""

    expired: tuple[str, ...]
    errors: tuple[str, ...]


class CloneManager:
    """Makes and ends clones (``tenancy.clones``). Only operators may: while a tenant is bound, everything is refused.

    Args:
        config: The configuration.
        operations: The records of operations.
        tenants: Creates and deletes tenants.
        migrations: Has the services and the migrations.
        events: Receives ``TenantCloned``.
    """

    def __init__(
        self,
        config: TenancyConfig,
        operations: Operations,
        tenants: TenantManager,
        migrations: FleetMigrator,
        events: EventBus,
    ) -> None:
        services = migrations.services
        self._config = config
        self._operations = operations
        self._tenants = tenants
        self._migrations = migrations
        self._services = services
        self._registry = services.registry
        self._provisioner = services.provisioner
        self._events = events
        self._records = CloneRecords(services.control)
        self._connections = Connections(services)

    async def create(
        self,
        tenant: TenantRef,
        slug: str,
        *,
        ttl: timedelta,
        rules: RulesSource | None = None,
        require_rules: bool = False,
        tier: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        server: str | None = None,
        accept: bool = False,
        progress: StepProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> CloneReport:
        """Make another tenant of a copy of a tenant's database as it is now, all or nothing.

        The copy is one snapshot; the tenant goes on working. Rules replace values on the way, before the clone has any
        of them. The clone has an API key, usage and quotas of its own, and stays in the tenant's region. When ``ttl``
        is over, housekeeping deletes and purges it.

        Args:
            tenant: The tenant.
            slug: The clone's slug.
            ttl: For how long the clone is kept, a year at most.
            rules: What replaces the values of which columns: rules, a mapping, or the path of a file. Large objects
                come along only where the rules say so; without rules, everything does.
            require_rules: Refuse columns without a rule in which people's data may be: text, JSON, bytes, addresses.
            tier: The clone's tier; the tenant's where None.
            metadata: The clone's metadata; the tenant's is not copied. ``clone`` in it names the cloned tenant.
            server: As for ``tenants.create``.
            accept: Let through code that the revision does not make, because an operator has looked at it.
            progress: Called with each step that begins.
            actor: Who does this, for the audit log.

        Raises:
            AnonymisationError: a rule is about nothing, a constraint refuses it, or a column has none; it names them.
            TenantDeletedError, TenantNotFoundError: the tenant is deleted, or there is none.
            TenantExistsError: the slug is taken.
            ContentsRefusedError: the tenant's database has code that its revision does not make.
            TenancyError: as ``tenants.create``; what was made has been undone.
        """
        refuse_while_bound("cloning a tenant")
        started = time.monotonic()
        if not timedelta(0) < ttl <= LONGEST:
            raise ConfigurationError(f"a clone must be kept for more than 0 seconds and at most {LONGEST.days} days")
        parsed = None if rules is None else AnonymisationRules.of(rules)
        found = await self._registry.find(tenant)
        check_database_in_use(found)
        environment = None if self._config.migrations is None else await self._migrations.environment()
        policy = RevisionPolicy(self._services, self._connections, environment, accept=accept)
        made = _Made()

        progress = progress or silent
        progress("reading the tables")
        tables, extensions, like = await self._look(found, parsed, environment, require_rules)
        columns = tuple(name for table in tables for name in _replaced(table))
        mark = CloneMark(of=found.id, of_slug=found.slug, expires_at=datetime.now(UTC) + ttl, columns=columns)

        async def fill(new: NewDatabase) -> None:
            await self._fill(new, found, parsed, environment, require_rules, made, mark, progress, actor)
            policy.tenant_owned = made.tenant_owned

        created = await self._tenants.create(
            slug,
            tier=tier or found.tier,
            metadata={**(metadata or {}), METADATA: mark.metadata},
            timezone=found.timezone,
            server=server,
            region=found.region,
            seed=False,
            filling=Filling(
                fill=fill,
                policy=policy,
                timeout=self._config.backup.timeout,
                extensions=extensions,
                like=like,
                copied_from=found.id,
            ),
            actor=actor,
        )
        return await self._finished(created, found, policy, made, started)

    async def _finished(
        self, created: CreatedTenant, source: Tenant, policy: RevisionPolicy, made: _Made, started: float
    ) -> CloneReport:
        clone = await self._records.of(created.id)
        assert clone is not None  # noqa: S101 - nothing is created without it
        self._events.emit(
            TenantCloned(
                tenant_id=created.id,
                slug=created.slug,
                of=source.id,
                anonymised=bool(clone.columns),
                expires_at=clone.expires_at,
            )
        )
        return CloneReport(
            tenant=created.tenant,
            api_key=created.api_key,
            clone=clone,
            rows=sum(made.rows.values()),
            tables=len(made.rows),
            differences=policy.differences,
            left_out=made.left_out,
            seconds=time.monotonic() - started,
        )

    async def _look(
        self, tenant: Tenant, rules: AnonymisationRules | None, environment: Environment | None, require_rules: bool
    ) -> tuple[tuple[Table, ...], tuple[InstalledExtension, ...], DatabaseProperties]:
        """Refuse rules that cannot be followed before anything is made, and read what else a copy needs."""
        try:
            async with self._provisioner.readers.open(tenant, seconds=self._config.provisioning.timeout) as reader:
                connection = await reader.connect(timeout=self._config.pool.connect_timeout, settings=READING)
                try:
                    tables = await self._plan(connection, rules, environment, require_rules)
                    # its settings may be a superuser's, and a clone has its use without them
                    like = await read_properties(connection, required=False)
                    return tables, await read_extensions(connection), like
                finally:
                    await run_to_completion(postgres_connections.close(connection))
        except SERVER_FAILURES as exc:
            raise OperationError(
                f"the database of tenant {tenant.slug!r} cannot be read ({describe(exc)}); nothing was made"
            ) from exc

    async def _plan(
        self,
        connection: Connection,
        rules: AnonymisationRules | None,
        environment: Environment | None,
        require_rules: bool,
    ) -> tuple[Table, ...]:
        own = []
        if environment is not None:
            schema = environment.options.get("version_table_schema") or "public"
            own.append(f"{schema}.{environment.options.get('version_table', 'alembic_version')}")
        return await plan_tables(
            connection, rules, own=own, own_schemas=(CHECKPOINTS_SCHEMA, RECORD_SCHEMA), require_rules=require_rules
        )

    async def _fill(
        self,
        new: NewDatabase,
        source: Tenant,
        rules: AnonymisationRules | None,
        environment: Environment | None,
        require_rules: bool,
        made: _Made,
        mark: CloneMark,
        progress: StepProgress,
        actor: Actor,
    ) -> None:
        number = self._services.names.parse(new.name)
        assert number is not None  # noqa: S101 - a new tenant's database has its id
        claimant = Claimant()
        # before it is complete: no clone is ever without its end
        operation = await self._operations.begin(
            "clone",
            number,
            step="copying",
            claimant=claimant,
            detail=replace(mark, columns=()).detail,
            actor=actor,
        )
        async with self._operations.keep(operation, claimant):
            progress("copying")
            await self._transfer(new, source, rules, environment, require_rules, made)
            await self._mark(new, number, replace(mark, columns=made.columns))
            # before anybody can use it, so that no clone is without these entries
            detail = {"of": str(source.id), "expires_at": mark.expires_at.isoformat(), "columns": list(made.columns)}
            await self._registry.record(number, "tenant.clone", detail=detail, actor=actor)
            into = {"clone": str(number), "slug": (await self._registry.get(number)).slug}
            await self._registry.record(source.id, "tenant.cloned_to", detail=into, actor=actor)
        await self._operations.finish(operation, claimant, "done", detail={"columns": list(made.columns)})

    async def _transfer(
        self,
        new: NewDatabase,
        source: Tenant,
        rules: AnonymisationRules | None,
        environment: Environment | None,
        require_rules: bool,
        made: _Made,
    ) -> None:
        version, timeout = await self._version(new.server), self._config.pool.connect_timeout
        async with self._provisioner.readers.open(source, seconds=self._config.backup.timeout) as reader:
            connection = await reader.connect(timeout=timeout, settings=READING, purpose="tenancy-clone")
            try:
                if postgres_connections.version(connection) >= 17:
                    await connection.execute("SET transaction_timeout = 0")
                newest = max(version, postgres_connections.version(connection))
                programs = await programs_for(self._config, newest)
                try:
                    await begin_snapshot(connection, read_names)
                except asyncpg.LockNotAvailableError as exc:
                    raise OperationError(str(exc)) from exc
                # as they are in this snapshot: a migration may have run since
                tables = await self._plan(connection, rules, environment, require_rules)
                made.columns = tuple(name for table in tables for name in _replaced(table))
                transfer = CloneTransfer(
                    reader=reader,
                    source=connection,
                    into=new.login,
                    tables=tables,
                    replacing=Replacing(secrets.token_bytes(32)),
                    programs=programs,
                    version=version,
                    large_objects=rules is None or rules.keep_large_objects,
                    connect_timeout=timeout,
                )
                made.left_out = await transfer.run()
                made.rows = transfer.rows
                # not before: it leaves a savepoint, from within which no snapshot can be exported
                schema = await catalogue.read(connection, owner=self._services.names.owner, role=_role_of(source))
                made.tenant_owned = schema.tenant_owned
            finally:
                await run_to_completion(postgres_connections.close(connection))

    async def _mark(self, new: NewDatabase, tenant_id: UUID, mark: CloneMark) -> None:
        connection = await new.login.connect(timeout=self._config.pool.connect_timeout)
        try:
            await clone_marks.write(connection, tenant_id, mark)
        finally:
            await run_to_completion(postgres_connections.close(connection))

    async def _version(self, server: str) -> int:
        connection = await self._provisioner.connect_admin(server, purpose="tenancy-clone")
        try:
            return postgres_connections.version(connection)
        finally:
            await run_to_completion(postgres_connections.close(connection))

    # --- afterwards -------------------------------------------------------------------------------------------------

    async def get(self, tenant: TenantRef) -> Clone | None:
        """Return what is recorded of a clone; None where the tenant is none.

        Raises:
            TenantNotFoundError: there is no such tenant.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("looking at clones")
        return await self._records.of((await self._registry.find(tenant)).id)

    async def expire(self, *, actor: Actor = SYSTEM) -> ExpiredClones:
        """Delete the clones that have expired, and schedule their purge for now: for ``run_housekeeping``.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("ending clones")
        expired, errors = [], []
        for clone in await self._records.due():
            try:
                await self._end(clone, actor)
                expired.append(clone.slug)
            except (InvalidTransitionError, TenantNotFoundError) as exc:
                # another run, or an operator, was faster
                logger.debug("the clone %s is not deleted: %s", clone.slug, exc)
            except (TenancyError, *SERVER_FAILURES) as exc:
                logger.error("the clone %s could not be deleted: %s", clone.slug, describe(exc))
                errors.append(f"{clone.slug}: {describe(exc)}")
        return ExpiredClones(expired=tuple(expired), errors=tuple(errors))

    async def _end(self, clone: Clone, actor: Actor) -> None:
        try:
            await self._tenants.delete(clone.tenant_id, reason="its time as a clone is over", actor=actor)
        except LoginNotBlockedError as exc:
            # it is deleted, and the purge ends its sessions
            logger.warning("%s", exc)
        await self._tenants.schedule_purge(clone.tenant_id, datetime.now(UTC), actor=actor)


def _role_of(tenant: Tenant) -> str | None:
    return None if tenant.placement is None else tenant.placement.role


@dataclass(slots=True)
class _Made:
    """What a clone is made of, as far as it has come."""

    columns: tuple[str, ...] = ()
    tenant_owned: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def _replaced(table: Table) -> list[str]:
    return [f"{table.label}.{column.name}" for column in table.columns if column.is_changed]


__all__ = ["LONGEST", "CloneManager", "CloneReport", "ExpiredClones"]
