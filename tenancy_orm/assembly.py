"""``Assembly``: builds the parts of an open ``Tenancy``, in order, and closes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import Context
from importlib.metadata import entry_points
from typing import Any, Protocol
from uuid import UUID

from .adoption import AdoptionManager
from .audit.checkpoints import Signer
from .audit.log import AuditLog
from .authentication.directory import Directory
from .authentication.invitation_text import InvitationSigner
from .authentication.keys import KeyManager
from .authentication.members import MemberManager
from .authentication.revocations import RevocationManager
from .backups import BackupKeys, BackupManager, BackupServices, Stores
from .clones import CloneManager
from .config import TenancyConfig
from .connections import ConnectionLeases
from .control.database import ControlDatabase, head
from .control.names import Names
from .errors import ConfigurationError, TenancyError
from .events import EventBus, ServerChanged
from .exports import ErasureManager, ExportManager
from .housekeeping import Housekeeping
from .internals import Internals
from .jobs import Job, Jobs
from .metering.metrics import StorageSampler, TenantMetrics
from .metering.policies import TierPolicies
from .metering.usage import UsageExporter
from .migrations import AlembicSchema, FleetServices, MetadataSchema
from .moves import MoveManager
from .opening import check_servers, ensure_tiers, prepare_servers, upgrade_control
from .operations import OperationManager, Operations
from .postgres.dsn import Dsn
from .protocols import KeyWrapper, SecretProvider
from .provisioning import Provisioner
from .provisioning.preparation.plan import PreparationPlan
from .provisioning.rights.public_access import refuse_loss
from .quotas.manager import QuotaManager
from .quotas.rates import Rates
from .registry.registry import Registry
from .restores import RegistryRebuilding, RestoreManager
from .restores.recovery import RecoveryManager
from .restores.tombstones import Tombstones
from .rotation import SecretManager
from .routing import Router
from .routing.consistency import ConsistencyTokens
from .routing.sessions import detours
from .runs import FleetMigrator
from .runs.background import BackgroundUpgrades
from .runs.catch_up import CatchUp
from .runs.compatibility import Compatibility, load_compatibility
from .runs.first_use import FirstUse
from .runs.records import RunRecords
from .runs.served import RevisionGate
from .schedules import ScheduleManager
from .secrets.data_keys import DataKeys
from .secrets.key_checks import check_keys, report_unknown_keys
from .secrets.keyring import Keyring
from .secrets.providers import read_secrets
from .secrets.sealed import SealedPasswords
from .secrets.signing import TenantSigner
from .seeds import Seed, SeedManager
from .seeds.creation import NewTenantSeeds
from .seeds.loading import SeedSet
from .seeds.schema import SeededSchema
from .server_management.manager import ServerManager
from .servers import Servers
from .servers.placement import Placer
from .servers.sealed import SealedAddresses
from .tenants.domain_upkeep import DomainUpkeep
from .tenants.domains import ConfiguredTextRecords, DomainManager
from .tenants.manager import TenantManager
from .tenants.tiers import TierRegistry
from .warming import NewTenantConnections, Warming
from .worker import built_in_jobs

logger = logging.getLogger("tenancy_orm")

_UPDATE_SECONDS = 300.0  # how often a process reads the data keys, in case it missed the notification of a new one
_SERVERS_SECONDS = 60.0  # how often a process reads the servers' rows, in case it missed a notification


class _ProvidedServer(Protocol):
    control_url: str
    server_url: str
    encryption_key: str

    async def close(self) -> None: ...


class Assembly:
    """Everything an open ``Tenancy`` is made of; ``build`` opens it in order, ``close`` closes it in reverse.

    Args:
        config: What to connect to and how.
        events: Where the parts announce what happens.
        rates: The request rates of this process, which outlive what is opened here.
        provided: The embedded server that was started for them, if any.
        seeds: What ``Tenancy.on_create`` has made, and will make.
    """

    config: TenancyConfig
    control: ControlDatabase
    keyring: Keyring
    names: Names
    signer: Signer
    audit: AuditLog
    registry: Registry
    directory: Directory
    keys: KeyManager
    members: MemberManager
    revocations: RevocationManager
    quotas: QuotaManager
    metrics: TenantMetrics
    schedules: ScheduleManager
    sampler: StorageSampler
    backups: BackupManager
    servers: Servers
    server_manager: ServerManager
    router: Router
    provisioner: Provisioner
    migrations: FleetMigrator
    seeds: SeedManager
    catch_up: CatchUp
    compatibility: Compatibility | None
    first_use: FirstUse
    tenants: TenantManager
    adoption: AdoptionManager
    clones: CloneManager
    domains: DomainManager
    housekeeping: Housekeeping
    operations: OperationManager
    restores: RestoreManager
    rebuilding: RegistryRebuilding
    jobs: Jobs
    built_in_jobs: Sequence[Job]
    sealed: SealedPasswords
    addresses: SealedAddresses
    secrets: SecretManager
    tiers: TierRegistry
    tier_policies: TierPolicies
    usage_exporter: UsageExporter | None
    moves: MoveManager
    erasures: ErasureManager
    exports: ExportManager
    internals: Internals

    def __init__(
        self,
        config: TenancyConfig,
        events: EventBus,
        rates: Rates,
        provided: _ProvidedServer | None,
        seeds: Sequence[Seed] = (),
    ) -> None:
        self.config = config
        self.events = events
        self.rates = rates
        self._provided = provided
        self._registered_seeds = seeds
        self._opened: list[Callable[[], Awaitable[None]]] = []
        self._data_keys: DataKeys | None = None
        self._is_new = False  # whether this opening has initialised the control database for the first time
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def build(
        cls,
        config: TenancyConfig,
        events: EventBus,
        rates: Rates,
        *,
        initialise: bool | None,
        seeds: Sequence[Seed] = (),
    ) -> Assembly:
        """Build the parts and open them. Where one fails, those that are open already are closed.

        Raises:
            TenancyError: as ``Tenancy.open``.
        """
        provided = None
        if config.is_embedded:
            provided = await _provide(config.control_url)
            config = config.replace(
                control_url=provided.control_url,
                servers=config.servers or {"default": provided.server_url},
                encryption_keys=config.encryption_keys or {"1": provided.encryption_key},
            )
        parts = cls(config, events, rates, provided, seeds)
        try:
            await parts._open(provided is not None if initialise is None else initialise)
        except BaseException:
            await asyncio.shield(parts.close())
            raise
        return parts

    async def _open(self, initialise: bool) -> None:
        if provided := self._provided:
            self._opened.append(provided.close)
        self._close_with(self.config.secrets.provider, self.config.secrets.key_wrapper)
        # before anything is changed: its declaration may be wrong
        self.compatibility = await load_compatibility(self.config)
        await self._open_control(initialise)
        self._build_parts()
        await check_servers(self.config, self.control, self.servers, self.leases)
        self.tiers = TierRegistry(self.control, self.audit)
        weights = await ensure_tiers(self.tiers, self.config, initialise=initialise)
        # unbound: whoever opens it may be bound to a tenant of another one
        Context().run(self.router.reweigh, weights)
        if initialise:
            await prepare_servers(self.servers, self.provisioner, is_new=self._is_new)
        self.servers.on_change(self._announce_server)
        self._start(self._refresh_servers_repeatedly())
        # before it is open: an opening that is cancelled has begun to listen
        self._opened.append(self.directory.close)
        await self.directory.open()
        if count := self.config.pool.warm_tenants:
            self._start_warming(count)

    async def _open_control(self, initialise: bool) -> None:
        """Open the control database, and what seals the passwords and signs the audit log in it."""
        config = self.config = await read_secrets(self.config)
        dsn = Dsn.parse(config.control_url)
        self.control = ControlDatabase(
            dsn,
            pool_size=config.control.pool_size,
            connect_timeout=dsn.connect_timeout or config.pool.connect_timeout,
            name_prefix=config.name_prefix,
            direct=config.listen_dsn,
        )
        self._opened += [self.control.close, self._end_tasks]
        self.servers = Servers(config)
        self._opened.append(self.servers.close)
        if initialise:
            if self._provided is None:
                # first, so that nothing has changed where it refuses; an embedded server is nobody else's
                refuse_loss((await PreparationPlan.read_from(config, self.control, self.servers)).closings)
            revision = await self.control.revision()
            self._is_new = revision is None
            await upgrade_control(config, self.control, self.servers)
            self.control.upgraded_from = revision if revision != head() else None
        await self.control.open()
        await check_keys(self.control, encryption_keys=config.sealing_keys, peppers=config.keys.decoded_peppers)
        if config.secrets.key_wrapper is not None:
            self._data_keys = DataKeys(self.control, config.secrets.key_wrapper)
            # those that are configured as well still open what they have sealed
            keys = {**config.sealing_keys, **await self._data_keys.open()}
            config = self.config = config.replace(encryption_keys=keys)
        self.keyring = Keyring(config.sealing_keys)
        await report_unknown_keys(self.control, config.sealing_keys)
        self.names = Names(config.name_prefix, self.control.installation)
        self.control.check_names(self.names)
        self.signer = Signer(config.sealing_keys)
        self.audit = AuditLog(self.control, self.signer)
        self._follow_servers()
        await self.servers.refresh(bootstrapping=True)
        await self.audit.vouch_for_keys()
        if self._data_keys is not None:
            self._data_keys.on_read(self.audit.add_keys)
            self._start(self._update_keys_repeatedly(self._data_keys))

    def _build_parts(self) -> None:
        self._build_routing()
        self._build_provisioning()
        self._build_secrets()
        self._build_credentials()
        self._build_metering()
        self._build_tenants()
        self._build_operations()
        self._build_upkeep()
        self.internals = Internals(
            control=self.control,
            registry=self.registry,
            directory=self.directory,
            servers=self.servers,
            router=self.router,
            leases=self.leases,
            provisioner=self.provisioner,
            sampler=self.sampler,
            rates=self.rates,
            tier_policies=self.tier_policies,
            task_signer=self._build_task_signer(),
            _usage_exporter=self.usage_exporter,
        )

    def _build_routing(self) -> None:
        """Build what a request passes on its way to a database, and let changes of tenants reach it."""
        config, events = self.config, self.events
        self.registry = Registry(self.control, self.audit, usage_billed=config.metering.usage_sender is not None)
        self.sealed = SealedPasswords(self.control, self.audit, self.keyring, self._data_keys)
        self.directory = Directory(self.control, config, events, audit=self.audit)
        self.leases = ConnectionLeases(
            self.control, self.servers, events, self.names, at_most=config.pool.max_connections
        )
        self._opened.append(self.leases.close)
        self.router = Router(
            config=config,
            servers=self.servers,
            keyring=self.keyring,
            installation=self.control.installation,
            events=events,
            passwords=self.sealed,
            ask=self.control.ask_for_connections,
            is_listening=lambda: self.directory.listening,
            tokens=self._build_consistency_tokens(),
            leases=self.leases,
        )
        self._opened.append(self.router.close)
        self.servers.on_change(self.router.server_changed)
        self.directory.on_connection_request(self.router.give_up)
        self.directory.on_lease_call(self.leases.called)
        self.directory.on_invalidate(self._forget)
        self.directory.on_pause(self.router.pause)
        detours(self.router).use(self.directory.tenant, self.directory.look_again)
        self.directory.on_schema_change(self.router.schema_changed)
        self.directory.on_server_change(self.servers.refresh_soon)
        self.sealed.on_read(self.directory.invalidate)

    def _build_provisioning(self) -> None:
        config = self.config
        schema: AlembicSchema | MetadataSchema
        if config.migrations is not None:
            schema = AlembicSchema(config.migrations, settings=config.migration)
        elif config.metadata is not None:
            schema = MetadataSchema(config.metadata)
        else:
            raise ConfigurationError(
                "neither migrations nor metadata is set: name the directory of your migrations, or your models' "
                'metadata, as metadata = "models:Base.metadata" in tenancy.toml, TENANCY_METADATA or '
                "TenancyConfig(metadata=Base.metadata)"
            )
        seeds, timeout = SeedSet(config, self._registered_seeds), config.provisioning.seed_timeout
        seeds.check()
        self.provisioner = Provisioner(
            config=config,
            control=self.control,
            registry=self.registry,
            servers=self.servers,
            names=self.names,
            keyring=self.keyring,
            schema=SeededSchema(schema, seeds, timeout=timeout),
            unfilled=schema,
            events=self.events,
            seeds=NewTenantSeeds(seeds, self.router, timeout=timeout),
            first_connections=NewTenantConnections(self.servers, self.router),
            requests_wait=lambda server: bool(self.router.waiting().get(server)),
        )
        self._opened.append(self.provisioner.close)
        self._build_migrations(schema, seeds)

    def _build_migrations(self, schema: AlembicSchema | MetadataSchema, seeds: SeedSet) -> None:
        services = FleetServices(
            config=self.config,
            control=self.control,
            keyring=self.keyring,
            registry=self.registry,
            servers=self.servers,
            names=self.names,
            provisioner=self.provisioner,
            schema=schema,
            events=self.events,
        )
        self.migrations = FleetMigrator(services)
        self.seeds = SeedManager(services, seeds, self.router)
        self.catch_up = CatchUp(self.migrations, schema)
        self.first_use = FirstUse(self.catch_up, self.control, schema, self.compatibility)
        self._opened.append(self.first_use.close)
        self.directory.before_use(self.first_use.before_use)
        if self.compatibility is not None:
            gate = RevisionGate(self.compatibility, self.registry, self.events, start=self._start)
            self.directory.judge_by(gate.judge)

    def _build_secrets(self) -> None:
        config = self.config
        self._stores = Stores(config.backup)
        self._backup_keys = BackupKeys(self.control, self.audit, self.keyring, self._data_keys, self._stores)
        self.secrets = SecretManager(
            config=config,
            registry=self.registry,
            sealed=self.sealed,
            servers=self.servers,
            names=self.names,
            keyring=self.keyring,
            data_keys=self._data_keys,
            addresses=self.addresses,
            audit=self.audit,
            backup_keys=self._backup_keys,
        )
        self._opened.append(self.secrets.close)

    def _build_credentials(self) -> None:
        self.keys = KeyManager(self.control, self.config, self.directory, self.audit, self.events)
        read = None if self._data_keys is None else self._data_keys.open
        signer = InvitationSigner(self.control.installation, self.config.sealing_keys, read=read)
        if self._data_keys is not None:
            self._data_keys.on_read(signer.keys.add)
        self.members = MemberManager(self.control, self.config.members, self.directory, self.audit, self.events, signer)
        self._opened.append(self.members.close)
        self.revocations = RevocationManager(self.control, self.directory, self.audit, self.events)

    def _build_metering(self) -> None:
        self.quotas = QuotaManager(self.control, self.config, self.events, self.audit)
        self._opened.append(self.quotas.close)
        self.directory.on_invalidate(self.quotas.invalidate)
        self.metrics = TenantMetrics(self.control)
        self.schedules = ScheduleManager(self.control, self.audit)
        self.sampler = StorageSampler(self.control, self.quotas, self.provisioner)

    def _build_tenants(self) -> None:
        config, provided = self.config, self._provided
        self._placer = Placer(config, self.control, self.servers)
        self.server_manager = ServerManager(
            config=config,
            control=self.control,
            audit=self.audit,
            servers=self.servers,
            addresses=self.addresses,
            registry=self.registry,
            provisioner=self.provisioner,
            placer=self._placer,
            leases=self.leases,
            embedded=provided is not None and config.servers == {"default": provided.server_url},
        )
        self.tenants = TenantManager(
            config=config,
            registry=self.registry,
            directory=self.directory,
            provisioner=self.provisioner,
            names=self.names,
            keyring=self.keyring,
            events=self.events,
            placer=self._placer,
        )
        self._text_records = ConfiguredTextRecords(config.domains)
        self.domains = DomainManager(self.control, self.audit, self._text_records, config.domains)
        self.tier_policies = TierPolicies(self.control, self.config, self.events, self.audit, self.tenants)
        sender = self.config.metering.usage_sender
        self.usage_exporter = None if sender is None else UsageExporter(self.control, sender, self.events)
        if (close := getattr(sender, "close", None)) is not None:
            self._opened.append(close)

    def _build_operations(self) -> None:
        """Build what works on a tenant's whole database, and records it as an operation."""
        config, events = self.config, self.events
        operations = Operations(self.control)
        self.operations = OperationManager(operations, self.registry)
        self._build_backups()
        tombstones = Tombstones(config, self.control, self.audit, self.signer, self.backups)
        self.restores = RestoreManager(config, operations, self.tenants, self.migrations, events, tombstones)
        self.rebuilding = RegistryRebuilding(
            config=config,
            control=self.control,
            audit=self.audit,
            registry=self.registry,
            operations=operations,
            provisioner=self.provisioner,
            secrets=self.secrets,
            tombstones=tombstones,
            leases=self.leases,
            data_keys=self._data_keys,
        )
        self.clones = CloneManager(config, operations, self.tenants, self.migrations, events)
        self.moves = MoveManager(
            config=config,
            registry=self.registry,
            provisioner=self.provisioner,
            operations=operations,
            tenants=self.tenants,
            placer=self._placer,
            control=self.control,
        )
        self.erasures = ErasureManager(
            config=config,
            control=self.control,
            registry=self.registry,
            audit=self.audit,
            signer=self.signer,
            backups=self.backups,
            operations=operations,
        )
        self.adoption = AdoptionManager(self.migrations, self.tenants, operations, self._placer)
        self.exports = ExportManager(config, self.registry, self.router, self.provisioner.readers, operations)

    def _build_backups(self) -> None:
        services = BackupServices(
            config=self.config,
            control=self.control,
            audit=self.audit,
            signer=self.signer,
            registry=self.registry,
            servers=self.servers,
            provisioner=self.provisioner,
            names=self.names,
            keys=self._backup_keys,
            stores=self._stores,
            migrations=self.migrations,
            events=self.events,
        )
        self.backups = BackupManager(services)

    def _build_upkeep(self) -> None:
        """Build what runs from a timer or a worker."""
        config = self.config
        self.housekeeping = Housekeeping(
            config=config,
            registry=self.registry,
            tenants=self.tenants,
            members=self.members,
            revocations=self.revocations,
            domains=DomainUpkeep(self.control, self.audit, self._text_records, config.domains, self.events),
            provisioner=self.provisioner,
            secrets=self.secrets,
            audit=self.audit,
            quotas=self.quotas,
            catch_up=self.catch_up,
            runs=RunRecords(self.control),
            moves=self.moves,
            sampler=self.sampler,
            metrics=self.metrics,
            backups=self.backups,
            tier_policies=self.tier_policies,
            usage_exporter=self.usage_exporter,
            restores=self.restores,
            erasures=self.erasures,
            clones=self.clones,
        )
        self.recovery = RecoveryManager(config, self.control, self.registry, self.servers, self.names, self.audit)
        self.jobs = Jobs(self.control)
        upgrades = BackgroundUpgrades(self.migrations, self.catch_up, self.first_use.attempts)
        self.built_in_jobs = built_in_jobs(
            config, self.housekeeping, self.provisioner.warm_pool, upgrades, self.backups, self.recovery
        )

    def _build_task_signer(self) -> TenantSigner:
        read = None if self._data_keys is None else self._data_keys.open
        signer = TenantSigner(self.control.installation, self.config.sealing_keys, purpose="task", read=read)
        if self._data_keys is not None:
            self._data_keys.on_read(signer.add_keys)
        return signer

    def _build_consistency_tokens(self) -> ConsistencyTokens:
        tokens = ConsistencyTokens(self.control.installation, self.config.sealing_keys)
        if self._data_keys is not None:
            self._data_keys.on_read(tokens.keys.add)
        return tokens

    async def _update_weights(self) -> None:
        try:
            self.router.reweigh(await self.tiers.weights())
        except TenancyError as exc:
            logger.warning("the weights of tiers could not be read again: %s", exc)

    def _follow_servers(self) -> None:
        self.addresses = SealedAddresses(self.control, self.keyring, self._data_keys)
        self.servers.follow(self.addresses, self.names.owner)

    def _announce_server(self, name: str) -> None:
        server = self.servers.get(name)
        row = None if server is None else server.row
        self.events.emit(ServerChanged(server=name, state=None if row is None else row.state))

    async def _refresh_servers_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(_SERVERS_SECONDS)
            self.servers.refresh_soon()

    def _close_with(self, *providers: SecretProvider | KeyWrapper | None) -> None:
        self._opened.extend(provider.close for provider in providers if provider is not None)

    def _forget(self, tenant_id: UUID | None) -> None:
        if tenant_id is not None:
            self.router.retire(tenant_id)
            return
        self._start(self._update_weights())
        if self._data_keys is not None:
            # there may be a new one: what is sealed from now on should be sealed with it
            self._start(self._update_keys(self._data_keys))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # unbound: whoever happens to run now
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _start_warming(self, count: int) -> None:
        warming = Warming(
            control=self.control,
            servers=self.servers,
            names=self.names,
            directory=self.directory,
            router=self.router,
            count=count,
        )
        task = self._start(warming.run())

        async def stop() -> None:
            # first of all, while what it uses is open
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._opened.append(stop)

    async def _update_keys_repeatedly(self, data_keys: DataKeys) -> None:
        """Read new data keys in a process that gets no notification, so that old ones can be deleted."""
        while True:
            await asyncio.sleep(_UPDATE_SECONDS)
            await self._update_keys(data_keys)

    async def _update_keys(self, data_keys: DataKeys) -> None:
        try:
            await data_keys.update(self.keyring)
        except TenancyError as exc:
            logger.warning(
                "the data keys cannot be read (%s); a new one is read when a password that it seals is needed", exc
            )

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


async def _provide(url: str) -> _ProvidedServer:
    """Start the server that an ``embedded`` URL asks for, through the entry point that knows how."""
    scheme = url.partition(":")[0]
    for entry in entry_points(group="tenancy_orm.servers", name=scheme):
        provided: _ProvidedServer = await entry.load()().open(url)
        return provided
    raise ConfigurationError(f"no server provider is installed for control_url {scheme!r}")


__all__ = ["Assembly"]
