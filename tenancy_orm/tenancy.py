"""``Tenancy``: the one object an application holds."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Self, TypeVar, overload

from sqlalchemy import Executable, Row
from sqlalchemy.ext.asyncio import AsyncSession

from .adoption import AdoptionManager
from .audit.actor import SYSTEM, Actor
from .audit.log import AuditLog
from .authentication.keys import KeyManager
from .authentication.members import MemberManager
from .authentication.revocations import RevocationManager
from .backups import BackupManager
from .clones import CloneManager
from .config import TenancyConfig
from .context import bind, refuse_while_bound
from .errors import ConfigurationError
from .events import DRAIN_TIMEOUT, EventBus
from .exports import ErasureManager, ExportManager
from .housekeeping import HousekeepingReport
from .internals import Internals
from .jobs import Job, JobResult, Jobs
from .lifetime import Lifetime
from .metering.metrics import TenantMetrics
from .moves import MoveManager
from .operations import OperationManager
from .provisioning import TemplateManager, WarmPool
from .queries import DEFAULT_CONCURRENCY, DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT, Chosen, FleetQuery, Query
from .quotas.manager import QuotaManager
from .quotas.rates import Rates
from .restores import RegistryRebuilding, RestoreManager
from .restores.recovery import RecoveryManager
from .rotation import SecretManager
from .routing.consistency import noting_writes
from .routing.replicas import ReplicaDemand
from .routing.sessions import replica_demand
from .runs import FleetMigrator
from .schedules import ScheduleManager
from .scopes import BoundTenants, ResolvedSession, resolve
from .seeds import Seed, SeedManager, seed
from .server_management.manager import ServerManager
from .statements import Statements
from .sync import SyncTenancy
from .tenant import Status, Tenant, TenantRef
from .tenants.domains import DomainManager
from .tenants.manager import TenantManager
from .tenants.tiers import TierRegistry
from .worker import Worker
from .wrapping import Binding, wrap

P = ParamSpec("P")
S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")


class Tenancy:
    """A multi-tenant application's access to its tenants and their databases.

    Building one does no I/O; ``open`` (or ``async with``, or ``lifespan``) connects. One object serves a whole process.

    Args:
        config: What to connect to and how; read by ``TenancyConfig.from_env`` where None.

    Attributes:
        events (EventBus): Where to subscribe to what happens in this process.
    """

    def __init__(self, config: TenancyConfig | None = None) -> None:
        if config is not None and not isinstance(config, TenancyConfig):
            raise ConfigurationError(f"pass a TenancyConfig, not {type(config).__name__}")
        self._configured = config or TenancyConfig.from_env()
        self.events = EventBus()
        rates = Rates(
            self._configured.tiers,
            processes=self._configured.quotas.rate_processes,
            address_rate=self._configured.quotas.address_requests_per_second,
        )
        self._lifetime = Lifetime(self._configured, self.events, rates)
        self._statements = Statements(self._lifetime)
        self._sync: SyncTenancy | None = None
        self._jobs: list[Job] = []

    def __repr__(self) -> str:
        """Tell whether it is open; no configuration, which holds credentials."""
        return f"<Tenancy {'open' if self.is_open else 'closed'}>"

    # --- sessions and scopes ----------------------------------------------------------------------------------------

    @overload
    def session(
        self,
        tenant: TenantRef | None = None,
        *,
        operator: bool = False,
        read_only: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
        isolation_level: str | None = None,
        session_class: type[S],
        **options: Any,
    ) -> AbstractAsyncContextManager[S]: ...

    @overload
    def session(
        self,
        tenant: TenantRef | None = None,
        *,
        operator: bool = False,
        read_only: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
        isolation_level: str | None = None,
        **options: Any,
    ) -> AbstractAsyncContextManager[AsyncSession]: ...

    def session(
        self,
        tenant: TenantRef | None = None,
        *,
        operator: bool = False,
        read_only: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
        isolation_level: str | None = None,
        **options: Any,
    ) -> AbstractAsyncContextManager[Any]:
        """Open a session on a tenant's own database: ``async with tenancy.session() as session``.

        What is not committed is rolled back at the end, as with any ``AsyncSession``.

        With ``read_only``, PostgreSQL refuses what writes (25006). A query is then one round trip, since there is no
        transaction around it: each sees what is committed when it begins, as in any transaction that is
        ``READ COMMITTED``. For one snapshot for all of them, give ``isolation_level="REPEATABLE READ"`` as well.

        Args:
            tenant: A slug, an id or a ``Tenant``; the bound tenant where None.
            operator: Admit a tenant in maintenance; not a request that its maintenance has ended.
            read_only: Whether it only reads.
            replica: Whether a replica may serve it. It needs ``read_only``; where no replica can serve it, the primary
                does.
            max_staleness: How old what it sees on a replica may be, in seconds; ``replicas.max_staleness`` where None.
            after: A token of ``consistency_token``: what was committed before that is seen.
            isolation_level: ``READ COMMITTED``, ``REPEATABLE READ``, ``SERIALIZABLE`` or ``AUTOCOMMIT``; the server's
                default where None.
            options: Further arguments of ``AsyncSession``; as ``session_class`` a subclass of it to use instead.

        Raises:
            NoTenantError: no tenant is given and none is bound.
            CrossTenantError: another tenant than ``tenant`` is bound.
            TenantNotFoundError, TenantUnavailableError: it does not exist, or its status admits no session.
            AdmissionEndedError: what the request was let in with was revoked, has expired, or may do less by now; also
                at any later statement.
            CheckoutTimeoutError: (at the first statement) no connection became free in time.
            ServerUnavailableError: (at the first statement) the tenant's server does not answer.
            MarkerMismatchError: (at the first statement) the database is not that tenant's.
            ReadOnlyError: (later) with ``read_only``, an object is to be added, deleted or flushed, the session ends
                with changed objects, or a statement is to begin or end a transaction; with ``replica``, a statement of
                SQLAlchemy's is to write or to lock.
            ConfigurationError: ``replica`` without ``read_only``, or with what no replica has.
        """
        parts = self._lifetime.parts
        if read_only or isolation_level is not None:
            options.update(read_only=read_only, isolation_level=isolation_level)
        if replica:
            options["replica"] = replica_demand(
                parts.router,
                replica=replica,
                read_only=read_only,
                max_staleness=max_staleness,
                after=after,
                isolation_level=isolation_level,
            )
        return ResolvedSession(parts.directory, parts.router, tenant, operator=operator, options=options)

    @overload
    def transaction(
        self, tenant: TenantRef | None = None, *, operator: bool = False, session_class: type[S], **options: Any
    ) -> AbstractAsyncContextManager[S]: ...

    @overload
    def transaction(
        self, tenant: TenantRef | None = None, *, operator: bool = False, **options: Any
    ) -> AbstractAsyncContextManager[AsyncSession]: ...

    @asynccontextmanager
    async def transaction(
        self, tenant: TenantRef | None = None, *, operator: bool = False, **options: Any
    ) -> AsyncIterator[Any]:
        """Open a session. Its work is committed when the body succeeds, and rolled back when it raises.

        Raises:
            TenancyError: as ``session``.
        """
        async with self.session(tenant, operator=operator, **options) as session, session.begin():
            yield session

    @asynccontextmanager
    async def scope(self, tenant: TenantRef) -> AsyncIterator[Tenant]:
        """Bind ``tenant`` for the body: for jobs, scripts and tests; requests are bound by the middleware.

        Raises:
            CrossTenantError: another tenant is bound; a scope cannot be switched from inside.
            TenantNotFoundError: there is no such tenant.
        """
        found = await resolve(self._lifetime.parts.directory, tenant)
        with bind(found), noting_writes(found.id):
            yield found

    def each(
        self,
        *,
        status: Iterable[Status | str] = (Status.TRIAL, Status.ACTIVE),
        tier: str | Iterable[str] = (),
    ) -> BoundTenants:
        """Iterate over the fleet, each tenant bound in turn: ``async for tenant in tenancy.each(): ...``.

        Tenants come in order of creation, read page by page. Leaving the loop early ends the binding as well. Inside an
        async generator it cannot: whoever consumes the generator would stay bound when it stops early. Yield outside
        the loop, or have it consumed within ``contextlib.aclosing``; the same holds for ``scope``.

        Raises:
            CrossTenantError: a tenant is bound already; work over the fleet is not a tenant's to do.
        """
        return BoundTenants(self._lifetime.parts.tenants.iterate(status=tuple(status), tier=tier))

    @overload
    async def run(
        self, tenant: TenantRef, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    @overload
    async def run(self, tenant: TenantRef, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    async def run(self, tenant: TenantRef, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call ``func(*args, **kwargs)`` with ``tenant`` bound, and return its result.

        A coroutine function is awaited; a plain function runs in a worker thread, with the tenant bound there as well.

        Raises:
            TenancyError: as ``scope``; and whatever ``func`` raises.
        """
        async with self.scope(tenant):
            if inspect.iscoroutinefunction(func):
                return await func(*args, **kwargs)
            outcome = await asyncio.to_thread(func, *args, **kwargs)
            return await outcome if inspect.isawaitable(outcome) else outcome

    def wrap(self, func: Callable[P, T], tenant: TenantRef | None = None) -> Callable[P, T]:
        """Return ``func`` bound to a tenant, for where a binding does not follow: threads, executors, callbacks.

        ``pool.submit(tenancy.wrap(func), 1)``, ``loop.run_in_executor(None, tenancy.wrap(func))``,
        ``Thread(target=tenancy.wrap(func))``. The tenant is bound for each call alone, so a pool's thread keeps nothing
        of it. Whatever admitted the request is checked again with every call, and by every statement inside.

        Args:
            func: A function, a coroutine function, or another callable.
            tenant: A slug, an id or a ``Tenant``, looked up with every call; the tenant bound now where None.

        Raises:
            NoTenantError: no tenant is given and none is bound.
            CrossTenantError: another tenant than ``tenant`` is bound; also at a call, where one is bound there.
            ConfigurationError: ``func`` is no function, or a generator function; also where it is pickled.
            AdmissionEndedError: (also at a call) what the request was let in with is no longer valid.
            TenantNotFoundError, TenantUnavailableError: (at a call) ``tenant`` does not exist, or its status admits no
                session.
        """
        wrapped: Callable[P, T] = wrap(func, Binding(self._lifetime, tenant))
        return wrapped

    async def consistency_token(self, tenant: TenantRef | None = None) -> str:
        """Return a token for ``session(..., replica=True, after=token)``, in this process or another one.

        A read with it sees all that was committed for the tenant before this call. It takes one round trip to the
        primary. The token is opaque, and of this tenant alone; where it is not genuine, the primary serves the read.

        Raises:
            NoTenantError, CrossTenantError, TenantNotFoundError: as ``session``.
            ServerUnavailableError: the tenant's server does not answer.
        """
        parts = self._lifetime.parts
        return await parts.router.consistency_token(await resolve(parts.directory, tenant))

    # --- textual SQL ------------------------------------------------------------------------------------------------

    async def fetch_all(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> list[Row[*tuple[Any, ...]]]:
        """Run a query on a tenant and return all rows: textual SQL with ``:name`` parameters, or SQLAlchemy's.

        It only reads: PostgreSQL refuses what writes (25006). With ``replica``, a replica may serve it, as in
        ``session``; where one cancels it, the statement is repeated elsewhere.

        Raises:
            TenancyError: as ``session``.
        """
        demand = self._demand(replica, max_staleness, after)
        return await self._statements.fetch_all(sql, parameters, tenant, operator, demand)

    async def fetch_one(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> Row[*tuple[Any, ...]] | None:
        """Run a query as ``fetch_all`` does and return the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        demand = self._demand(replica, max_staleness, after)
        return await self._statements.fetch_one(sql, parameters, tenant, operator, demand)

    async def fetch_value(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> Any:
        """Run a query as ``fetch_all`` does and return the first column of the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        demand = self._demand(replica, max_staleness, after)
        return await self._statements.fetch_value(sql, parameters, tenant, operator, demand)

    async def execute(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> int:
        """Run one statement on a tenant, commit, and return how many rows it touched; -1 where PostgreSQL does not say.

        Where the connection is lost before PostgreSQL has answered, the statement may be committed. It is not repeated.

        Raises:
            TenancyError: as ``session``.
        """
        return await self._statements.execute(sql, parameters, tenant, operator)

    def _demand(self, replica: bool, max_staleness: float | None, after: str | None) -> ReplicaDemand | None:
        if not replica:
            return None
        return replica_demand(self._lifetime.parts.router, replica=True, max_staleness=max_staleness, after=after)

    # --- every tenant -----------------------------------------------------------------------------------------------

    def query_all(
        self,
        statement: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenants: Iterable[TenantRef] | None = None,
        tier: str | Iterable[str] = (),
        status: Iterable[Status | str] | Status | str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: float = DEFAULT_TIMEOUT,
        max_rows: int = DEFAULT_MAX_ROWS,
        write: bool = False,
        yield_errors: bool = False,
    ) -> FleetQuery:
        """Run one statement on many tenants: ``async for tenant, rows in tenancy.query_all("SELECT ...")``.

        Each tenant is asked as its own role, in a transaction of its own, which PostgreSQL keeps read-only and which is
        rolled back. Answers come as they arrive, in no order. A tenant that fails does not end the others: at the end,
        ``FleetQueryError`` lists those that failed. Leaving the loop early cancels the rest.

        Args:
            statement: One statement: text with ``:name`` parameters, or of SQLAlchemy Core or ORM.
            parameters: Values by name.
            tenants: The tenants. Where None, all in trial or active, or those of ``tier`` and ``status``.
            tier: Only tenants of these tiers.
            status: Only tenants of these statuses.
            concurrency: How many tenants of one server are asked at once; never more than half of
                the connections that this process may have, so that its requests get connections as well.
            timeout: Seconds that the statement may take in each database; PostgreSQL ends it.
            max_rows: How many rows of each tenant are read; ``rows.truncated`` tells whether there were more.
            write: Let the statement write, and commit it, tenant by tenant.
            yield_errors: Yield failures as well, with the reason in ``rows.error``, and raise no error for them.

        Raises:
            ConfigurationError: an argument is not valid.
            CrossTenantError: a tenant is bound; also while iterating.
            FleetQueryError: (at the end) it failed for some tenants.
            TenantNotFoundError, TenantProvisioningError: (at first) a named tenant does not exist, or is being created.
            ControlUnavailableError: (at first) the control database does not answer.
        """
        parts = self._lifetime.parts
        return FleetQuery(
            Query(statement=statement, parameters=parameters, timeout=timeout, max_rows=max_rows, write=write),
            Chosen.of(tenants, tier, status),
            registry=parts.registry,
            router=parts.router,
            concurrency=concurrency,
            yield_errors=yield_errors,
        )

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> TenancyConfig:
        """The configuration in force: once open, with the embedded server's addresses and keys filled in."""
        assembly = self._lifetime.assembly
        return self._configured if assembly is None else assembly.config

    @property
    def sync(self) -> SyncTenancy:
        """This object for synchronous code: scripts, worker threads, Flask, Celery. It waits where this one awaits.

        Raises:
            MissingExtraError: psycopg is not installed.
        """
        if self._sync is None:
            self._sync = SyncTenancy(self._lifetime)
        return self._sync

    @property
    def tenants(self) -> TenantManager:
        """Create, find, change and remove tenants."""
        return self._lifetime.parts.tenants

    @property
    def domains(self) -> DomainManager:
        """Claim and verify tenants' own domains."""
        return self._lifetime.parts.domains

    @property
    def keys(self) -> KeyManager:
        """Issue, rotate and revoke API keys."""
        return self._lifetime.parts.keys

    @property
    def members(self) -> MemberManager:
        """Add, invite, list and remove the people who may act for a tenant."""
        return self._lifetime.parts.members

    @property
    def revocations(self) -> RevocationManager:
        """Revoke tokens and sessions before they expire: log somebody out everywhere."""
        return self._lifetime.parts.revocations

    @property
    def tiers(self) -> TierRegistry:
        """The tiers in force; ``tiers.apply(tenancy.config.tiers)`` changes them to the configured ones."""
        return self._lifetime.parts.tiers

    @property
    def quotas(self) -> QuotaManager:
        """Limits and usage."""
        return self._lifetime.parts.quotas

    @property
    def metrics(self) -> TenantMetrics:
        """What was sampled of the tenants' databases, and sums over the registry."""
        return self._lifetime.parts.metrics

    @property
    def moves(self) -> MoveManager:
        """Moves tenants to other servers while they are used, and says which should be."""
        return self._lifetime.parts.moves

    @property
    def schedules(self) -> ScheduleManager:
        """Which tenants are due, in each tenant's own time zone."""
        return self._lifetime.parts.schedules

    @property
    def operations(self) -> OperationManager:
        """Restores, clones, adoptions, moves, exports and erasures: which there are, and how far they have come."""
        return self._lifetime.parts.operations

    @property
    def restores(self) -> RestoreManager:
        """Bring one tenant's database back."""
        return self._lifetime.parts.restores

    @property
    def rebuilding(self) -> RegistryRebuilding:
        """Register tenants again that the control database does not know, by the markers of their databases."""
        return self._lifetime.parts.rebuilding

    @property
    def audit(self) -> AuditLog:
        """What was done, by whom, when."""
        return self._lifetime.parts.audit

    @property
    def secrets(self) -> SecretManager:
        """Rotate the roles' passwords, and the keys that seal them."""
        return self._lifetime.parts.secrets

    @property
    def migrations(self) -> FleetMigrator:
        """Upgrade and inspect all tenants' schemas."""
        return self._lifetime.parts.migrations

    @property
    def adoption(self) -> AdoptionManager:
        """Make tenants of databases and schemas that exist already."""
        return self._lifetime.parts.adoption

    @property
    def clones(self) -> CloneManager:
        """Make other tenants of copies of tenants, for a time, with values replaced where rules say so."""
        return self._lifetime.parts.clones

    @property
    def seeds(self) -> SeedManager:
        """Bring seeds and reference data to existing tenants, and see which tenants lack some."""
        return self._lifetime.parts.seeds

    @property
    def backups(self) -> BackupManager:
        """Back tenants up, and list, verify and remove backups."""
        return self._lifetime.parts.backups

    @property
    def servers(self) -> ServerManager:
        """Add, change, drain and remove the servers that hold tenants, and explain where one is placed."""
        return self._lifetime.parts.server_manager

    @property
    def templates(self) -> TemplateManager:
        """The templates that new tenants are cloned from: list them, build them again, drop those that nobody uses."""
        return self._lifetime.parts.provisioner.templates

    @property
    def recovery(self) -> RecoveryManager:
        """Base backups and WAL of whole servers, and one tenant's database at a point in time."""
        return self._lifetime.parts.recovery

    @property
    def warm_pool(self) -> WarmPool:
        """The databases that are made before their tenants come: count them, make what is missing, drop them."""
        return self._lifetime.parts.provisioner.warm_pool

    @property
    def erasures(self) -> ErasureManager:
        """Complete the erasure of purged tenants, and certify it."""
        return self._lifetime.parts.erasures

    @property
    def exports(self) -> ExportManager:
        """Export a tenant's data as an archive that needs no PostgreSQL."""
        return self._lifetime.parts.exports

    @property
    def internals(self) -> Internals:
        """The machinery below the parts, for what they do not offer.

        Raises:
            NotOpenError: it is not open.
        """
        assembly = self._lifetime.assembly
        # not through ``parts`` where it need not be: every request comes through here
        return self._lifetime.parts.internals if assembly is None else assembly.internals

    # --- seeds ------------------------------------------------------------------------------------------------------

    @overload
    def on_create(self, function: Callable[..., Any], /) -> Seed: ...

    @overload
    def on_create(
        self, /, *, name: str | None = None, version: int = 1, template: bool = False
    ) -> Callable[[Callable[..., Any]], Seed]: ...

    def on_create(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        version: int = 1,
        template: bool = False,
    ) -> Seed | Callable[[Callable[..., Any]], Seed]:
        """Make a seed of a function, which runs for new tenants from then on; the arguments are those of ``seed``.

        Where several programs create tenants, name the function in the setting ``provisioning.seeds`` instead: this
        registers it in the processes that run this line.

        Raises:
            ConfigurationError: as ``seed``.
        """
        make = seed(name=name, version=version, template=template)

        def register(given: Callable[..., Any]) -> Seed:
            made = make(given)
            self._lifetime.seeds.append(made)
            return made

        return register if function is None else register(function)

    # --- housekeeping -----------------------------------------------------------------------------------------------

    async def run_housekeeping(self, *, actor: Actor = SYSTEM) -> HousekeepingReport:
        """Do what is due: end trials, suspend and purge as scheduled, reconcile, prune, sample, export usage.

        For a timer; safe to run from many machines at once.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("run_housekeeping")
        return await self._lifetime.parts.housekeeping.run(actor=actor)

    # --- jobs -------------------------------------------------------------------------------------------------------

    @property
    def jobs(self) -> Jobs:
        """What workers do: when each job is due, who does it, how its last run has ended."""
        return self._lifetime.parts.jobs

    def job(
        self, *, every: float, name: str | None = None
    ) -> Callable[[Callable[[], Awaitable[JobResult | None]]], Job]:
        """Make a job of a coroutine function, which ``tenancy worker`` does from time to time, one process at a time.

        ```python
        @tenancy.job(every=3600)
        async def send_digests() -> None:
            async for tenant in tenancy.each():
                ...
        ```

        No tenant is bound in it. It may be cancelled, and what was cancelled or failed is done again: commit in steps.

        Args:
            every: The seconds from its end to its next beginning, more or less a tenth.
            name: What its row is called; the function's name where None.

        Raises:
            ConfigurationError: there is a job of this name, or it cannot be one.
        """

        def register(function: Callable[[], Awaitable[JobResult | None]]) -> Job:
            made = Job(name or str(getattr(function, "__name__", "")), every, function)
            if made.name in (job.name for job in self._jobs):
                raise ConfigurationError(f"there are two jobs of the name {made.name!r}")
            self._jobs.append(made)
            return made

        return register

    def worker(
        self, jobs: Iterable[str] | None = None, *, stop_seconds: float | None = None, alive_file: Path | None = None
    ) -> Worker:
        """Return a worker that does jobs until its ``stop`` is called: ``await tenancy.worker().run()``.

        Args:
            jobs: The names of those to do; all where None.
            stop_seconds: How long running jobs may go on after ``stop``; ``worker.stop_seconds`` where None.
            alive_file: A file that is touched again and again while the worker's event loop runs.

        Raises:
            ConfigurationError: there is no job of such a name, or there are two.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("worker")
        parts = self._lifetime.parts
        found = {job.name: job for job in (*self._jobs, *parts.built_in_jobs)}
        if len(found) < len(self._jobs) + len(parts.built_in_jobs):
            raise ConfigurationError(f"a job has the name of a built-in one: {', '.join(sorted(found))}")
        names = list(found) if jobs is None else list(dict.fromkeys(jobs))
        if unknown := [name for name in names if name not in found]:
            raise ConfigurationError(
                f"there is no job {', '.join(map(repr, unknown))}; there are {', '.join(sorted(found))}"
            )
        stop = parts.config.worker.stop_seconds if stop_seconds is None else stop_seconds
        return Worker(
            parts.jobs, [found[name] for name in names], self.events, stop_seconds=stop, alive_file=alive_file
        )

    # --- opening and closing ----------------------------------------------------------------------------------------

    async def open(self, *, initialise: bool | None = None, warm: bool = True) -> Self:
        """Connect to the control database and make every part ready. Opening an open one does nothing.

        From then on until it is closed it belongs to the running event loop. Where that one was closed first, what is
        left is given up with a warning, and it belongs to the loop that opens it next.

        Args:
            initialise: Create or upgrade the control database first, put the configured tiers in force and prepare the
                servers, as ``tenancy init`` does. A server that cannot be logged in to is a warning in the log, unless
                the control database is new. None does so for an embedded server alone.
            warm: Whether to connect to busy tenants in the background, as many as ``pool.warm_tenants``, and to refill
                the pool of databases for new tenants after a creation, if ``provisioning.warm_pool_background``.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ControlSchemaError: it is not initialised, or by another version.
            ServerUnavailableError, ProvisioningError: with ``initialise``, the control database is new, and a server
                cannot be prepared.
            ConfigurationError: a setting is missing; a key is not the one that was used under its id; or, with
                ``initialise``, a role would lose access to a database of a server, and nothing was changed.
            WrongEventLoopError: it is open in another event loop or thread.
        """
        await self._lifetime.open(initialise=initialise, warm=warm)
        return self

    async def close(self, *, timeout: float = DRAIN_TIMEOUT) -> None:
        """End every connection and background task. A closed ``Tenancy`` can be opened again.

        Args:
            timeout: How long to wait for subscribers' coroutines, in seconds, before anything is closed: they may use
                this object until then. Those still at work after it are cancelled, which is logged.

        Raises:
            WrongEventLoopError: it is open in another event loop or thread.
        """
        await self._lifetime.close(timeout=timeout)

    async def __aenter__(self) -> Self:
        """Open. Blocks may be nested; the outermost one closes."""
        await self._lifetime.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, if this is the outermost block."""
        await self._lifetime.leave(timeout=DRAIN_TIMEOUT)

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[dict[str, Any]]:
        """Open for as long as an application runs: ``Starlette(..., lifespan=tenancy.lifespan)``."""
        async with self:
            yield {"tenancy": self}

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or sent to another process, which would get connections that it cannot use."""
        raise TypeError(
            "a Tenancy cannot be pickled or copied, since it holds connections; make one in each process, at the "
            "top of a module for example: tenancy = Tenancy(config)"
        )

    @property
    def is_open(self) -> bool:
        """Whether it is open."""
        return self._lifetime.assembly is not None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it belongs to: for ``asyncio.run_coroutine_threadsafe`` in worker threads.

        Raises:
            NotOpenError: it is not open.
        """
        return self._lifetime.loop
