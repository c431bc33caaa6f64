"""What every adoption by copying shares: its record with steps, the tenant that is made of it, and the restart.

The copy becomes a tenant all or nothing, as a creation does. A process that dies leaves the row of a tenant that is
being created; the same command removes what is left of it and begins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..audit.actor import Actor
from ..config import TenancyConfig
from ..errors import AdoptionError, TenantNotFoundError
from ..jobs.claims import Claimant
from ..migrations.services import FleetServices
from ..operations import Operation, Operations
from ..operations.progress import StepProgress
from ..postgres.connections import POLL_SECONDS
from ..provisioning.copies.empty_databases import InstalledExtension
from ..provisioning.creation.filled_creation import Filling
from ..provisioning.creation.new_databases import ContentsPolicy, NewDatabase
from ..tenant import Status, Tenant
from ..tenants.manager import CreatedTenant, TenantManager

KEY_SHOWN = "and its API key was shown then; tenancy keys issue makes another"
"""What there is to say of a tenant that is complete already."""

_WAIT_SECONDS = 10.0  # for which the connections of a process that has died are waited for


@dataclass(slots=True)
class Steps:
    """The steps of one adoption: each is recorded before it begins.

    Attributes:
        progress: Receives each step.
        tenant: The tenant that is being created; set before the work begins.
        operation: The record; set before the work begins.
    """

    progress: StepProgress
    _operations: Operations
    claimant: Claimant = field(default_factory=Claimant)
    tenant: Tenant | None = None
    operation: Operation | None = None

    async def begin(self, step: str, *, detail: Mapping[str, Any] | None = None) -> None:
        """Record the step that begins now.

        Raises:
            JobLostError: another process has the operation by now.
        """
        self.progress(step)
        if self.operation is not None:
            self.operation = await self._operations.advance(self.operation, self.claimant, step, detail=detail)


Work = Callable[[NewDatabase, Steps], Awaitable[None]]
"""Brings the contents in, as ``new.login``, and verifies them."""


class AdoptionFrame:
    """Creates tenants with contents from elsewhere, each with its record.

    Args:
        services: The services of an open ``Tenancy``.
        tenants: Creates them.
        operations: Their records.
    """

    def __init__(self, services: FleetServices, tenants: TenantManager, operations: Operations) -> None:
        self._services = services
        self._tenants = tenants
        self._operations = operations

    @property
    def _config(self) -> TenancyConfig:
        return self._services.config

    async def create(
        self,
        slug: str,
        work: Work,
        *,
        server: str,
        policy: ContentsPolicy,
        detail: Mapping[str, Any],
        extensions: Sequence[InstalledExtension] = (),
        values: Mapping[str, Any],
        progress: StepProgress,
        actor: Actor,
    ) -> tuple[CreatedTenant, Operation]:
        """Create a tenant, and let ``work`` fill its database. It is all or nothing.

        Args:
            slug: The tenant's slug.
            work: Brings the contents in.
            server: The server's name.
            policy: Decides whether the contents may become the tenant's.
            detail: For the record: what is adopted, and no secrets.
            extensions: The extensions that the database needs, beside the configured ones.
            values: Further arguments of ``TenantManager.create``.
            progress: Receives each step.
            actor: Who does this, for the audit log.

        Raises:
            TenancyError: as ``TenantManager.create``, or what ``work`` raises; nothing remains.
        """
        steps = Steps(progress, self._operations)

        async def fill(new: NewDatabase) -> None:
            number = self._services.names.parse(new.name)
            assert number is not None  # noqa: S101 - a new tenant's database has its id
            steps.tenant = await self._services.registry.get(number)
            steps.operation = await self._operations.begin(
                "adopt", number, step="begun", claimant=steps.claimant, detail=detail, actor=actor
            )
            async with self._operations.keep(steps.operation, steps.claimant):
                await work(new, steps)
                await steps.begin("hand over")
            # the record goes with the tenant's row if the rest fails; so none is left that nobody ends
            await self._operations.finish(steps.operation, steps.claimant, "done")

        filling = Filling(fill=fill, policy=policy, timeout=self._config.adoption.timeout, extensions=extensions)
        created = await self._tenants.create(slug, server=server, filling=filling, actor=actor, **values)
        assert steps.operation is not None  # noqa: S101 - nothing is created without it
        return created, await self._operations.get(steps.operation.id)

    async def clean_up_former(self, slug: str, source: str, *, actor: Actor) -> tuple[Tenant, Operation] | None:
        """Remove what a process that died has left of a creation of this slug.

        Args:
            slug: The tenant's slug.
            source: What is adopted, as its record says.
            actor: Who does this, for the audit log.

        Returns:
            The tenant, with its record, if the same source has become this tenant already.

        Raises:
            AdoptionError: a process creates this tenant now.
            ProvisioningError: what is left could not be removed.
        """
        try:
            tenant = await self._services.registry.find(slug)
        except TenantNotFoundError:
            return None
        found = await self._operations.list(tenant_id=tenant.id, kinds=("adopt",), limit=1)
        operation = found[0] if found else None
        if tenant.status is Status.PROVISIONING:
            await self.clean_up(tenant, operation, actor=actor)
            return await self.clean_up_former(slug, source, actor=actor)
        if operation is not None and operation.is_abandoned and operation.detail.get("in_place"):
            # killed between the tenant's activation and the end of the record
            claimant = Claimant()
            await self._operations.finish(await self._operations.claim(operation.id, claimant), claimant, "done")
            operation = await self._operations.get(operation.id)
        if operation is not None and operation.is_claimed:
            raise AdoptionError(
                f"a process on {operation.host} adopts {tenant.slug!r} now; if it was killed, try again in a minute"
            )
        is_whole = operation is not None and operation.state == "done" and tenant.status is not Status.DELETED
        if operation is None or not is_whole or operation.detail.get("source") != source:
            return None  # TenantExistsError follows; a deleted tenant has to be purged first
        return tenant, operation

    async def clean_up(self, tenant: Tenant, operation: Operation | None, *, actor: Actor) -> None:
        """Finish or remove a creation that nobody does any more; a database in place is brought back to how it was.

        Raises:
            AdoptionError: a process does it now.
            ProvisioningError: what is left could not be removed.
        """
        provisioner = self._services.provisioner
        clean_up = partial(provisioner.settle_creation, tenant, actor=actor)
        if operation is not None and operation.detail.get("in_place"):
            clean_up = partial(provisioner.undo_takeover, tenant, operation.detail.get("undo", {}), actor=actor)
        deadline = asyncio.get_running_loop().time() + _WAIT_SECONDS
        while not await clean_up():
            # its connection may be on its way to end
            if asyncio.get_running_loop().time() > deadline:
                raise AdoptionError(f"tenant {tenant.slug!r} is being created now, by another process or a reconcile")
            await asyncio.sleep(POLL_SECONDS)


__all__ = ["KEY_SHOWN", "AdoptionFrame", "Steps", "Work"]
