"""``Tenancy``: the one object an application holds. It builds, opens and closes everything else."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import Context
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, ParamSpec, Protocol, Self, TypeVar, overload
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from .audit.actor import SYSTEM, Actor
from .audit.checkpoints import Checkpoint, Signer
from .audit.log import AuditLog
from .authentication.directory import Directory
from .authentication.keys import KeyManager
from .config import TenancyConfig
from .context import bind, current_tenant_or_none, refuse_while_bound, set_current
from .control.database import Administrator, ControlDatabase
from .control.names import Names
from .errors import ConfigurationError, NoTenantError, NotOpenError, TenancyError
from .events import DRAIN_TIMEOUT, EventBus
from .housekeeping import Maintenance, MaintenanceReport
from .loops import HomeLoop
from .metering.metrics import StorageSampler, TenantMetrics
from .metering.policies import Upgrades
from .metering.usage import UsageExporter
from .migrations import AlembicSchema, FleetMigrator, FleetServices, MetadataSchema
from .migrations.environment import register_factory
from .protocols import KeyWrapper, SecretProvider
from .provisioning import Provisioner
from .provisioning.credentials import SecretManager
from .quotas.manager import QuotaManager
from .quotas.rates import Rates
from .registry.lifecycle import check_usable
from .registry.registry import Registry
from .routing import Router, Servers
from .secrets.data_keys import DataKeys
from .secrets.keyring import Keyring
from .secrets.providers import read_secrets
from .secrets.sealed import SealedPasswords
from .tenant import Status, Tenant
from .tenants.domains import DomainManager
from .tenants.manager import TenantManager, TenantRef
from .tenants.tiers import TierRegistry, differing

logger = logging.getLogger("tenancy_orm")

_RENEW_SECONDS = 300.0  # how often a process reads the data keys that nobody tells it of
_SAMPLE_SECONDS = 240.0  # maintenance samples the tenants' databases unless this was done so recently

P = ParamSpec("P")
T = TypeVar("T")


class _ProvidedServer(Protocol):
    control_url: str
    server_url: str
    encryption_key: str

    async def close(self) -> None: ...


class Tenancy:
    """A multi-tenant application's access to its tenants and their databases.

    Building one does no I/O; ``open`` (or ``async with``, or ``lifespan``) connects. One object serves a whole process.

    Args:
        config: What to connect to and how; from ``TENANCY_*`` variables where None.

    Attributes:
        events (EventBus): Where to subscribe to what happens in this process.
        rates (Rates): How many requests a second each tenant may make of this process.
    """

    def __init__(self, config: TenancyConfig | None = None) -> None:
        self.configured = config or TenancyConfig.from_env()
        self.events = EventBus()
        # how many requests a second each tenant may make of this process: state of its own, which nothing opens
        self.rates = Rates(self.configured.tiers, processes=self.configured.rate_processes)
        self._parts: _Parts | None = None
        self._home: HomeLoop | None = None  # from the beginning of ``open`` to the end of ``close``
        self._claims = 0  # calls of these two under way
        self._claiming = threading.Lock()  # it protects the two above against other threads
        self._opening = asyncio.Lock()
        self._entered = 0  # ``async with`` blocks, lifespans included

    def __repr__(self) -> str:
        """Tell whether it is open; no configuration, which holds credentials."""
        return f"<Tenancy {'open' if self._parts else 'closed'}>"

    # --- opening and closing ----------------------------------------------------------------------------------------

    async def open(self, *, initialise: bool | None = None) -> Self:
        """Connect to the control database and make every part ready. Opening an open one does nothing.

        From then on until it is closed it belongs to the running event loop. Where that one was closed first, what is
        left is given up with a warning, and it belongs to the loop that opens it next.

        Args:
            initialise: Create or upgrade the control database first, as ``tenancy init`` does. None does so for an
                embedded server alone.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ControlSchemaError: it is not initialised, or by another version.
            ConfigurationError: a setting is missing.
            WrongEventLoopError: it is open in another event loop or thread.
        """
        with self._at_home():
            async with self._opening:
                if self._parts is None:
                    self._parts = await _Parts.build(self.configured, self.events, initialise=initialise)
        return self

    async def close(self, *, timeout: float = DRAIN_TIMEOUT) -> None:
        """End every connection and background task. A closed ``Tenancy`` can be opened again.

        Args:
            timeout: How long to wait for subscribers' coroutines, in seconds, before anything is closed: they may use
                this object until then. Those still at work after it are cancelled, which is logged.

        Raises:
            WrongEventLoopError: it is open in another event loop or thread.
        """
        with self._at_home():
            try:
                await self.events.drain(timeout)
            finally:
                try:
                    await self._close_parts()
                finally:
                    await self.events.cancel()

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        """Take the running event loop for this object's own, unless it has one; it has none while it is closed."""
        with self._claiming:
            if self._home is not None and self._home.is_closed:
                self._forget()
            if self._home is None:
                self._home = self.events.home = self.rates.home = HomeLoop()
                self._opening = asyncio.Lock()
            self._home.check()
            home = self._home
            self._claims += 1
        try:
            yield
        finally:
            with self._claiming:
                if home is self._home:
                    self._claims -= 1
                    if not self._claims and self._parts is None:
                        self._home = self.events.home = self.rates.home = None

    def _forget(self) -> None:
        """Give up what belongs to an event loop that was closed first: nothing can be closed there any more."""
        if self._parts is not None:
            logger.warning(
                "the event loop of an open Tenancy was closed; its connections and background tasks are given up. "
                "Close a Tenancy in the loop that opened it"
            )
        self._home = self._parts = None
        self._claims = self._entered = 0
        self.events.forget()

    async def _close_parts(self) -> None:
        async with self._opening:
            parts, self._parts = self._parts, None
            if parts is not None:
                # A caller that is cancelled does not keep the remaining parts open. And what the parts write down at
                # their end is for all tenants, so they run unbound.
                loop = asyncio.get_running_loop()
                await asyncio.shield(loop.create_task(parts.close(), context=Context()))

    async def __aenter__(self) -> Self:
        """Open. Blocks may be nested; the outermost one closes."""
        await self.open()
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, if this is the outermost block."""
        self._entered -= 1
        if self._entered == 0:
            await self.close()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[dict[str, Any]]:
        """Open for as long as an application runs: ``Starlette(..., lifespan=tenancy.lifespan)``."""
        async with self:
            yield {"tenancy": self}

    @property
    def is_open(self) -> bool:
        """Whether it is open."""
        return self._parts is not None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it belongs to: for ``asyncio.run_coroutine_threadsafe`` in worker threads.

        Raises:
            NotOpenError: it is not open.
        """
        home = self._home
        if self._parts is None or home is None or home.loop is None:
            raise NotOpenError("this Tenancy is not open; use it within its lifespan, or: async with tenancy: ...")
        return home.loop

    @property
    def _open(self) -> _Parts:
        if self._parts is None:
            raise NotOpenError("this Tenancy is not open; use it within its lifespan, or: async with tenancy: ...")
        return self._parts

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> TenancyConfig:
        """The configuration in force: once open, with the embedded server's addresses and keys filled in."""
        return self._parts.config if self._parts else self.configured

    @property
    def tenants(self) -> TenantManager:
        """Create, find, change and remove tenants."""
        return self._open.tenants

    @property
    def keys(self) -> KeyManager:
        """Issue, rotate and revoke API keys."""
        return self._open.keys

    @property
    def quotas(self) -> QuotaManager:
        """Limits and usage."""
        return self._open.quotas

    @property
    def tiers(self) -> TierRegistry:
        """The tiers in force; ``tiers.apply(tenancy.config.tiers)`` changes them to the configured ones."""
        return self._open.tiers

    @property
    def upgrades(self) -> Upgrades:
        """Evaluates ``TenancyConfig.upgrade_policies``; ``run_maintenance`` does too."""
        return self._open.upgrades

    @property
    def usage_exporter(self) -> UsageExporter:
        """Sends the usage of ended periods to ``TenancyConfig.usage_sender``; ``run_maintenance`` does too.

        Raises:
            ConfigurationError: there is no ``usage_sender``.
        """
        if (exporter := self._open.usage_exporter) is None:
            raise ConfigurationError("give TenancyConfig a usage_sender to export usage")
        return exporter

    @property
    def metrics(self) -> TenantMetrics:
        """What was sampled of the tenants' databases, and sums over the registry."""
        return self._open.metrics

    @property
    def sampler(self) -> StorageSampler:
        """Samples the tenants' databases; ``run_maintenance`` does too."""
        return self._open.sampler

    @property
    def audit(self) -> AuditLog:
        """What was done, by whom, when."""
        return self._open.audit

    @property
    def migrations(self) -> FleetMigrator:
        """Upgrade and inspect all tenants' schemas."""
        return self._open.migrations

    @property
    def domains(self) -> DomainManager:
        """Claim and verify tenants' own domains."""
        return self._open.domains

    @property
    def provisioner(self) -> Provisioner:
        """Databases, templates, ``reconcile``."""
        return self._open.provisioner

    @property
    def secrets(self) -> SecretManager:
        """Rotate the roles' passwords, and the keys that seal them."""
        return self._open.secrets

    @property
    def directory(self) -> Directory:
        """The cached look-up of keys and tenants."""
        parts = self._parts
        # not by way of _open where it need not be: every request comes through here
        return self._open.directory if parts is None else parts.directory

    @property
    def router(self) -> Router:
        """Engines and connections."""
        return self._open.router

    @property
    def registry(self) -> Registry:
        """Rows of the control database's tenants."""
        return self._open.registry

    @property
    def control(self) -> ControlDatabase:
        """The control database."""
        return self._open.control

    @property
    def servers(self) -> Servers:
        """The PostgreSQL servers that hold tenants."""
        return self._open.servers

    async def run_maintenance(self, *, actor: Actor = SYSTEM) -> MaintenanceReport:
        """Do what is due: end trials, scheduled suspensions, purges after retention, reconcile, housekeeping.

        For a timer; safe to run from many machines at once.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("run_maintenance")
        return await self._open.maintenance.run(actor=actor)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def session(
        self, tenant: TenantRef | None = None, *, operator: bool = False, **options: Any
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session on a tenant's own database: ``async with tenancy.session() as session``.

        What is not committed is rolled back at the end, as with any ``AsyncSession``.

        Args:
            tenant: Whose database: a slug, an id or a ``Tenant``; the bound tenant's where None.
            operator: Admit a tenant in maintenance.
            options: Further arguments of ``AsyncSession``.

        Raises:
            NoTenantError: no tenant is given and none is bound.
            CrossTenantError: another tenant than ``tenant`` is bound.
            TenantNotFoundError, TenantUnavailableError: it does not exist, or its status admits no session.
            AdmissionEndedError: what the request was let in with was revoked, has expired, or may do less by now; also
                at any later statement.
            CheckoutTimeoutError: (at the first statement) no connection became free in time.
            ServerUnavailableError: (at the first statement) the tenant's server does not answer.
            MarkerMismatchError: (at the first statement) the database is not that tenant's.
        """
        return _SessionScope(self._open, tenant, operator, options)

    @asynccontextmanager
    async def transaction(
        self, tenant: TenantRef | None = None, *, operator: bool = False, **options: Any
    ) -> AsyncIterator[AsyncSession]:
        """Open a session whose work is committed when the body succeeds, and rolled back when it raises.

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
        found = await self._open.resolve(tenant)
        with bind(found):
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
        return BoundTenants(self._open.tenants.iterate(status=tuple(status), tier=tier))

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

    # --- textual SQL ------------------------------------------------------------------------------------------------

    async def fetch_all(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> list[Row[*tuple[Any, ...]]]:
        """Run textual SQL with ``:name`` parameters on a tenant and return all rows.

        Raises:
            TenancyError: as ``session``.
        """
        async with self.session(tenant, operator=operator) as session:
            return list((await session.execute(text(sql), dict(parameters or {}))).all())

    async def fetch_one(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> Row[*tuple[Any, ...]] | None:
        """Run textual SQL with ``:name`` parameters on a tenant and return the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        async with self.session(tenant, operator=operator) as session:
            return (await session.execute(text(sql), dict(parameters or {}))).first()

    async def fetch_value(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> Any:
        """Run textual SQL with ``:name`` parameters on a tenant and return the first column of the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        async with self.session(tenant, operator=operator) as session:
            return await session.scalar(text(sql), dict(parameters or {}))

    async def execute(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> int:
        """Run one textual statement with ``:name`` parameters on a tenant, commit, and return how many rows it touched.

        Raises:
            TenancyError: as ``session``.
        """
        async with self.transaction(tenant, operator=operator) as session:
            result = await session.connection()
            return (await result.execute(text(sql), dict(parameters or {}))).rowcount


class BoundTenants:
    """An iterator over tenants that binds each in turn.

    An ``async for`` tells its iterator nothing when the loop is left early. This is a plain object, so that CPython
    finalises it right there, in the same context, and the binding ends with the loop; an async generator would be
    closed later, elsewhere.
    """

    def __init__(self, source: AsyncIterator[Tenant]) -> None:
        refuse_while_bound("iterating over the fleet")
        self._source = source
        self._bound: Tenant | None = None

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Tenant:
        """Bind and return the next tenant.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, which this would replace.
        """
        self.release()
        refuse_while_bound("iterating over the fleet")
        tenant = await anext(self._source)
        set_current(tenant)
        self._bound = tenant
        return tenant

    def release(self) -> None:
        """End the binding of the tenant returned last, if it is in force here."""
        if self._bound is not None and current_tenant_or_none() is self._bound:
            set_current(None)
        self._bound = None

    def __del__(self) -> None:
        """End the binding when the loop is left."""
        self.release()


class _SessionScope:
    """``async with tenancy.session()``: resolves the tenant, then is the router's session."""

    __slots__ = ("_inner", "_operator", "_options", "_parts", "_tenant")

    def __init__(self, parts: _Parts, tenant: TenantRef | None, operator: bool, options: dict[str, Any]) -> None:
        self._parts = parts
        self._tenant = tenant
        self._operator = operator
        self._options = options
        self._inner: AbstractAsyncContextManager[AsyncSession] | None = None

    async def __aenter__(self) -> AsyncSession:
        tenant = await self._parts.resolve(self._tenant)
        bound = current_tenant_or_none()
        check_usable(tenant, operator=self._operator or (bound is not None and bound.operator))
        self._inner = self._parts.router.session(tenant, **self._options)
        session = await self._inner.__aenter__()
        if bound is not None and bound.admission is not None:
            session.sync_session.admission = bound.admission  # type: ignore[attr-defined]
        return session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._inner is None:
            return None
        return await self._inner.__aexit__(kind, error, traceback)


class _Parts:
    """Everything an open ``Tenancy`` is made of."""

    config: TenancyConfig
    control: ControlDatabase
    keyring: Keyring
    names: Names
    audit: AuditLog
    registry: Registry
    directory: Directory
    keys: KeyManager
    quotas: QuotaManager
    metrics: TenantMetrics
    sampler: StorageSampler
    servers: Servers
    router: Router
    provisioner: Provisioner
    migrations: FleetMigrator
    tenants: TenantManager
    domains: DomainManager
    maintenance: Maintenance
    secrets: SecretManager
    tiers: TierRegistry
    upgrades: Upgrades
    usage_exporter: UsageExporter | None

    def __init__(self, config: TenancyConfig, events: EventBus, provided: _ProvidedServer | None) -> None:
        self.config = config
        self.events = events
        self._provided = provided
        self._opened: list[Callable[[], Awaitable[None]]] = []
        self._data_keys: DataKeys | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def build(cls, config: TenancyConfig, events: EventBus, *, initialise: bool | None) -> _Parts:
        provided = None
        if config.is_embedded:
            provided = await _provide(config.control_url)
            config = config.replace(
                control_url=provided.control_url,
                servers=config.servers or {"default": provided.server_url},
                encryption_keys=config.encryption_keys or {"1": provided.encryption_key},
            )
        parts = cls(config, events, provided)
        try:
            await parts._open(provided is not None if initialise is None else initialise)
        except BaseException:
            await asyncio.shield(parts.close())
            raise
        return parts

    async def _open(self, initialise: bool) -> None:
        events = self.events
        if provided := self._provided:
            self._opened.append(provided.close)
        self._close_with(self.config.secrets, self.config.key_wrapper)
        config = self.config = await read_secrets(self.config)
        self.control = ControlDatabase(
            config.control_url,
            pool_size=config.control_pool_size,
            connect_timeout=config.connect_timeout,
            name_prefix=config.name_prefix,
        )
        self._opened += [self.control.close, self._end_tasks]
        self.servers = Servers(config)
        self._opened.append(self.servers.close)
        if initialise:
            await self.control.upgrade(administrator=self._administrator())
        await self.control.open()
        if config.key_wrapper is not None:
            self._data_keys = DataKeys(self.control, config.key_wrapper)
            # those that are configured as well still open what they have sealed
            keys = {**config.sealing_keys, **await self._data_keys.open()}
            config = self.config = config.replace(encryption_keys=keys)
        self.keyring = Keyring(config.sealing_keys)
        self.names = Names(config.name_prefix, self.control.installation)
        self.audit = AuditLog(self.control, Signer(config.sealing_keys))
        await self.audit.keep_public_keys()
        if self._data_keys is not None:
            self._data_keys.on_read(self.audit.renew_keys)
            self._start(self._keep_keys(self._data_keys))
        self.registry = Registry(self.control, self.audit, bills=config.usage_sender is not None)
        self.sealed = SealedPasswords(self.control, self.audit, self.keyring, self._data_keys)
        self.directory = Directory(self.control, config, events, audit=self.audit)
        self.router = Router(
            config=config,
            servers=self.servers,
            keyring=self.keyring,
            installation=self.control.installation,
            events=events,
            passwords=self._passwords,
        )
        self._opened.append(self.router.close)
        self.directory.on_invalidate(self._forget)
        self._build_provisioning()
        self.keys = KeyManager(self.control, config, self.directory, self.audit, events)
        self.quotas = QuotaManager(self.control, config, events, self.audit)
        self._opened.append(self.quotas.close)
        self.directory.on_invalidate(self.quotas.invalidate)
        self.metrics = TenantMetrics(self.control)
        self.sampler = StorageSampler(self.control, self.quotas, self.provisioner.connect_admin)
        self.tenants = TenantManager(
            config=config,
            registry=self.registry,
            directory=self.directory,
            provisioner=self.provisioner,
            names=self.names,
            keyring=self.keyring,
            events=events,
        )
        self.domains = DomainManager(self.control, self.audit)
        self._build_billing()
        urgent = {"end_excessive_sessions": self.provisioner.end_excessive_sessions}
        self.maintenance = Maintenance(config, self.registry, self.tenants, self._chores(), urgent=urgent)
        addresses = {name: (server.host, server.port) for name, server in self.servers.items()}
        await self.control.note_servers(addresses)
        self.tiers = TierRegistry(self.control, self.audit)
        await self._settle_tiers(initialise)
        if initialise:
            for name in self.servers:
                await self.provisioner.prepare_server(name)
        # before it is open: one that is given up meanwhile has begun to listen
        self._opened.append(self.directory.close)
        await self.directory.open()

    async def _settle_tiers(self, initialise: bool) -> None:
        """Put the configured tiers in force where that was asked for, or where there are none yet."""
        if initialise or not (in_force := await self.tiers.in_force()):
            await self.tiers.apply(self.config.tiers)
        elif names := differing(in_force, self.config.tiers):
            logger.warning(
                "the configured tiers %s are not the ones in force, which stay; run tenancy tiers apply to change them",
                ", ".join(names),
            )

    def _administrator(self) -> Administrator | None:
        """Who administers the control database's server, where that is one of the tenants' servers."""
        address = self.control.address
        return next((s.connect_admin for s in self.servers.values() if (s.host, s.port) == address), None)

    def _build_provisioning(self) -> None:
        config = self.config
        schema: AlembicSchema | MetadataSchema
        if config.migrations is not None:
            schema = AlembicSchema(config.migrations)
        elif config.metadata is not None:
            schema = MetadataSchema(config.metadata)
        else:
            raise ConfigurationError("give TenancyConfig a migrations directory, or metadata to create tables from")
        self.provisioner = Provisioner(
            config=config,
            control=self.control,
            registry=self.registry,
            servers=self.servers,
            names=self.names,
            keyring=self.keyring,
            schema=schema,
            events=self.events,
        )
        self._opened.append(self.provisioner.close)
        self.secrets = SecretManager(
            config=config,
            registry=self.registry,
            sealed=self.sealed,
            servers=self.servers,
            names=self.names,
            keyring=self.keyring,
            data_keys=self._data_keys,
        )
        self._opened.append(self.secrets.close)
        services = FleetServices(
            config=config,
            registry=self.registry,
            servers=self.servers,
            names=self.names,
            provisioner=self.provisioner,
            events=self.events,
        )
        self.migrations = FleetMigrator(services)

    def _build_billing(self) -> None:
        async def change_tier(tenant_id: UUID, tier: str, expected: str, actor: Actor) -> None:
            await self.tenants.update(tenant_id, tier=tier, expected_tier=expected, actor=actor)

        self.upgrades = Upgrades(self.control, self.config, self.events, self.audit, change_tier)
        sender = self.config.usage_sender
        self.usage_exporter = None if sender is None else UsageExporter(self.control, sender, self.events)
        if (close := getattr(sender, "close", None)) is not None:
            self._opened.append(close)

    def _chores(self) -> dict[str, Callable[[], Awaitable[Any]]]:
        billing: dict[str, Callable[[], Awaitable[Any]]] = {}
        if self.config.upgrade_policies:
            billing["evaluate_upgrades"] = self.upgrades.evaluate
        if self.usage_exporter is not None:
            billing["export_usage"] = self.usage_exporter.run
            billing["prune_usage"] = self.usage_exporter.prune
        return {
            "reconcile": self.provisioner.reconcile,
            "expire_former_slugs": self.registry.expire_former_slugs,
            "finish_rotations": self.secrets.finish_rotations,
            "prepare_audit_partitions": self.audit.ensure_partitions,
            "prune_audit": self._prune_audit,
            "clean_quotas": self.quotas.clean,
            "sample_tenants": lambda: self.sampler.run(unless_within=_SAMPLE_SECONDS),
            "prune_metrics": self.metrics.prune,
            # after the sizes were measured, which the policies may be about
            **billing,
        }

    async def _prune_audit(self) -> Checkpoint | None:
        if self.config.audit_retention_seconds == 0:
            return None
        return await self.audit.prune(before=datetime.now(UTC) - timedelta(seconds=self.config.audit_retention_seconds))

    def _close_with(self, *providers: SecretProvider | KeyWrapper | None) -> None:
        self._opened.extend(provider.close for provider in providers if provider is not None)

    def _forget(self, tenant_id: UUID | None) -> None:
        if tenant_id is not None:
            self.router.retire(tenant_id)
        elif self._data_keys is not None:
            # there may be a new one: what is sealed from now on should be sealed with it
            self._start(self._renew_keys(self._data_keys))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # unbound: whoever happens to run now
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _passwords(self, tenant_id: UUID) -> Sequence[bytes]:
        """Read a tenant's sealed passwords anew, for a login that was refused: what is remembered of it is too old."""
        found = await self.sealed.of(tenant_id)
        self.directory.invalidate(tenant_id=tenant_id)
        return found

    async def _keep_keys(self, data_keys: DataKeys) -> None:
        """Learn of new data keys in a process that hears of no change, so that old ones can be forgotten."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            await self._renew_keys(data_keys)

    async def _renew_keys(self, data_keys: DataKeys) -> None:
        try:
            await data_keys.renew(self.keyring)
        except TenancyError as exc:
            logger.warning("the data keys cannot be read anew (%s); what they seal is opened when it is needed", exc)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Close the parts in reverse order; one that fails does not keep the others open."""
        errors = []
        while self._opened:
            try:
                await self._opened.pop()()
            except Exception as exc:  # noqa: BLE001 - raised below, once everything else is closed
                errors.append(exc)
        if errors:
            raise errors[0]

    async def resolve(self, ref: TenantRef | None) -> Tenant:
        """The tenant that code may use now, as the directory knows it: the bound one, or the one it names.

        An ambient binding is never widened: while a tenant is bound, no other can be named.
        """
        bound = current_tenant_or_none()
        if ref is None:
            if bound is None:
                raise NoTenantError
            return await self.directory.tenant(bound.id)
        return await self.directory.tenant(ref)


async def _provide(url: str) -> _ProvidedServer:
    """Start the server that an ``embedded`` URL asks for, through the entry point that knows how."""
    scheme = url.partition(":")[0]
    for entry in entry_points(group="tenancy_orm.servers", name=scheme):
        provided: _ProvidedServer = await entry.load()().open(url)
        return provided
    raise ConfigurationError(f"no server provider is installed for control_url {scheme!r}")


# For ``alembic`` as the program that runs: migrations cannot import this module.
register_factory(Tenancy)
