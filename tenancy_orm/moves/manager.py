"""``MoveManager``: moves tenants to other servers while they are used (``tenancy.moves``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from ..audit.actor import SYSTEM, Actor
from ..config import TenancyConfig
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import OperationError, OperationStateError, TenancyError
from ..operations import Operation, Operations, Switch
from ..operations.progress import StepProgress
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning import Provisioner
from ..provisioning.provisioner import services_of
from ..provisioning.server_objects.replaced_databases import refuse_stale
from ..registry.reading import TenantFilter
from ..registry.registry import Registry
from ..servers.placement import Placer
from ..tenant import Status, TenantRef
from ..tenants.manager import TenantManager
from .prerequisites import check_servers
from .rebalance import MovePlan, PlannedMove, Planner
from .record import MoveServices, begin, claim
from .report import MoveOutcome, MoveProgress, MoveReport, TidyReport
from .room import check_room
from .steps import Move, carry_out
from .targets import choose_target
from .upkeep import MoveUpkeep
from .way_back import check_way_back

logger = logging.getLogger("tenancy_orm.moves")


class MoveManager:
    """Moves tenants to other servers.

    A move copies the tenant's database while it is used, and has the copy follow it. Then it pauses the tenant for a
    moment, in which sessions wait, and makes the copy the database in use. The former database follows the new one
    until the move is confirmed, so that ``rollback`` loses nothing.

    Args:
        config: ``move`` is read from it.
        registry: The rows of tenants.
        provisioner: Makes and drops databases.
        operations: The records.
        tenants: Puts tenants into maintenance.
        placer: Chooses servers.
        control: The control database.
    """

    def __init__(
        self,
        *,
        config: TenancyConfig,
        registry: Registry,
        provisioner: Provisioner,
        operations: Operations,
        tenants: TenantManager,
        placer: Placer,
        control: ControlDatabase,
    ) -> None:
        self._registry = registry
        self._provisioner = provisioner
        self._operations = operations
        self._tenants = tenants
        self._placer = placer
        provisioning = services_of(provisioner)
        self._servers = provisioning.servers
        self._admin_connections = provisioning.admin_connections
        self._services = MoveServices(
            config=config.move,
            provisioner=provisioner,
            provisioning=provisioning,
            operations=operations,
            tenants=tenants,
            switch=Switch(provisioning),
        )
        self._planner = Planner(control, placer, config)
        self._upkeep = MoveUpkeep(self._services)

    # --- one tenant -------------------------------------------------------------------------------------------------

    async def move(
        self,
        tenant: TenantRef,
        *,
        to: str | None = None,
        offline: bool = False,
        way_back: bool = True,
        progress: StepProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> Operation:
        """Move a tenant to another server; afterwards it can be rolled back until it is confirmed.

        Args:
            tenant: The tenant.
            to: The server's name; the one that placement chooses where None.
            offline: Copy it by a dump, in maintenance, instead of by logical replication.
            way_back: Whether the former database follows the new one, which takes a worker and a slot.
            progress: Called with each step that begins, in words.
            actor: Who does this, for the audit log.

        Returns:
            The operation, which is "waiting" to be confirmed.

        Raises:
            PlacementError: the server does not take the tenant, for its region, state or capacity.
            OperationConflictError: the tenant is being restored, adopted or moved.
            OperationError: it cannot be moved in this way, or that failed; it goes on where it was.
            ProvisioningError: another database has replaced the one that its row names.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving a tenant")
        found = await self._tenants.get(tenant)
        place = found.placement
        if place is None or found.status is Status.PROVISIONING:
            raise OperationError(f"tenant {found.slug!r} is {found.status.value}, and cannot be moved")
        await refuse_stale(self._admin_connections, self._servers[place.server], place.database, missing=False)
        target = await choose_target(self._placer, self._servers, found, place, to)
        version = None
        if not offline:
            version = await check_servers(self._provisioner, place.server, target, progress if way_back else None)
        await self._provisioner.prepare_server(target)
        name = self._provisioner.new_databases.new_name()
        record = await begin(
            self._services,
            found,
            place,
            replace(place, server=target, database=name),
            offline=offline,
            way_back=way_back,
            version=version,
            progress=progress,
            actor=actor,
        )
        return await carry_out(self._operations, record.operation, Move(record).run())

    async def rollback(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Operation:
        """Go back to the former server. What was written on the new one since is there as well.

        A move that has not switched yet is undone by ending its process, or by ``resume`` after that.

        Raises:
            OperationStateError: there is no move to go back from, its former database does not follow any more, or the
                former server is in drain.
            OperationError: the schema was changed since, or the former database did not catch up.
            ServerUnavailableError, ControlUnavailableError: a server does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving a tenant")
        found = await self._waiting(tenant)
        check_way_back(found)
        former = found.detail["from"]["server"]
        row = self._servers[former].row
        if row is not None and row.state == "drain":
            # the control database would refuse it in the pause
            raise OperationStateError(
                f"server {former!r} is in drain, and takes tenant {found.slug!r} back only after: tenancy servers "
                f"activate {former}"
            )
        record = await claim(self._services, found, actor=actor)
        return await carry_out(self._operations, record.operation, Move(record).roll_back())

    async def confirm(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Operation:
        """End a move for good: the former database is dropped. Housekeeping does it after ``move.keep_seconds``.

        Raises:
            OperationStateError: there is no move to confirm.
            ServerUnavailableError, ControlUnavailableError: a server does not answer; try again.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving a tenant")
        record = await claim(self._services, await self._waiting(tenant), actor=actor)
        return await carry_out(self._operations, record.operation, Move(record).confirm())

    async def resume(self, operation: int, *, actor: Actor = SYSTEM) -> Operation:
        """Finish or undo a move that a killed process has left; housekeeping does it as well.

        Before the switch it is undone, and after it is finished.

        Raises:
            OperationNotFoundError: there is no such operation.
            OperationStateError: it has ended, waits to be confirmed, or a process does it now.
            ServerUnavailableError, ControlUnavailableError: a server does not answer; try again.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving a tenant")
        found = await self._operations.get(operation)
        if found.kind != "move" or found.state != "running":
            raise OperationStateError(f"operation {operation} is a {found.kind} that is {found.state}")
        record = await claim(self._services, found, actor=actor)
        return await carry_out(self._operations, record.operation, Move(record).resume())

    async def list(self, tenant: TenantRef | None = None, *, limit: int = 100) -> tuple[Operation, ...]:
        """Return moves, the newest first.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing moves")
        tenant_id = None if tenant is None else (await self._tenants.get(tenant)).id
        return await self._operations.list(tenant_id=tenant_id, kinds=("move",), limit=limit)

    async def _waiting(self, tenant: TenantRef) -> Operation:
        found = await self._tenants.get(tenant)
        listed = await self._operations.list(
            tenant_id=found.id, kinds=("move",), states=("running", "waiting"), limit=1
        )
        if not listed:
            raise OperationStateError(f"tenant {found.slug!r} has no move that could be rolled back or confirmed")
        if listed[0].state == "running":
            one = listed[0]
            remedy = (
                f"run: tenancy operations resume {one.id}"
                if one.is_abandoned
                else "end that process to undo it, or wait until it is done"
            )
            raise OperationStateError(
                f"move {one.id} of tenant {found.slug!r} is at step {one.step!r}, by process {one.pid} on {one.host}; "
                f"{remedy}"
            )
        return listed[0]

    async def _connect(self, server: str) -> Connection:
        return await self._provisioner.connect_admin(server, purpose="tenancy-move")

    # --- many tenants -----------------------------------------------------------------------------------------------

    async def move_all(
        self,
        server: str,
        *,
        to: str | None = None,
        offline: bool = False,
        way_back: bool = True,
        concurrency: int | None = None,
        progress: MoveProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> MoveReport:
        """Move every tenant of a server that is in drain, several at once; one that fails does not stop the others.

        Args:
            server: The server to empty.
            to: Where they go; where None, placement chooses for each.
            offline: As in ``move``.
            way_back: As in ``move``; where there is not room for all of them, none is begun.
            concurrency: How many are moved at once; ``move.concurrency`` where None.
            progress: Called as the moves proceed.
            actor: Who does this, for the audit log.

        Raises:
            OperationError: the server is not in drain, so that it would get new tenants; or not all former databases
                could follow.
            UnknownServerError: there is no such server.
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving tenants")
        row = self._servers[server].row
        if row is None or row.state != "drain":
            raise OperationError(f"server {server!r} takes new tenants; first run: tenancy servers drain {server}")
        which = TenantFilter(server=server)
        planned = [
            PlannedMove(tenant=found, moved_from=server, moved_to=to, size_bytes=None, reason=f"{server} is in drain")
            async for found in self._registry.iterate(which)
        ]
        return await self._move_planned(planned, offline, way_back, concurrency, progress, actor)

    async def plan(self, *, limit: int = 100) -> MovePlan:
        """Return which tenants should be on other servers, and why; nothing is moved.

        Servers in drain are emptied, those above their capacity relieved, and the rest shared out by weight. Regions
        and the placement policy are obeyed.

        Args:
            limit: How many moves at most.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("planning moves")
        return await self._planner.plan(limit=limit)

    async def apply(
        self,
        plan: MovePlan,
        *,
        offline: bool = False,
        way_back: bool = True,
        concurrency: int | None = None,
        progress: MoveProgress | None = None,
        actor: Actor = SYSTEM,
    ) -> MoveReport:
        """Do what a plan says; one move that fails does not stop the others.

        Args:
            plan: What ``plan`` returned.
            offline: As in ``move``.
            way_back: As in ``move``; where there is not room for all of them, none is begun.
            concurrency: How many tenants are moved at once; ``move.concurrency`` where None.
            progress: Called as the moves proceed.
            actor: Who does this, for the audit log.

        Raises:
            OperationError: not all former databases could follow.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving tenants")
        return await self._move_planned(plan.moves, offline, way_back, concurrency, progress, actor)

    async def _move_planned(
        self,
        planned: Sequence[PlannedMove],
        offline: bool,
        way_back: bool,
        concurrency: int | None,
        progress: MoveProgress | None,
        actor: Actor,
    ) -> MoveReport:
        if way_back and not offline:
            await check_room(self._connect, [(one.moved_from, one.moved_to) for one in planned])
        slots = asyncio.Semaphore(self._services.config.concurrency if concurrency is None else concurrency)
        if progress is not None:
            progress.total(len(planned))

        async def one(move: PlannedMove) -> MoveOutcome:
            async with slots:
                outcome = await self._move_one(move, offline, way_back, actor)
            if progress is not None:
                progress.done(outcome)
            return outcome

        # an error that is none of a move ends the others as well: each is undone
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(move)) for move in planned]
        return MoveReport(outcomes=tuple(task.result() for task in tasks))

    async def _move_one(self, planned: PlannedMove, offline: bool, way_back: bool, actor: Actor) -> MoveOutcome:
        tenant, operation, error, reverse = planned.tenant, None, None, None
        moved_to = planned.moved_to
        try:
            done = await self.move(tenant, to=moved_to, offline=offline, way_back=way_back, actor=actor)
            operation, moved_to, reverse = done.id, str(done.detail["to"]["server"]), done.detail.get("reverse")
        except (TenancyError, *SERVER_FAILURES) as exc:
            error = describe(exc)
            logger.error("tenant %s is not moved: %s", tenant.slug, error)
        return MoveOutcome(
            slug=tenant.slug,
            operation=operation,
            moved_from=planned.moved_from,
            moved_to=moved_to,
            error=error,
            reverse=reverse,
        )

    # --- housekeeping -----------------------------------------------------------------------------------------------

    async def tidy(self, *, actor: Actor = SYSTEM) -> TidyReport:
        """Finish or undo moves that killed processes have left, confirm those that are due, and drop what is left over.

        A slot that nobody reads from keeps a server's log until its disk is full. So the way back of a move is given up
        once it keeps more than ``move.max_slot_bytes``, or the former database fails at the same change again; and a
        slot without a move is dropped.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("tidying moves")
        return await self._upkeep.tidy(actor=actor)


__all__ = ["MoveManager", "MoveOutcome", "MoveProgress", "MoveReport", "TidyReport"]
