"""``Provisioner``: creates and removes tenants' databases and roles; the rest of the package uses it alone."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import MappingProxyType
from typing import Any
from uuid import UUID

from ..audit.actor import SYSTEM, Actor
from ..config import TenancyConfig
from ..context import refuse_other_tenant, refuse_while_bound, run_unbound
from ..control.database import ControlDatabase
from ..control.names import Names
from ..errors import ProvisioningError, TenancyError
from ..events import EventBus
from ..keys.format import NewKey
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..registry.registry import Registry
from ..registry.rows import TenantDraft
from ..secrets.keyring import Keyring
from ..servers import Server, Servers
from ..tenant import Tenant, placement_of
from .checks.report import Findings, ReconcileReport
from .copies.extensions import Extensions
from .copies.making import Copies
from .creation import purging
from .creation.filled_creation import FilledCreation, Filling
from .creation.grant_hook import apply_hook
from .creation.new_databases import NewDatabases
from .creation.pipeline import Creation, CreationRequest, FirstConnections, ProvisioningServices, TenantSeeds
from .creation.taken_creation import TakenCreation
from .creation.takeover import DatabaseTakeover, Takeover, TakeoverFacts, undo_takeover
from .creation.unfinished import UnfinishedWork
from .creation.warm_creation import WarmCreation
from .creation.warm_records import WarmRecords
from .logins.readers import Readers
from .logins.temporary_logins import TemporaryLogins
from .preparation.prepared_servers import PreparedServers
from .reconciling.alignment import align
from .reconciling.reconcile import Reconciler
from .rights.role_settings import RoleSettings
from .rights.tenant_rights import TenantRights
from .server_objects.admin_connections import AdminConnections
from .server_objects.blockers import Blockers
from .server_objects.databases import Strategy
from .templates.building import SchemaSource, TemplateInfo, Templates
from .templates.manager import TemplateManager
from .templates.records import TemplateRecords
from .templates.scratch import ScratchDatabases
from .warm_pool import WarmPool
from .watchdog import Watchdog, WatchReport


class Provisioner:
    """Creates and removes tenants' databases and roles.

    At most ``config.provisioning.concurrency`` creations and purges run on one server at once, per process. The others
    wait; each one may take ``config.provisioning.timeout`` seconds.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        control: ControlDatabase,
        registry: Registry,
        servers: Servers,
        names: Names,
        keyring: Keyring,
        schema: SchemaSource,
        events: EventBus,
        seeds: TenantSeeds | None = None,
        unfilled: SchemaSource | None = None,
        first_connections: FirstConnections | None = None,
        requests_wait: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.names = names
        blockers = partial(Blockers, names=names, registry=registry)
        records = TemplateRecords(control)
        make_templates = partial(Templates, config=config, names=names, blockers=blockers, records=records)
        self._templates = make_templates(schema=schema)
        # a template of their own: seeds may need tables that only the next revision makes
        self._unfilled = self._templates if unfilled is None else make_templates(schema=unfilled)
        # a server's address may have changed
        servers.on_change(self._templates.forget)
        servers.on_change(self._unfilled.forget)
        self._admin_connections = AdminConnections(blockers, keep=config.provisioning.concurrency)
        self._prepared = PreparedServers(config, control, servers, names, self._admin_connections)
        self.extensions = Extensions(config, servers, blockers)
        self.templates = TemplateManager(
            config=config,
            names=names,
            templates=self._templates,
            records=records,
            servers=servers,
            prepared=self._prepared,
            blockers=blockers,
        )
        self.logins = TemporaryLogins(config, registry, servers, names, blockers)
        self.copies = Copies(config, servers, names, blockers)
        self.readers = Readers(config, servers, names, self._admin_connections, blockers)
        self.scratch_databases = ScratchDatabases(config, self._prepared, names, self._admin_connections, blockers)
        self._services = ProvisioningServices(
            config=config,
            registry=registry,
            servers=servers,
            admin_connections=self._admin_connections,
            names=names,
            keyring=keyring,
            installation=control.installation,
            templates=self._templates,
            events=events,
            blockers=blockers,
            warm_records=WarmRecords(control),
            seeds=seeds,
            first_connections=first_connections,
        )
        self.new_databases = NewDatabases(self._services)
        self.watchdog = Watchdog(self._services)
        self._creating: Counter[str] = Counter()  # by server: creations that run or wait
        self.warm_pool = WarmPool(
            self._services,
            prepared=self._prepared,
            is_busy=lambda name: bool(self._creating[name]) or requests_wait(name),
        )
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.provisioning.concurrency)
        )
        self.unprepared: dict[str, TenancyError] = {}
        """Why an opening that initialises could not prepare servers, by server."""

    # --- servers and templates --------------------------------------------------------------------------------------

    async def prepare_server(self, name: str) -> None:
        """Create the owner role on a server, and revoke PUBLIC's rights on its shared databases. It is idempotent.

        The first creation on each server calls this; ``tenancy init`` calls it to show mistakes early.

        Raises:
            UnknownServerError: no such server is configured.
            ServerUnavailableError: the server does not answer.
            ConfigurationError: the server refuses a value of ``role_settings``, or does not have one of
                ``tenant_privileges``; or a role would lose access to one of those databases, and nothing was changed:
                ``tenancy init`` asks.
            ProvisioningError: the administrator lacks rights, or another process takes too long to prepare the server.
        """
        await self._prepared.prepare(name)

    async def prepare(self, server: Server) -> None:
        """Prepare a server that has no row yet, as ``prepare_server`` does.

        Raises:
            TenancyError: as ``prepare_server``.
        """
        await self._prepared.prepare_unknown(server)

    async def template(self, server: str) -> TemplateInfo:
        """Return the template of the current schema on a server; it is built if it is missing.

        Raises:
            TemplateError: the template could not be built.
            UnknownServerError, ServerUnavailableError: as ``prepare_server``.
        """
        refuse_while_bound("building a template")
        return await self._templates.ensure(await self._prepared.server(server))

    def scratch(self, server: str, *, empty: bool = False) -> AbstractAsyncContextManager[str]:
        """Make a short-lived database with the current schema: ``async with provisioner.scratch("default") as name``.

        It has neither seeds nor reference data. Connect to it as the owner. It is dropped at the end, also after a
        cancellation.

        Args:
            server: The server's name.
            empty: Make it as a template is before its revisions run: with extensions and rights, and without tables.

        Raises:
            TemplateError: the template could not be built or cloned.
        """
        refuse_while_bound("cloning a template")
        return self._unfilled.scratch(lambda: self._prepared.server(server), empty=empty)

    async def scratch_template(self, server: str) -> TemplateInfo:
        """Return the template that ``scratch`` clones; it is built if it is missing.

        Raises:
            TemplateError: the template could not be built.
            UnknownServerError, ServerUnavailableError: as ``prepare_server``.
        """
        refuse_while_bound("building a template")
        return await self._unfilled.ensure(await self._prepared.server(server))

    async def connect_admin(
        self,
        server: str,
        database: str | None = None,
        *,
        role: str | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        timeout: float | None = None,
        purpose: str = "tenancy-admin",
    ) -> Connection:
        """Log in to a server as its administrator, and end login blockers.

        Args:
            server: The server's name.
            database: The database; the one in the server's URL where None.
            role: The role to act as from the first statement on.
            settings: Further server settings, in force from the start.
            timeout: Seconds this may take; ``connect_timeout`` where None.
            purpose: What it is for, as its application_name says.

        Raises:
            UnknownServerError: no such server is configured.
            ServerUnavailableError, asyncpg.PostgresError: as ``Server.connect_admin``.
        """
        blockers = self._services.blockers(self._services.servers[server])
        return await blockers.connect(database, role=role, settings=settings, timeout=timeout, purpose=purpose)

    # --- tenants ----------------------------------------------------------------------------------------------------

    async def create(
        self,
        draft: TenantDraft,
        *,
        key: NewKey | None,
        key_name: str = "default",
        scopes: Sequence[str] = (),
        strategy: Strategy = "wal_log",
        seed: bool = True,
        filling: Filling | Takeover | None = None,
        actor: Actor = SYSTEM,
    ) -> Tenant:
        """Create a tenant, all or nothing: its row, role, database, rights and marker, then a login that proves them.

        Seeds that run for each tenant follow.

        Args:
            draft: The tenant's values.
            key: Its first API key, which becomes active together with the tenant.
            key_name: The key's name.
            scopes: The key's scopes.
            strategy: "wal_log" if a caller waits, "file_copy" for thousands in a row.
            seed: Whether the seeds run that are not in the template.
            filling: Where the contents come from, or the database that is taken over. From the template where None;
                otherwise no seeds run.
            actor: Who does this, for the audit log.

        Raises:
            OperationError: the contents of ``filling`` are refused; what was made has been undone.
            TenantExistsError: the slug is taken.
            DatabaseExistsError: a database or role of the tenant's name exists; it is not adopted.
            TemplateError: the template could not be built or cloned.
            SeedError: a seed failed, or took too long; what was made has been undone.
            ProvisioningError: a step failed, or did not finish within ``provisioning.timeout``. What was made has been
                undone, or ``reconcile`` will remove or complete it; the message says which.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        refuse_while_bound("creating a tenant")
        request = CreationRequest(
            draft=draft, key=key, key_name=key_name, scopes=scopes, strategy=strategy, seed=seed, actor=actor
        )
        self._creating[draft.server] += 1
        try:
            server = await self._prepared.server(draft.server)
            if filling is not None:
                # in none of the slots of creations that somebody waits for: it may take hours
                settings = await self._prepared.settings(draft.server)
                return await self._long_creation(server, request, settings, filling).run()
            template = await self._templates.ensure(server)
            async with self._slots[draft.server]:
                settings = await self._prepared.settings(draft.server)
                kind = WarmCreation if self._services.config.provisioning.warm_pool else Creation
                return await kind(self._services, server, template, request, settings).run()
        finally:
            self._creating[draft.server] -= 1
            self.warm_pool.refill_soon(draft.server)

    def _long_creation(
        self, server: Server, request: CreationRequest, settings: RoleSettings, filling: Filling | Takeover
    ) -> Creation:
        if isinstance(filling, Takeover):
            return TakenCreation(self._services, server, request, settings, takeover=filling)
        return FilledCreation(
            self._services, server, request, settings, new_databases=self.new_databases, filling=filling
        )

    def password(self, tenant: Tenant) -> str:
        """Return the password of the tenant's role, for programs that connect by themselves, such as psql.

        Raises:
            SecretError: the sealed password does not open under any configured key.
            TenantNotFoundError: the tenant has been purged.
        """
        refuse_other_tenant(tenant)
        return self._services.keyring.open_password(tenant.id, placement_of(tenant).sealed_password)

    async def align(self, tenant: Tenant, *, timeout: float = 5.0) -> None:
        """Make the tenant's role agree with the registry: whether it can log in, and its tier's connection limit.

        The registry is read under the tenant's lock. So of two changes, the one that was committed last decides, not
        the one that reaches the server last.

        Args:
            tenant: The tenant.
            timeout: Seconds for all of it, waiting for the lock included.

        Raises:
            ProvisioningError: the role is missing, or the server did not finish in time; ``reconcile`` repeats it.
            ServerUnavailableError: the server does not answer.
            TenantNotFoundError: the tenant has been purged.
        """
        refuse_other_tenant(tenant)
        await run_unbound(align(self._services, tenant, timeout=timeout))

    async def purge(
        self,
        tenant: Tenant,
        *,
        listed: Tenant | None = None,
        lost_server: str | None = None,
        actor: Actor = SYSTEM,
    ) -> None:
        """Remove a deleted tenant's database, role, keys and secrets; then its slug is free.

        To finish an interrupted purge, repeat it or run ``reconcile``.

        Args:
            tenant: The tenant.
            listed: The tenant as it was listed. If it differs once the lock is held, the purge is refused.
            lost_server: A server that does not exist any more: what the tenant has there is forgotten, and not dropped.
            actor: Who does this, for the audit log.

        Raises:
            InvalidTransitionError: the tenant is not deleted, or was changed since it was listed.
            ProvisioningError: the server refused, or a statement did not finish within ``provisioning.timeout``; or
                ``lost_server`` answers, or has nothing of the tenant; or another database has replaced its own.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
        """
        refuse_other_tenant(tenant)
        services = self._services
        placement = (await services.registry.get(tenant.id)).placement
        if placement is None:
            await services.registry.begin_purge(tenant.id, listed=listed, actor=actor)  # refuses, and says why
            return
        if lost_server is not None:
            await purging.begin_without_server(services, tenant, placement, lost_server, listed=listed, actor=actor)
            if placement.server == lost_server:
                await run_unbound(
                    purging.finish_without_server(services, self.new_databases, tenant.id, placement, actor=actor)
                )
                return
        async with self._slots[placement.server]:
            try:
                deadline = asyncio.get_running_loop().time() + services.config.provisioning.timeout
                async with asyncio.timeout_at(deadline):
                    await run_unbound(
                        purging.purge(services, tenant.id, placement, deadline=deadline, listed=listed, actor=actor)
                    )
            except SERVER_FAILURES as exc:
                raise ProvisioningError(
                    f"purging tenant {tenant.slug!r} failed ({describe(exc)}); try again, or run: tenancy reconcile",
                    tenant=tenant.slug,
                    step="purge",
                ) from exc

    async def reconcile(
        self,
        *,
        actor: Actor = SYSTEM,
        drop_unknown: bool = False,
        check: bool = False,
        thorough: bool = True,
        adopt: Iterable[str] = (),
    ) -> ReconcileReport:
        """Finish or remove interrupted creations and purges, and mend tenants' databases and roles, on every server.

        It is safe at any time, on any number of machines. A server that does not answer is reported in ``errors``; the
        others are reconciled all the same.

        Args:
            actor: Who does this, for the audit log.
            drop_unknown: Also drop databases of tenants that the registry does not know, and of creations that were
                interrupted and cannot be completed. After an old backup of the registry was restored, these are all
                tenants created since: read ``unknown`` and ``errors`` in the report first.
            check: Write nothing; the report tells what would be done.
            thorough: Look into every tenant's database, with one connection each, ``provisioning.concurrency`` at once.
                If False, only into those for which the server's shared catalogues give a reason; roles that are no
                tenant's keep their rights there, and are in ``differences``.
            adopt: Slugs or ids of tenants with a database that has lost its marker: it gets the marker, and all that
                goes with it. Be sure that the database is the tenant's.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ConfigurationError: a server does not have one of ``provisioning.tenant_privileges``.
        """
        refuse_while_bound("reconciling")
        return await Reconciler(
            self._services, actor=actor, drop_unknown=drop_unknown, check=check, thorough=thorough, adopt=adopt
        ).run()

    async def look_at_takeover(self, server: str, database: str, *, but: Iterable[int] = ()) -> TakeoverFacts:
        """Look at a database that is to become a tenant's in place. Nothing is changed.

        Args:
            server: The server's name.
            database: The database.
            but: Process ids of sessions that are the caller's own.

        Raises:
            OperationError: there is no such database.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("looking at a database")
        nobody = self.names.tenant(UUID(int=0))
        return await DatabaseTakeover(self._services, server, database, nobody).look(but=but)

    async def undo_takeover(self, tenant: Tenant, state: Mapping[str, Any], *, actor: Actor = SYSTEM) -> bool:
        """Bring a database back to how it was before an interrupted takeover, and remove the tenant that it was for.

        Args:
            tenant: The tenant.
            state: What the takeover has recorded; empty where it had not begun.
            actor: Who does this, for the audit log.

        Returns:
            False if another process does it, or the takeover is under way.

        Raises:
            OperationStateError: no operation under way takes a database over for this tenant; or it is done, and the
                tenant's row is of an older backup of the control database.
            ProvisioningError: the server refused, or did not finish in time.
            ServerUnavailableError: the server does not answer.
        """
        refuse_other_tenant(tenant)
        if tenant.placement is None:
            return True
        return await run_unbound(undo_takeover(self._services, tenant, tenant.placement, state, actor=actor))

    async def settle_creation(self, tenant: Tenant, *, actor: Actor = SYSTEM) -> bool:
        """Finish or remove the creation of a tenant that a process which died has left, as ``reconcile`` does.

        Args:
            tenant: The tenant.
            actor: Who does this, for the audit log.

        Returns:
            False if another process does it, or the creation is under way.

        Raises:
            ProvisioningError: what is left could not be removed in time, or is kept: a customer may have used it.
            ServerUnavailableError: the server does not answer.
        """
        refuse_while_bound("settling a creation")
        try:
            return await UnfinishedWork(self._services, Findings(), actor=actor).settle_creation(tenant)
        except SERVER_FAILURES as exc:
            raise ProvisioningError(
                f"what is left of the creation of tenant {tenant.slug!r} could not be removed ({describe(exc)}); try "
                "again, or run: tenancy reconcile",
                tenant=tenant.slug,
            ) from exc

    async def apply_grants(self, tenant: Tenant) -> None:
        """Run the grant hook in a tenant's database, if there is one: an upgrade may have made what it names.

        Args:
            tenant: The tenant.

        Raises:
            ProvisioningError: a statement failed, or they took longer than ``provisioning.timeout``; none was applied.
            ServerUnavailableError: the server does not answer.
        """
        refuse_other_tenant(tenant)
        rights = TenantRights.of(self._services.config, self.names.owner)
        if rights.hook is None or tenant.placement is None:
            return
        await run_unbound(apply_hook(self._services, tenant.slug, tenant.placement, rights))

    async def end_excessive_sessions(self, *, actor: Actor = SYSTEM) -> WatchReport:
        """End tenants' sessions that would stop a server for others: see ``Watchdog``. A server's failure is reported.

        Args:
            actor: Who does this, for the audit log.
        """
        return await self.watchdog.run(actor=actor)

    async def close(self) -> None:
        """Close the administrative connections that are kept open between creations, and the watchdog's."""
        await self.warm_pool.close()
        await self._templates.close()
        await self._unfilled.close()
        await self._admin_connections.close()
        await self.watchdog.close()


def services_of(provisioner: Provisioner) -> ProvisioningServices:
    """Return the objects that provisioning uses, for operations on tenants' databases."""
    return provisioner._services


async def settings_of(provisioner: Provisioner, server: str) -> RoleSettings:
    """Return the settings that tenants' roles have on a server, which is prepared.

    Raises:
        TenancyError: as ``Provisioner.prepare_server``.
    """
    refuse_while_bound("preparing a server")
    return await provisioner._prepared.settings(server)
