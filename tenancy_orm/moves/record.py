"""``MoveRecord``: what is written down of one move, and the two databases that it is between."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config.sections import MoveConfig
from ..errors import OperationStateError
from ..jobs.claims import Claimant
from ..operations import Operation, Operations, Switch
from ..operations.progress import StepProgress, silent
from ..postgres.errors import describe
from ..provisioning import Provisioner
from ..provisioning.creation.pipeline import ProvisioningServices
from ..registry.databases import TenantDatabase
from ..tenant import Placement, Tenant, placement_of
from ..tenants.manager import TenantManager
from .streams import Stream

_WORDS = {
    "publishing": "looking at the tables",
    "copying": "copying the database",
    "replicating": "catching up with what was written since",
    "switching": "pausing the tenant, and switching",
    "switched": "letting the former database follow",
    "rolling_back": "catching up, and switching back",
    "confirming": "dropping the former database",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveServices:
    """What moves use."""

    config: MoveConfig
    provisioner: Provisioner
    provisioning: ProvisioningServices
    operations: Operations
    tenants: TenantManager
    switch: Switch


class MoveRecord:
    """The record of one move. Only the process that has claimed the operation can write to it.

    Nothing that a move makes has a name that the operation's number does not give, or its details.

    Args:
        services: What moves use.
        claimant: Who has claimed the operation.
        operation: Its row.
        tenant: The tenant.
        actor: Who does this, for the audit log.
        progress: Called with what is done next, in words.

    Attributes:
        old: The database that the tenant is moved from.
        new: The one that it is moved to.
        forward: The stream by which the new database follows the old one.
        reverse: The stream by which the old database follows the new one, after the switch.
    """

    def __init__(
        self,
        services: MoveServices,
        claimant: Claimant,
        operation: Operation,
        tenant: Tenant,
        *,
        actor: Actor = SYSTEM,
        progress: StepProgress | None = None,
    ) -> None:
        self.services = services
        self.config = services.config
        self.provisioning = services.provisioning
        self.claimant = claimant
        self.operation = operation
        self.tenant = tenant
        self.actor = actor
        self.progress = silent if progress is None else progress
        detail = operation.detail
        sealed = placement_of(tenant).sealed_password
        self.old = Placement(detail["from"]["server"], detail["from"]["database"], detail["from"]["role"], sealed)
        self.new = Placement(detail["to"]["server"], detail["to"]["database"], detail["to"]["role"], sealed)
        self.forward = Stream(self.provisioning, operation.id, "f", self.old, self.new)
        self.reverse = Stream(self.provisioning, operation.id, "r", self.new, self.old)

    @property
    def online(self) -> bool:
        """Whether the tenant is moved by replication, not by a dump."""
        return not self.operation.detail["offline"]

    @property
    def identities(self) -> Mapping[str, str]:
        """The tables that had to be published with all their columns, with the replica identity that they had."""
        identities: Mapping[str, str] = self.operation.detail.get("identities", {})
        return identities

    def keep(self) -> AbstractAsyncContextManager[None]:
        """Renew the claim while the body runs, as ``Operations.keep``."""
        return self.services.operations.keep(self.operation, self.claimant)

    async def advance(self, step: str, **detail: Any) -> None:
        """Name the step that begins next in the operation's row, and show it.

        Raises:
            JobLostError: another process has the operation by now.
        """
        if step != "switched" or self.online:  # after a move by a dump, nothing follows
            self.progress(_WORDS.get(step, step))
        await self.note(step, **detail)

    async def note(self, step: str, **detail: Any) -> None:
        """Write details down, at a step that was shown already.

        Raises:
            JobLostError: another process has the operation by now.
        """
        self.operation = await self.services.operations.advance(self.operation, self.claimant, step, detail=detail)

    async def finish(
        self,
        state: Literal["waiting", "done", "failed", "undone"],
        *,
        error: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """End the claim: the operation waits, or is over.

        Raises:
            JobLostError: another process has the operation by now.
        """
        await self.services.operations.finish(self.operation, self.claimant, state, error=error, detail=detail)

    async def is_switched(self) -> bool:
        """Whether the tenant's row names the new database."""
        # what is undone or finished depends on this: a switch with a commit in doubt has ended by then
        place = (await self.provisioning.registry.get_after_pending_commits(self.tenant.id)).placement
        return place is not None and (place.server, place.database) == (self.new.server, self.new.database)


async def begin(
    services: MoveServices,
    tenant: Tenant,
    old: Placement,
    new: Placement,
    *,
    offline: bool,
    way_back: bool,
    version: int | None,
    progress: StepProgress | None,
    actor: Actor,
) -> MoveRecord:
    """Write down that a tenant is moved, and that the new database is its own, before anything is made.

    Args:
        services: What moves use.
        tenant: The tenant.
        old: The database that it has.
        new: The one that it gets.
        offline: Whether it is moved by a dump.
        way_back: Whether the old database is to follow the new one.
        version: The newer one of the two servers' major versions, where it is moved by replication.
        progress: Called with what is done next, in words.
        actor: Who does this, for the audit log.

    Raises:
        OperationConflictError: another operation changes its database.
        OperationStateError: it has another one by now.
    """
    registry, claimant = services.provisioning.registry, Claimant()
    operation = await services.operations.begin(
        "move",
        tenant.id,
        step="begun",
        claimant=claimant,
        actor=actor,
        detail={
            "from": {"server": old.server, "database": old.database, "role": old.role},
            "to": {"server": new.server, "database": new.database, "role": new.role},
            "revision": tenant.schema_revision,
            "offline": offline,
            "way_back": way_back,
            "version": version,
        },
    )
    try:
        # read again: another operation may have ended just before this one began
        found = await registry.get(tenant.id)
        record = MoveRecord(services, claimant, operation, found, actor=actor, progress=progress)
        if (record.old.server, record.old.database) != _place_of(found):
            raise OperationStateError(f"tenant {found.slug!r} was moved or restored in the meantime; try again")
        await registry.record_database(
            TenantDatabase(
                server=new.server,
                name=new.database,
                tenant_id=found.id,
                role=new.role,
                state="making",
                operation=operation.id,
                revision=found.schema_revision,
            )
        )
    except BaseException as exc:
        await run_to_completion(services.operations.finish(operation, claimant, "failed", error=describe(exc)))
        raise
    return record


def _place_of(tenant: Tenant) -> tuple[str, str] | None:
    return None if tenant.placement is None else (tenant.placement.server, tenant.placement.database)


async def claim(services: MoveServices, operation: Operation, *, actor: Actor) -> MoveRecord:
    """Claim a move that waits, or that no process does any more.

    Raises:
        OperationStateError: it has ended, or a process does it now.
    """
    claimant = Claimant()
    claimed = await services.operations.claim(operation.id, claimant)
    tenant = await services.provisioning.registry.get(claimed.tenant_id)
    return MoveRecord(services, claimant, claimed, tenant, actor=actor)


__all__ = ["MoveRecord", "MoveServices", "begin", "claim"]
