"""The creation of one tenant, step by step, so that either all or nothing of it remains.

The steps are registered, role, database, grants and proved. Where there are seeds that run for each tenant, the last
one is called unseeded instead, and seeds follows it. After them the tenant becomes active. The name of a step is in the
registry before the step begins, except for the role: it follows "registered" at once, and takes less time than writing
its name. A database with its marker is whole, unless a comment of the role says otherwise: until the seeds have run, or
until the last step of a creation with contents from elsewhere.

The administrative connection holds an advisory lock on the tenant's id, from before the row is written until the end.
When a process dies, the kernel closes its connections and PostgreSQL releases their locks. So ``reconcile`` can tell a
creation under way from a dead one exactly, and without a clock.

A failure or a cancellation undoes the steps that were started, in reverse. Becoming active is one commit in the
registry, and the point of no return: where it is in doubt, the registry is read again, and an active tenant is never
undone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from uuid import UUID

from ...audit.actor import Actor
from ...cancellation import run_to_completion
from ...config import TenancyConfig
from ...control.names import Names
from ...errors import DatabaseExistsError, ProvisioningError, TenancyError, TenantExistsError, TenantNotFoundError
from ...events import EventBus, TenantCreationFailed
from ...keys.format import NewKey
from ...postgres import connections, locks
from ...postgres.connections import Connection
from ...postgres.errors import describe
from ...registry.creation import UNDOING
from ...registry.registry import Registry
from ...registry.rows import TenantDraft
from ...routing import marker
from ...secrets.keyring import Keyring
from ...servers import Server, Servers
from ...tenant import Placement, Status, Tenant
from ..rights import grants
from ..rights.role_settings import RoleSettings
from ..rights.tenant_rights import TenantRights
from ..server_objects import access, databases, removal, roles
from ..server_objects.admin_connections import AdminConnections
from ..server_objects.blockers import Blockers
from ..server_objects.databases import Strategy
from ..server_objects.scram import scram_verifier
from ..templates.building import TemplateInfo, Templates
from .warm_records import WarmRecords

logger = logging.getLogger("tenancy_orm.provisioning")

# CREATE DATABASE takes some time even without blockers.
_PATIENCE_SECONDS = 1.0


class TenantSeeds(Protocol):
    """What runs in a new tenant's database, as the tenant, before the tenant becomes active."""

    def wanted(self) -> bool:
        """Whether there is anything to run. Called by every creation: be fast."""

    async def run(self, tenant: Tenant) -> None:
        """Run it. It is undone by dropping the database."""

    def forget(self, tenant_id: UUID) -> None:
        """Give up what is kept for a tenant: its database will be dropped."""


class FirstConnections(Protocol):
    """Where the connection that proves a tenant's login stays for its first request, in this process."""

    async def open(self, tenant: Tenant) -> bool:
        """Log in as the tenant and verify its marker, as a session does; False if that would take from others."""

    def forget(self, tenant_id: UUID) -> None:
        """Close what is kept for a tenant: its database will be dropped."""


@dataclass(frozen=True, slots=True)
class ProvisioningServices:
    """The objects that provisioning uses."""

    config: TenancyConfig
    registry: Registry
    servers: Servers
    admin_connections: AdminConnections
    names: Names
    keyring: Keyring
    installation: UUID
    templates: Templates
    events: EventBus
    blockers: Callable[[Server], Blockers]
    warm_records: WarmRecords
    seeds: TenantSeeds | None = None
    first_connections: FirstConnections | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a creation. ``undo`` works after ``apply`` succeeded or failed, and may be repeated."""

    name: str
    apply: Callable[[], Awaitable[None]]
    undo: Callable[[], Awaitable[None]]


def tenant_key(tenant_id: UUID) -> int:
    """Return the key of the advisory lock that a process holds while it changes this tenant's database or role."""
    return locks.lock_key(f"tenant:{tenant_id}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationRequest:
    """What a creation is asked for: as the arguments of ``Provisioner.create``."""

    draft: TenantDraft
    key: NewKey | None
    key_name: str
    scopes: Sequence[str]
    strategy: Strategy
    seed: bool
    actor: Actor


class Creation:
    """The creation of one tenant. Use an object once, with ``run``.

    Args:
        services: Of provisioning.
        server: Where it is created.
        template: What its database is cloned from.
        request: What is created.
        settings: The settings of its role.
    """

    def __init__(
        self,
        services: ProvisioningServices,
        server: Server,
        template: TemplateInfo,
        request: CreationRequest,
        settings: RoleSettings,
    ) -> None:
        seeds = services.seeds if request.seed else None
        self._services = services
        self._server = server
        self._blockers = services.blockers(server)
        self._template = template
        self._revision = template.revision
        self._draft = request.draft
        self._settings = settings
        self._key = request.key
        self._key_name = request.key_name
        self._scopes = request.scopes
        self._strategy = request.strategy
        self._seeds = seeds if seeds is not None and seeds.wanted() else None
        self._actor = request.actor
        self._timeout = services.config.provisioning.timeout
        self._connection: Connection | None = None
        # whether the lock was held without a gap; otherwise a reconcile may have changed this tenant
        self._lock_unbroken = True
        self._taken_over = False
        self._started_steps: list[Step] = []
        self._closing: list[asyncio.Future[None]] = []
        self._step = "locked"
        self._recorded_step: str | None = None  # of a step that the row names already
        self._tenant: Tenant | None = None

    def steps(self) -> tuple[Step, ...]:
        """The steps after the registry's row, in order."""
        return (
            *self._making_steps(),
            Step(self._proof_name, self._prove, self._end_connections),
            *(() if self._seeds is None else (Step("seeds", self._seed, self._forget_seeds),)),
        )

    @property
    def _proof_name(self) -> str:
        # another one where seeds follow: a process that does not know them must not finish the creation
        return "proved" if self._seeds is None else "unseeded"

    def _making_steps(self) -> tuple[Step, ...]:
        """The steps after which the tenant can log in."""
        return (
            Step("role", self._create_role, self._drop_role),
            Step("database", self._create_database, self._drop_database),
            Step("grants", self._grant, _nothing),
        )

    async def run(self) -> Tenant:
        """Create the tenant, or undo what was started.

        Raises:
            TenantExistsError: the slug is taken.
            DatabaseExistsError: a database or role of the tenant's name exists.
            ProvisioningError: a step failed or did not finish in time.
        """
        try:
            async with asyncio.timeout(self._timeout):
                self._connection = await self._lock()
                await self._register()
                steps = self.steps()
                for step, following in zip(steps, [*steps[1:], None], strict=True):
                    await self._do_step(step, following)
                return await run_to_completion(self._complete())
        except BaseException as exc:
            undone = await run_to_completion(self._undo_started(exc))
            if self._tenant is not None and isinstance(exc, Exception):
                return self._tenant  # the deadline passed, or the connection broke, after the tenant became active
            self._raise_for_caller(exc, undone)
            raise
        finally:
            await run_to_completion(self._release())

    @property
    def role(self) -> str:
        """The name of the tenant's role."""
        return self._draft.role

    # --- forward ----------------------------------------------------------------------------------------------------

    async def _lock(self) -> Connection:
        return await self._services.admin_connections.acquire(
            self._server, tenant_key(self._draft.id), timeout=self._timeout
        )

    async def _register(self) -> None:
        self._step = "registered"
        await run_to_completion(self._services.registry.register(self._draft, actor=self._actor))

    async def _do_step(self, step: Step, following: Step | None) -> None:
        """Apply a step, and write the name of the following one to the registry at the same time.

        The following step does not begin before its name is written. If this step fails or the process dies, the name
        may be written too early. That does not mislead reconcile: it looks at what exists.
        """
        self._step = step.name
        self._started_steps.append(step)
        writing = self._begin_recording(following)
        try:
            async with self._ending(step):
                await step.apply()
        except DatabaseExistsError:
            # this step did not create it, so it must not drop it
            self._started_steps.remove(step)
            raise
        finally:
            if writing is not None:
                await run_to_completion(_wait_for(writing))
        if writing is not None:
            writing.result()

    def _ending(self, step: Step) -> AbstractAsyncContextManager[None]:
        """End what blocks a step."""
        return self._blockers.ending(self._admin, patience=_PATIENCE_SECONDS)

    def _begin_recording(self, step: Step | None) -> asyncio.Future[None] | None:
        """Begin to write the name of a step to the registry; None where there is none, or the row names it already."""
        if step is None or step.name == self._recorded_step:
            return None
        return asyncio.ensure_future(self._services.registry.record_step(self._draft.id, step.name))

    async def _complete(self) -> Tenant:
        self._step = "active"
        self._tenant = await self._services.registry.complete(
            self._draft.id,
            revision=self._revision,
            key=self._key,
            key_name=self._key_name,
            scopes=self._scopes,
            actor=self._actor,
        )
        return self._tenant

    @property
    def _admin(self) -> Connection:
        """The connection that holds the lock."""
        if self._connection is None:
            raise ProvisioningError("the lock is not held", tenant=self._draft.slug, step=self._step)
        return self._connection

    @property
    def _unfinished(self) -> tuple[str, ...]:
        """The statement that says of the role that its database is not whole yet, where the marker does not say it."""
        return () if self._seeds is None else (roles.unfinished_statement(self._draft.role),)

    async def _create_role(self) -> None:
        password = self._services.keyring.open_password(self._draft.id, self._draft.sealed_password)
        await roles.create(
            self._admin,
            self._draft.role,
            verifier=scram_verifier(password),
            connection_limit=self._services.config.tiers[self._draft.tier].connection_limit,
            settings=(*self._settings.statements(self._draft.role), *self._unfinished),
        )

    async def _create_database(self) -> None:
        await self._services.templates.clone(self._admin, self._template, self._draft.database, strategy=self._strategy)

    async def _grant(self) -> None:
        draft = self._draft
        await databases.open_to_role(self._admin, draft.database, role=draft.role)
        connection = await self._blockers.connect(draft.database, role=self._services.names.owner)
        try:
            async with self._blockers.ending(connection):
                await grants.grant_and_mark(
                    connection,
                    draft.database,
                    role=draft.role,
                    rights=TenantRights.of(self._services.config, self._services.names.owner),
                    what=await self._services.templates.contents(connection, self._template),
                    marker=marker.marker_text(self._services.installation, draft.id),
                )
        finally:
            self._close_later(connection)

    async def _prove(self) -> None:
        draft = self._draft
        placement = Placement(draft.server, draft.database, draft.role, draft.sealed_password)
        self._close_later(await prove(self._services, draft.id, draft.slug, placement))

    async def _seed(self) -> None:
        if self._seeds is not None:
            if self._closing:
                # the tier may allow one connection, and the last step's may be open still
                await asyncio.wait(self._closing)
            await self._seeds.run(await self._services.registry.get(self._draft.id))
            await roles.set_finished(self._admin, self._draft.role)

    def _close_later(self, connection: Connection) -> None:
        """Close a connection during the next step: the server takes 2 ms to end a session."""
        self._closing.append(asyncio.ensure_future(connections.close(connection)))

    async def _release(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing)
        if self._connection is not None:
            await self._services.admin_connections.release(self._server, self._connection, tenant_key(self._draft.id))

    # --- back -------------------------------------------------------------------------------------------------------

    async def _forget_seeds(self) -> None:
        if self._seeds is not None:
            self._seeds.forget(self._draft.id)

    async def _end_connections(self) -> None:
        if await roles.exists(self._admin, self._draft.role):
            await access.block(
                self._admin,
                self._blockers,
                database=self._draft.database,
                role=self._draft.role,
                deadline=asyncio.get_running_loop().time() + self._timeout,
            )

    async def _drop_database(self) -> None:
        await removal.drop_database(self._admin, self._blockers, self._draft.database)

    async def _drop_role(self) -> None:
        await removal.remove_role(self._admin, self._blockers, self._services.names, self._draft.role)

    @property
    def _is_active(self) -> bool:
        """Whether the tenant is active, by this creation's own commit or by that of a reconcile."""
        return self._tenant is not None or self._taken_over

    async def _undo_started(self, error: BaseException) -> bool:
        """Undo the steps that were started, unless the tenant is active. Returns whether nothing is left."""
        if self._is_active:
            return False
        if isinstance(error, TenantExistsError):
            return True
        step = self._step
        try:
            async with asyncio.timeout(self._timeout):
                undone = await self._undo(step, error)
        except Exception as exc:  # noqa: BLE001 - the first error is raised, whatever this one is
            logger.error(
                "undoing the creation of tenant %s failed, reconcile will repeat it: %s",
                self._draft.slug,
                describe(exc),
            )
            await self._leave_to_reconcile(exc)
            undone = False
        if not self._is_active:
            self._services.events.emit(
                TenantCreationFailed(tenant_id=self._draft.id, slug=self._draft.slug, step=step, undone=undone)
            )
        return undone

    async def _undo(self, step: str, error: BaseException) -> bool:
        if step == "locked":
            return True
        await self._ensure_lock()
        # whoever finds the row must not complete what is being undone
        await self._services.registry.record_failure(self._draft.id, step=UNDOING, error=describe(error))
        try:
            tenant = await self._services.registry.get(self._draft.id)
        except TenantNotFoundError:
            tenant = None  # the row was never written, or a reconcile has removed it
        if tenant is not None and tenant.status is not Status.PROVISIONING:
            if self._lock_unbroken:
                self._tenant = tenant
            else:
                self._taken_over = True
            return False
        for started_step in reversed(self._started_steps):
            await started_step.undo()
        if tenant is not None:
            await self._services.registry.discard(self._draft.id, step=step, error=describe(error), actor=self._actor)
        return True

    async def _ensure_lock(self) -> None:
        """Take the lock again if its connection is lost."""
        if self._connection is not None and await connections.is_alive(self._connection):
            return
        self._lock_unbroken = False
        if self._connection is not None:
            await connections.close(self._connection)
        # the server may need some time to notice that the old one is lost
        self._connection = await self._lock()

    async def _leave_to_reconcile(self, error: Exception) -> None:
        try:
            async with asyncio.timeout(self._services.config.pool.connect_timeout):
                await self._services.registry.record_failure(self._draft.id, step=UNDOING, error=describe(error))
        except Exception as exc:  # noqa: BLE001 - as above; the row is there, and reconcile finds it
            logger.error(
                "the failure of tenant %s could not be recorded in the registry: %s", self._draft.slug, describe(exc)
            )

    def _raise_for_caller(self, error: BaseException, undone: bool) -> None:
        """Raise the error that the caller should see instead of ``error``, or return if that is ``error`` itself."""
        if self._taken_over and isinstance(error, Exception):
            raise ProvisioningError(
                f"the connection to server {self._server.name!r} was lost, and reconcile has completed tenant "
                f"{self._draft.slug!r} without its API key; issue one",
                tenant=self._draft.slug,
                step=self._step,
            ) from error
        if isinstance(error, ProvisioningError) and error.step is None:
            error.step, error.tenant = self._step, self._draft.slug
        if isinstance(error, TenancyError) or not isinstance(error, Exception):
            return
        what = f"did not end within {self._timeout:g} s" if isinstance(error, TimeoutError) else "failed"
        fate = "what was made has been undone" if undone else "run: tenancy reconcile"
        raise ProvisioningError(
            f"creating tenant {self._draft.slug!r} {what} at step {self._step!r} ({describe(error)}); {fate}",
            tenant=self._draft.slug,
            step=self._step,
        ) from error


async def prove(services: ProvisioningServices, tenant_id: UUID, slug: str, placement: Placement) -> Connection:
    """Log in as the tenant, as its first request will, and verify that the database is its own.

    It logs in to PostgreSQL itself: what a pooler in front of it does is no part of a creation.

    Returns the connection, which the caller closes.

    Raises:
        MarkerMismatchError: the database is another tenant's.
        SecretError: the sealed password does not open.
        LoginRefusedError: PostgreSQL refuses the role.
        ServerUnavailableError: the server does not answer.
    """
    password = partial(services.keyring.open_password, tenant_id, placement.sealed_password)
    server = services.servers[placement.server]
    async with services.blockers(server).ending_login_blockers():
        connection: Connection = await server.connect_tenant(placement, password, tenant=slug, direct=True)
    try:
        await marker.verify(connection, services.installation, tenant_id, tenant=slug)
    except BaseException:
        await run_to_completion(connections.close(connection))
        raise
    return connection


async def _wait_for(work: asyncio.Future[None]) -> None:
    """Wait for the end of ``work`` without raising its error: that is raised only if nothing else has failed."""
    await asyncio.wait((work,))
    if not work.cancelled():
        work.exception()


async def _nothing() -> None:
    """Undo nothing: undoing another step undoes this one as well."""


__all__ = ["Creation", "CreationRequest", "ProvisioningServices", "Step", "prove", "tenant_key"]
