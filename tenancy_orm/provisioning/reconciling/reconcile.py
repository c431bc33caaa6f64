"""Finishing or removing interrupted creations and purges, and correcting tenants' roles, on every server.

A creation or purge under way holds its tenant's advisory lock. So this can run at any time, on any number of machines,
beside anything else. It takes that lock before it changes anything, and then reads the registry again.

A database that the registry does not know is dropped if it never belonged to a tenant: it has no marker, which is set
before a tenant can become active; or the registry has a tombstone for it. A database with its marker may hold the data
of a customer that the registry has lost, for example because an older backup of it was restored. It is kept and
reported as unknown, unless the caller asks to drop it. For the same reason a creation is completed, and not removed,
where the database has its marker, whatever the row says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from uuid import UUID

from ...audit.actor import SYSTEM, Actor
from ...errors import ConfigurationError, TenancyError, TenantNotFoundError
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...postgres.failures import SERVER_FAILURES
from ...registry.lifecycle import LOGIN_BLOCKED
from ...registry.reading import TenantFilter
from ...registry.rows import Unfinished
from ...routing import marker
from ...tenant import Status, Tenant
from ..checks import server_state
from ..checks.differences import Difference
from ..checks.report import Findings, ReconcileReport
from ..creation.pipeline import ProvisioningServices, tenant_key
from ..creation.unfinished import UnfinishedWork
from ..logins import temporary_logins
from ..logins.copy_logins import end_login
from ..rights import role_settings
from ..rights.tenant_rights import TenantRights
from ..server_objects import databases, removal, roles
from ..server_objects.blockers import Blockers
from .alignment import align_role, role_deviations
from .tenants import TenantCheck

logger = logging.getLogger("tenancy_orm.provisioning")


class Reconciler:
    """One reconciliation of every server.

    Args:
        services: Of provisioning.
        actor: Who does this, for the audit log.
        drop_unknown: Whether to drop databases of tenants that the registry does not know.
        check: Whether only to find out what would be done. Nothing is written.
        thorough: Whether to look into every tenant's database, and not only where the shared catalogues give a reason.
            Otherwise an operator's own roles keep their rights: a timer must not lock anybody out without a word.
        adopt: Ids or slugs of tenants that get a missing marker.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        *,
        actor: Actor = SYSTEM,
        drop_unknown: bool = False,
        check: bool = False,
        thorough: bool = True,
        adopt: Iterable[str] = (),
    ) -> None:
        self._services = services
        self._actor = actor
        self._drop_unknown = drop_unknown
        self._check = check
        self._thorough = thorough
        self._adopt = tuple(adopt)
        self._findings = Findings()
        self._timeout = services.config.provisioning.timeout
        self._unfinished = UnfinishedWork(services, self._findings, actor=actor, check=check, drop_unknown=drop_unknown)

    async def run(self) -> ReconcileReport:
        """Reconcile all servers at once.

        Raises:
            ControlUnavailableError: the control database does not answer; nothing can be decided without it.
        """
        unfinished = await self._services.registry.unfinished()
        by_server: dict[str, list[Unfinished]] = {name: [] for name in self._services.servers}
        for one in unfinished:
            placement = one.tenant.placement
            if placement is None or placement.server not in by_server:
                self._findings.errors.append(f"{one.tenant.slug}: its server is not configured")
                continue
            by_server[placement.server].append(one)
        runs = (self._attempt(name, partial(self._reconcile_server, name, found)) for name, found in by_server.items())
        await asyncio.gather(*runs)
        return self._findings.report()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout

    def _blockers(self, server: str) -> Blockers:
        return self._services.blockers(self._services.servers[server])

    async def _attempt(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do one piece of work; what it raises is reported and stops nothing else."""
        try:
            await work()
        except (TenancyError, *SERVER_FAILURES) as exc:
            # OSError includes TimeoutError: a deadline has passed, or the connection was lost
            logger.warning("reconcile: %s: %s", what, describe(exc))
            self._findings.errors.append(f"{what}: {describe(exc)}")

    async def _do(self, connection: Connection, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Await one piece of a server's work within the deadline, and check that the connection still works.

        Raises:
            ConnectionResetError: the connection does not work any more.
        """

        async def in_time() -> None:
            async with asyncio.timeout(self._timeout):
                await work()

        await self._attempt(what, in_time)
        if not await connections.is_alive(connection):
            raise ConnectionResetError("the connection was lost")

    async def _reconcile_server(self, server: str, unfinished: list[Unfinished]) -> None:
        connection = await self._blockers(server).connect()
        try:
            for one in unfinished:
                await self._do(connection, one.tenant.slug, partial(self._unfinished.settle, connection, one))
            await self._set_finished(connection)
            await self._drop_warm(server, connection)
            await self._drop_orphans(server, connection)
            await self._drop_logins(server, connection)
            await self._drop_retired(server, connection)
            await self._drop_leftovers(server, connection)
            await self._drop_leftover_roles(server, connection)
            await self._check_tenants(server, connection)
            await self._correct_roles(server, connection)
            await self._correct_settings(server, connection)
        finally:
            await connections.close(connection)

    async def _set_finished(self, connection: Connection) -> None:
        """Take back what roles say of their databases, where the process has died that had completed them."""
        if self._check:
            return
        async with asyncio.timeout(self._timeout):
            found = await roles.unfinished(connection, self._services.names.tenant_stem)
        for role in found:
            # in this order: the comment is there before the tenant is active
            if await self._status(role) not in (None, Status.PROVISIONING):
                await self._do(connection, role, partial(roles.set_finished, connection, role))

    async def _remove(self, connection: Connection, server: str, database: str, role: str) -> None:
        await removal.remove(
            connection,
            self._blockers(server),
            self._services.names,
            database=database,
            role=role,
            deadline=self._deadline(),
        )

    # --- what the registry does not know ----------------------------------------------------------------------------

    async def _drop_orphans(self, server: str, connection: Connection) -> None:
        """Drop databases and roles of tenants that the registry does not know."""
        names = self._services.names
        async with asyncio.timeout(self._timeout):
            present = {state.name for state in await databases.states(connection, names.stem)}
            present |= set(await roles.states(connection, names.stem))
        # the registry is read second: a creation writes its row before it creates its database
        known = await self._services.registry.database_names(server)
        for name in sorted(present - known):
            number = names.parse(name)
            if number is not None:
                await self._do(connection, name, partial(self._drop_orphan, server, connection, name, number))

    async def _drop_orphan(self, server: str, connection: Connection, name: str, number: UUID) -> None:
        async with locks.try_locked(connection, tenant_key(number)) as free:
            # in this order: a creation on another server of the same cluster makes a warm database a tenant's
            if not free or await self._is_warm(name):
                return
            status = await self._status_of(number) or await self._status(name)
            if status not in (None, Status.PURGED):
                return
            state = await databases.state(connection, name)
            never_used = (None, marker.warm_text(self._services.installation))
            marked = state is not None and state.comment not in never_used
            if state is None and status is None:
                # after a restore, the role of an unknown tenant and its database have different names
                marked = await self._opens_marked(connection, name)
            if state is not None and await self._is_in_use(state.comment):
                logger.error(
                    "database %s on server %s has the marker of a tenant with a row that names another database; it is "
                    "kept; see which one the tenant uses: tenancy rebuild --dry-run",
                    name,
                    server,
                )
                self._findings.unknown.append(name)
                return
            if marked and status is None and not self._drop_unknown:
                logger.error(
                    "database %s on server %s has belonged to a tenant that the registry does not know; it is kept; "
                    "register it again (tenancy rebuild), or drop it by reconcile(drop_unknown=True)",
                    name,
                    server,
                )
                self._findings.unknown.append(name)
                return
            if not self._check:
                await self._remove(connection, server, name, name)
            self._findings.orphans.append(name)

    async def _opens_marked(self, connection: Connection, role: str) -> bool:
        """Whether a role may connect to a database that has a tenant's marker."""
        found = (await roles.states(connection, role)).get(role)
        for name in () if found is None else found.connect_granted_on:
            state = await databases.state(connection, name)
            if state is not None and (state.comment or "").startswith(f"tenancy:{self._services.installation}:"):
                return True
        return False

    async def _is_in_use(self, comment: str | None) -> bool:
        """Whether a tenant that the registry knows may use a database with this comment: its row may be too old."""
        tenant_id = marker.tenant_of(comment, self._services.installation)
        return tenant_id is not None and await self._status_of(tenant_id) not in (None, Status.PURGED)

    async def _status(self, name: str) -> Status | None:
        """The status of the tenant that has a database or role; None if the registry does not know it."""
        tenant_id = await self._services.registry.id_by_database(name)
        return None if tenant_id is None else await self._status_of(tenant_id)

    async def _status_of(self, tenant_id: UUID) -> Status | None:
        """The tenant's status, on any server; None if the registry does not know the tenant."""
        try:
            return (await self._services.registry.get(tenant_id)).status
        except TenantNotFoundError:
            return None

    async def _is_warm(self, name: str) -> bool:
        return await self._services.warm_records.find(name) is not None

    async def _drop_warm(self, server: str, connection: Connection) -> None:
        """Drop warm databases that are incomplete, that a server has lost, or that somebody has opened."""
        records = await self._services.warm_records.of_server(server)
        if not records:
            return
        async with asyncio.timeout(self._timeout):
            sealed = set(await server_state.sealed(connection, marker.warm_text(self._services.installation)))
        for record in records:
            if record.state != "ready" or record.name not in sealed:
                await self._do(connection, record.name, partial(self._drop_warm_one, server, connection, record.name))

    async def _drop_warm_one(self, server: str, connection: Connection, name: str) -> None:
        number = self._services.names.parse(name)
        if number is None:
            return
        async with locks.try_locked(connection, tenant_key(number)) as free:
            found = await self._services.warm_records.find(name) if free else None
            if found is None:
                return  # it is being made, or a creation has claimed it
            if not self._check:
                if not await self._services.warm_records.withdraw(name):
                    return
                if await removal.is_foreign(connection, name, marker.warm_text(self._services.installation)):
                    await self._services.warm_records.remove(name)
                    return  # an unknown tenant's
                await self._remove(connection, server, name, name)
                await self._services.warm_records.remove(name)
            self._findings.orphans.append(name)

    async def _drop_retired(self, server: str, connection: Connection) -> None:
        """Drop the roles of purged tenants that the purge could not drop."""
        async with asyncio.timeout(self._timeout):
            found = await roles.states(connection, self._services.names.retired(""))
        for name in found:
            await self._do(connection, name, partial(self._drop_retired_role, server, connection, name))

    async def _drop_retired_role(self, server: str, connection: Connection, name: str) -> None:
        if not self._check:
            await removal.drop_retired(connection, self._blockers(server), self._services.names, name)
        self._findings.orphans.append(name)

    async def _drop_logins(self, server: str, connection: Connection) -> None:
        """Drop temporary logins that have expired, or were ended with their tenant's."""
        async with asyncio.timeout(self._timeout):
            found = await temporary_logins.find_over(connection, self._services.names)
        for name in found:
            await self._do(connection, name, partial(self._drop_login, server, connection, name))

    async def _drop_login(self, server: str, connection: Connection, name: str) -> None:
        if not self._check:
            await temporary_logins.drop(connection, self._blockers(server), self._services.names, name)
        self._findings.orphans.append(name)

    async def _drop_leftovers(self, server: str, connection: Connection) -> None:
        """Drop partial templates and scratch databases that no process is using."""
        stems = (self._services.names.template(""), self._services.names.scratch(""))
        async with asyncio.timeout(self._timeout):
            states = await databases.states(connection, self._services.names.stem)
        for state in states:
            if state.name.startswith(stems) and not state.is_template:
                await self._do(connection, state.name, partial(self._drop_leftover, server, connection, state.name))

    async def _drop_leftover(self, server: str, connection: Connection, name: str) -> None:
        async with locks.try_locked(connection, locks.lock_key(name)) as free:
            state = await databases.state(connection, name) if free else None
            if state is not None and not state.is_template:
                if not self._check:
                    await end_login(connection, self._blockers(server), name)
                    await removal.drop_database(connection, self._blockers(server), name)
                self._findings.orphans.append(name)

    async def _drop_leftover_roles(self, server: str, connection: Connection) -> None:
        """Drop the logins of copies that no process is using."""
        async with asyncio.timeout(self._timeout):
            found = await roles.states(connection, self._services.names.scratch(""))
        for name in found:
            await self._do(connection, name, partial(self._drop_leftover_role, server, connection, name))

    async def _drop_leftover_role(self, server: str, connection: Connection, name: str) -> None:
        async with locks.try_locked(connection, locks.lock_key(name)) as free:
            state = (await roles.states(connection, name)).get(name) if free else None
            if state is None or state.connect_granted_on & await self._services.registry.database_names(server):
                return  # it is used, or goes with a database that an operation has begun, see ``new_databases``
            if not self._check:
                await end_login(connection, self._blockers(server), name)
                await removal.drop_retired(connection, self._blockers(server), self._services.names, name)
            if name not in self._findings.orphans:  # its database has the same name
                self._findings.orphans.append(name)

    # --- databases --------------------------------------------------------------------------------------------------

    async def _check_tenants(self, server: str, connection: Connection) -> None:
        """Compare every tenant's database and role with what provisioning makes, several at once; mend one by one."""
        try:
            version = connections.version(connection)
            TenantRights.of(self._services.config, self._services.names.owner).check_version(server, version)
        except ConfigurationError as exc:
            self._findings.errors.append(str(exc))
            return
        check = TenantCheck(
            self._services,
            server,
            mend=not self._check,
            spare_others=not self._thorough,
            adopt=self._adopt,
            actor=self._actor,
        )
        async with asyncio.timeout(self._timeout):
            state = await server_state.read(connection, self._services.names)
        slots = asyncio.Semaphore(self._services.config.provisioning.concurrency)

        async def look(tenant: Tenant) -> Tenant | None:
            try:
                async with slots, asyncio.timeout(self._timeout):
                    return tenant if await check.differs(tenant, state, thorough=self._thorough) else None
            except (TenancyError, *SERVER_FAILURES) as exc:
                logger.info("reconcile: %s is looked at again under its lock: %s", tenant.slug, describe(exc))
                return tenant

        everyone = self._services.registry.iterate(TenantFilter(server=server))
        tenants = [tenant async for tenant in everyone if tenant.status is not Status.PROVISIONING]
        for found in await asyncio.gather(*map(look, tenants)):
            if found is not None:
                await self._do(connection, found.slug, partial(self._settle, check, connection, found.id))

    async def _settle(self, check: TenantCheck, connection: Connection, tenant_id: UUID) -> None:
        async with locks.try_locked(connection, tenant_key(tenant_id)) as free:
            tenant = await self._services.registry.get(tenant_id)
            if not free or tenant.placement is None or await self._services.registry.find_unfinished(tenant_id):
                return  # it is being changed, or removed
            told: list[Difference] = []
            try:
                await check.settle(connection, tenant, told)
            finally:
                self._findings.differences += told
                if any(difference.mended for difference in told):
                    self._findings.correct(tenant.slug)

    # --- roles ------------------------------------------------------------------------------------------------------

    async def _correct_roles(self, server: str, connection: Connection) -> None:
        """Block the logins of suspended and deleted tenants, unblock the others, and set each tier's limit."""
        async with asyncio.timeout(self._timeout):
            states = await roles.states(connection, self._services.names.stem)
        async for tenant in self._services.registry.iterate(TenantFilter(server=server)):
            if role_deviations(self._services, tenant, states):
                await self._do(connection, tenant.slug, partial(self._correct_role, connection, tenant.id))

    async def _correct_role(self, connection: Connection, tenant_id: UUID) -> None:
        async with locks.try_locked(connection, tenant_key(tenant_id)) as free:
            tenant = await self._services.registry.get(tenant_id)
            if not free or tenant.placement is None:
                return
            found = role_deviations(self._services, tenant, await roles.states(connection, tenant.placement.role))
            if not found:
                return
            if not self._check:
                await align_role(self._services, connection, tenant, deadline=self._deadline())
                self._findings.correct(tenant.slug)
            for kind, detail in found.items():
                dangerous = kind == "role.login" and tenant.status in LOGIN_BLOCKED
                self._differ(tenant, kind, detail, dangerous=dangerous)

    async def _correct_settings(self, server: str, connection: Connection) -> None:
        """Remove what roles have given themselves: settings, for any database, and members."""
        async with asyncio.timeout(self._timeout):
            settings = await role_settings.resolve(connection, self._services.config.provisioning.role_settings)
            found = await role_settings.read(connection, self._services.names.tenant_stem)
        for role, one in found.items():
            if not settings.differs_from(one) or self._services.names.parse(role) is None:
                continue
            if (tenant_id := await self._services.registry.id_by_database(role)) is not None:
                work = partial(self._correct_setting, server, connection, role, tenant_id, *settings.describe(one))
                await self._do(connection, role, work)

    async def _correct_setting(
        self, server: str, connection: Connection, role: str, tenant_id: UUID, detail: str, dangerous: bool
    ) -> None:
        async with locks.try_locked(connection, tenant_key(tenant_id)) as free:
            if not free or await self._status(role) in (None, Status.PROVISIONING, Status.PURGED):
                return
            tenant = await self._services.registry.get(tenant_id)
            configured = self._services.config.provisioning.role_settings
            if not self._check and await role_settings.restore(connection, self._blockers(server), role, configured):
                self._findings.correct(tenant.slug)
                self._differ(tenant, "role.settings", detail, dangerous=dangerous)
                return
            settings = await role_settings.resolve(connection, configured)
            left = (await role_settings.read(connection, role)).get(role)
            if left is not None and settings.differs_from(left):
                detail, dangerous = settings.describe(left)
                remedy = "; ".join(role_settings.corrections(connection, role, left, settings))
                self._differ(tenant, "role.settings", detail, dangerous=dangerous, remedy=remedy)

    def _differ(
        self, tenant: Tenant, kind: str, detail: str, *, dangerous: bool = False, remedy: str | None = None
    ) -> None:
        """Report a difference of a role, which is mended unless this is a check, or there is a remedy."""
        if tenant.placement is not None:
            place, mended = tenant.placement, not self._check and remedy is None
            self._findings.differences.append(
                Difference(
                    tenant.slug,
                    place.server,
                    place.database,
                    kind,
                    detail,
                    dangerous,
                    mended=mended,
                    remedy=remedy or "",
                )
            )
