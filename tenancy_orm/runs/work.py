"""What a run does in one process: ``MigrationWork`` applies a plan, ``UndoWork`` brings each tenant back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from uuid import UUID

from ..errors import ControlUnavailableError
from ..migrations.connections import Connections, prepare_servers
from ..migrations.data_batches import DataObserver
from ..migrations.logs import logger
from ..migrations.plan import Heads, Plan, format_revision
from ..migrations.preflight import ChecksAsked, Preflight
from ..migrations.scripts import Environment
from ..migrations.selection import Selection
from ..migrations.services import FleetServices
from ..tenant import Tenant
from .claims import Claimed
from .holds import hold_unreached
from .outages import Outages
from .records import RunRecord, TenantRecord
from .report import TenantOutcome
from .reversal import return_to
from .tenant_migration import Begin, MigrationResult, TenantMigration


class RunWork(ABC):
    """What a run does: each process has its own.

    Attributes:
        outages: Which servers are down.
    """

    outages: Outages

    @property
    @abstractmethod
    def holds(self) -> bool:
        """Whether it brings tenants to a revision that they are not upgraded from by themselves."""

    @abstractmethod
    async def prepare(self, servers: Iterable[str]) -> None:
        """Check the servers and make what new tenants need, in each process, before it claims a tenant.

        Raises:
            MigrationError: no tenant can be migrated.
        """

    @abstractmethod
    async def open(self, record: RunRecord, tenants: Callable[[], Awaitable[Sequence[Tenant]]]) -> None:
        """Do what comes once, before the first tenant is claimed, in the process that has the gate.

        Raises:
            MigrationError: the run cannot be started; no tenant was touched.
        """

    @abstractmethod
    async def migrate(self, claimed: Claimed, begin: Begin, observe_data: DataObserver) -> MigrationResult:
        """Migrate one tenant."""

    @abstractmethod
    def emit(self, outcome: TenantOutcome) -> None:
        """Announce the outcome of one tenant."""

    @abstractmethod
    async def close(self, record: RunRecord, outcomes: Callable[[], Awaitable[list[TenantRecord]]]) -> None:
        """Record what the whole run has brought about, once it is done."""


class MigrationWork(RunWork):
    """What a run of a plan does in one process.

    Args:
        plan: The plan.
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        checks: When checks of revisions are asked: of all tenants before the first is changed, of each right before a
            revision runs, or never.
        concurrency: How many tenants are asked at once.
        patience: For how many seconds a server that is lost is awaited.
    """

    def __init__(
        self,
        plan: Plan,
        services: FleetServices,
        connections: Connections,
        *,
        checks: ChecksAsked = "in_place",
        concurrency: int = 1,
        patience: float = 0.0,
    ) -> None:
        self.plan = plan
        self.services = services
        self._connections = connections
        self._checks = checks
        self._concurrency = concurrency
        self._answered: Mapping[UUID, frozenset[str]] = {}  # by tenant: the revisions with checks that have passed
        self.outages = Outages(connections, patience)
        self._migration = TenantMigration(services, connections, self.outages)

    @property
    def holds(self) -> bool:
        """Whether tenants stay where they are brought: an upgrade before their use must not undo what was wanted."""
        return self.plan.command != "upgrade"

    async def prepare(self, servers: Iterable[str]) -> None:
        """Check which servers answer, and build the template on each."""
        names = dict.fromkeys(servers) or dict.fromkeys(self.services.servers)
        await prepare_servers(names, self._prepare_server, self.outages.health)

    async def _prepare_server(self, name: str) -> None:
        # the server is asked in any case: what is known here of its template says nothing of whether it is there
        if self.plan.command == "upgrade" and self.services.config.extensions:
            await self.services.provisioner.extensions.check(name)
            self.outages.health.answered(name)
        else:
            await self.outages.ask(name)
        if self.plan.reaches_head:
            await self.services.provisioner.template(name)

    async def open(self, record: RunRecord, tenants: Callable[[], Awaitable[Sequence[Tenant]]]) -> None:
        """Ask the checks of all tenants, and forget where the fleet is, unless it is upgraded.

        Raises:
            PreflightError: a check does not pass; no tenant was touched.
        """
        if self._checks == "ahead":
            selection = Selection(self.services.registry)
            preflight = Preflight(
                self.plan,
                self._connections,
                selection,
                concurrency=self._concurrency,
                per_server=int(record.plan["server_concurrency"]),
                health=self.outages.health,
                events=self.services.events,
            )
            self._answered = await preflight.before_run(await tenants())
        if record.plan["all"] and self.plan.command != "upgrade":
            # until the run has ended nobody knows where the fleet is, and no tenant may be upgraded by itself
            await self.services.registry.set_fleet_revision(None)

    async def migrate(self, claimed: Claimed, begin: Begin, observe_data: DataObserver) -> MigrationResult:
        """Migrate one tenant."""
        return await self.migrate_tenant(claimed.tenant, begin, observe_data, origin=claimed.origin)

    async def migrate_tenant(
        self,
        tenant: Tenant,
        begin: Begin,
        observe_data: DataObserver | None = None,
        *,
        origin: Heads | None = None,
    ) -> MigrationResult:
        """Migrate a tenant, also one that no run has claimed.

        Args:
            tenant: The tenant.
            begin: Is called before its first change.
            observe_data: Is called after each batch of a data migration.
            origin: The heads that it had when the run first began to change it.
        """
        # Asked right before their revision: what the preflight could not ask, or did not; that is so for all in a
        # process that did not ask ahead, and where the tenant is at another revision than it was then.
        answered = self._answered.get(tenant.id, frozenset())

        def asks(revision: str) -> bool:
            return self._checks != "never" and revision not in answered

        return await self._migration.run(self.plan, tenant, begin, asks=asks, observe_data=observe_data, origin=origin)

    def emit(self, outcome: TenantOutcome) -> None:
        """Log a failure, and emit the event of a migration."""
        self._migration.emit(outcome)

    async def close(self, record: RunRecord, outcomes: Callable[[], Awaitable[list[TenantRecord]]]) -> None:
        """Record the revision that the fleet is at now, where this was a run over all tenants."""
        if not record.plan["all"]:
            return
        if self.plan.reaches_head:
            reached = format_revision(self.plan.environment.script.revision_map._real_heads)
        else:
            found = {one.revision_after for one in await outcomes() if one.state == "done"}
            reached = found.pop() if len(found) == 1 else None
        try:
            await self.services.registry.set_fleet_revision(reached)
        except ControlUnavailableError as exc:
            logger.error("the fleet's revision could not be recorded: %s", exc)
            raise


class UndoWork(RunWork):
    """What a run that brings each tenant back to a revision of its own does in one process.

    Args:
        environment: The scripts.
        services: The services of an open ``Tenancy``.
        connections: Connects to the databases.
        stamps: Whether no revision runs.
        stamp_irreversible: Whether those without a downgrade are left out.
        everyone: Whether it is the undo of a run over all tenants.
        holds: Whether it moves them back, so that none of them is upgraded by itself afterwards.
        whole: Whether it undoes the run for all of its tenants: those that the run has not reached are held as well.
    """

    def __init__(
        self,
        environment: Environment,
        services: FleetServices,
        connections: Connections,
        *,
        stamps: bool,
        stamp_irreversible: bool,
        everyone: bool,
        holds: bool,
        whole: bool,
    ) -> None:
        self._environment = environment
        self._services = services
        self._connections = connections
        self._stamps = stamps
        self._stamp_irreversible = stamp_irreversible
        self._everyone = everyone
        self._holds = holds
        self._whole = whole
        self._plans: dict[str, Plan] = {}
        self.outages = Outages(connections, services.config.migration.server_wait)
        self._migration = TenantMigration(services, connections, self.outages)

    @property
    def holds(self) -> bool:
        """Whether it moves tenants back."""
        return self._holds

    async def prepare(self, servers: Iterable[str]) -> None:
        """Check which servers answer."""
        await prepare_servers(dict.fromkeys(servers), self._prepare_server, self.outages.health)

    async def _prepare_server(self, name: str) -> None:
        await self.outages.ask(name)

    async def open(self, record: RunRecord, tenants: Callable[[], Awaitable[Sequence[Tenant]]]) -> None:
        """Forget where the fleet is: no tenant may be upgraded by itself now, and none that is undone later."""
        if self._everyone:
            await self._services.registry.set_fleet_revision(None)
        if self._whole and self._holds and record.undoes is not None:
            async with self._services.control.transaction() as connection:
                await hold_unreached(connection, record.undoes)

    async def migrate(self, claimed: Claimed, begin: Begin, observe_data: DataObserver) -> MigrationResult:
        """Bring one tenant back."""
        target = claimed.target or "base"
        if target not in self._plans:
            self._plans[target] = return_to(
                self._environment, target, stamp=self._stamps, stamp_irreversible=self._stamp_irreversible
            )
        return await self._migration.run(
            self._plans[target], claimed.tenant, begin, observe_data=observe_data, origin=claimed.origin
        )

    def emit(self, outcome: TenantOutcome) -> None:
        """Log a failure, and emit the event of a migration."""
        self._migration.emit(outcome)

    async def close(self, record: RunRecord, outcomes: Callable[[], Awaitable[list[TenantRecord]]]) -> None:
        """Record the revision that the fleet is at now, if all tenants are at one."""
        if not self._everyone:
            return
        found = {tenant.schema_revision for tenant in await Selection(self._services.registry).choose(None)}
        await self._services.registry.set_fleet_revision(found.pop() if len(found) == 1 else None)


__all__ = ["MigrationWork", "RunWork", "UndoWork"]
