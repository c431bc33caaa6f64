"""``MoveManager``: moves tenants to other servers while they are used (``tenancy.moves``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_while_bound, run_unbound
from ..control.database import ControlDatabase
from ..errors import JobLostError, OperationError, OperationStateError, TenancyError
from ..jobs.claims import Claimant
from ..operations import Operation, Operations, Switch
from ..postgres.connections import Connection
from ..postgres.failures import SERVER_FAILURES
from ..provisioning import Provisioner
from ..provisioning.pipeline import describe
from ..provisioning.provisioner import services_of
from ..provisioning.replaced_databases import refuse_stale
from ..registry.databases import TenantDatabase
from ..registry.reading import TenantFilter
from ..registry.registry import Registry
from ..servers.placement import Placer
from ..tenant import Status, TenantRef
from ..tenants.manager import TenantManager
from .leftovers import Leftovers
from .prerequisites import check_servers
from .rebalance import MovePlan, PlannedMove, Planner
from .report import MoveOutcome, MoveProgress, MoveReport, TidyReport
from .room import check_room
from .steps import FULL, Move, MoveServices, Tell, check_way_back
from .streams import FAILED
from .targets import choose_target

logger = logging.getLogger("tenancy_orm.moves")

_PAGE = 500

# ``list`` is a method in the class
Numbers: TypeAlias = list[int]
Texts: TypeAlias = list[str]
Moves: TypeAlias = list[Operation]


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
        self._config = config.move
        self._registry = registry
        self._provisioner = provisioner
        self._operations = operations
        self._tenants = tenants
        self._placer = placer
        services = services_of(provisioner)
        self._servers = services.servers
        self._admin_connections = services.admin_connections
        self._switch = Switch(services)
        self._planner = Planner(control, placer, config)
        self._leftovers = Leftovers(services, operations)

    # --- one tenant -------------------------------------------------------------------------------------------------

    async def move(
        self,
        tenant: TenantRef,
        *,
        to: str | None = None,
        offline: bool = False,
        way_back: bool = True,
        tell: Tell | None = None,
        actor: Actor = SYSTEM,
    ) -> Operation:
        """Move a tenant to another server; afterwards it can be rolled back until it is confirmed.

        Args:
            tenant: The tenant.
            to: The server's name; the one that placement chooses where None.
            offline: Copy it by a dump, in maintenance, instead of by logical replication.
            way_back: Whether the former database follows the new one, which takes a worker and a slot.
            tell: Called with each step that begins, in words.
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
            version = await check_servers(self._provisioner, place.server, target, tell if way_back else None)
        await self._provisioner.prepare_server(target)
        services = self._services(Claimant())
        name = self._provisioner.new_databases.new_name()
        operation = await self._operations.begin(
            "move",
            found.id,
            step="begun",
            claimant=services.claimant,
            actor=actor,
            detail={
                "from": {"server": place.server, "database": place.database, "role": place.role},
                "to": {"server": target, "database": name, "role": place.role},
                "revision": found.schema_revision,
                "offline": offline,
                "way_back": way_back,
                "version": version,
            },
        )
        # read again: another operation may have ended just before this one began
        found = await self._registry.get(found.id)
        move = Move(services, operation, found, actor=actor, **({} if tell is None else {"tell": tell}))
        try:
            if found.placement is None or (found.placement.server, found.placement.database) != (
                place.server,
                place.database,
            ):
                raise OperationStateError(f"tenant {found.slug!r} has another database by now; try again")
            await self._registry.record_database(
                TenantDatabase(
                    server=target,
                    name=name,
                    tenant_id=found.id,
                    role=place.role,
                    state="making",
                    operation=operation.id,
                    revision=found.schema_revision,
                )
            )
        except BaseException as exc:
            await run_to_completion(
                self._operations.finish(operation, services.claimant, "failed", error=describe(exc))
            )
            raise
        return await self._finish(operation, move.run())

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
        move, operation = await self._claim(found, actor)
        return await self._finish(operation, move.roll_back())

    async def confirm(self, tenant: TenantRef, *, actor: Actor = SYSTEM) -> Operation:
        """End a move for good: the former database is dropped. Housekeeping does it after ``move.keep_seconds``.

        Raises:
            OperationStateError: there is no move to confirm.
            ServerUnavailableError, ControlUnavailableError: a server does not answer; try again.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("moving a tenant")
        move, operation = await self._claim(await self._waiting(tenant), actor)
        return await self._finish(operation, move.confirm())

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
        move, _ = await self._claim(found, actor)
        return await self._finish(found, move.resume())

    async def list(self, tenant: TenantRef | None = None, *, limit: int = 100) -> tuple[Operation, ...]:
        """Return moves, the newest first.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing moves")
        tenant_id = None if tenant is None else (await self._tenants.get(tenant)).id
        return await self._operations.list(tenant_id=tenant_id, kinds=("move",), limit=limit)

    async def _finish(self, operation: Operation, work: Coroutine[Any, Any, object]) -> Operation:
        """Await what a move does, and return its record."""
        try:
            await run_unbound(work)
        except TenancyError:
            raise
        except SERVER_FAILURES as exc:
            now = await self._operations.get(operation.id)
            remedy = "" if now.state != "running" else f"; go on with it: tenancy operations resume {now.id}"
            raise OperationError(
                f"move {now.id} of tenant {now.slug!r} failed at step {now.step!r} ({describe(exc)}){remedy}"
            ) from exc
        return await self._operations.get(operation.id)

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

    async def _claim(self, operation: Operation, actor: Actor) -> tuple[Move, Operation]:
        services = self._services(Claimant())
        claimed = await self._operations.claim(operation.id, services.claimant)
        return Move(services, claimed, await self._registry.get(claimed.tenant_id), actor=actor), claimed

    def _services(self, claimant: Claimant) -> MoveServices:
        return MoveServices(
            config=self._config,
            provisioner=self._provisioner,
            operations=self._operations,
            tenants=self._tenants,
            switch=self._switch,
            claimant=claimant,
        )

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
        slots = asyncio.Semaphore(self._config.concurrency if concurrency is None else concurrency)
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
            logger.error("tenant %s is not moved: %s", tenant.slug, describe(exc))
            error = str(exc) or type(exc).__name__
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
        resumed: Numbers = []
        confirmed: Numbers = []
        given_up: Numbers = []
        errors: Texts = []
        for found in await self._unfinished():
            try:
                if (await self._registry.get(found.tenant_id)).status is Status.PURGED:
                    # its databases are gone; what is left on the servers is removed below
                    claimant = Claimant()
                    await self._operations.finish(
                        await self._operations.claim(found.id, claimant), claimant, "done", detail={"purged": True}
                    )
                elif found.is_abandoned:
                    await self._resume(found, actor, given_up)
                    resumed.append(found.id)
                elif found.state == "waiting" and await self._is_due(found):
                    move, _ = await self._claim(found, actor)
                    await run_unbound(move.confirm())
                    confirmed.append(found.id)
                elif found.state == "waiting" and found.detail.get("reverse") == "following":
                    given_up += await self._give_up_return(found, actor)
            except (OperationStateError, JobLostError):
                continue  # another process is faster
            except (TenancyError, *SERVER_FAILURES) as exc:
                errors.append(f"move {found.id} of tenant {found.slug}: {describe(exc)}")
        removed, failed = await self._leftovers.remove()
        return TidyReport(
            resumed=tuple(resumed),
            confirmed=tuple(confirmed),
            given_up=tuple(given_up),
            removed=removed,
            errors=(*errors, *failed),
        )

    async def _unfinished(self) -> Moves:
        """Return all moves that have not ended, the oldest first."""
        found: Moves = []
        before = None
        while page := await self._operations.list(
            kinds=("move",), states=("running", "waiting"), limit=_PAGE, before=before
        ):
            found += page
            before = page[-1].id
        return found[::-1]

    async def _resume(self, found: Operation, actor: Actor, given_up: Numbers) -> None:
        """Finish or undo a move that was left; where that fails, bound what its way back keeps of the server's log."""
        move, operation = await self._claim(found, actor)
        try:
            await self._finish(operation, move.resume())
        except (TenancyError, *SERVER_FAILURES) as exc:
            if await run_unbound(move.give_up_slot(self._config.max_slot_bytes)):
                given_up.append(found.id)
                logger.error("move %d of tenant %s has no way back any more: %s", found.id, found.slug, describe(exc))
            raise

    async def _is_due(self, operation: Operation) -> bool:
        by = operation.detail.get("confirm_by")
        if by is not None and datetime.fromisoformat(str(by)) <= datetime.now(UTC):
            return True
        # a purge drops what is in use, and the former database with it
        return (await self._registry.get(operation.tenant_id)).status is Status.DELETED

    async def _give_up_return(self, operation: Operation, actor: Actor) -> Numbers:
        move = Move(self._services(Claimant()), operation, await self._registry.get(operation.tenant_id), actor=actor)
        kept = await move.kept_bytes()
        revision = (await self._registry.get(operation.tenant_id)).schema_revision
        if revision != operation.detail["revision"]:
            reason = f"the schema was migrated to {revision} since"
        elif kept is None:
            reason = "its slot is gone, or the server has removed the log that it needs"
        elif kept > self._config.max_slot_bytes:
            reason = FULL.format(kept=kept)
        elif (failing := await move.failing()) is None:
            return []
        elif failing.since(operation.detail.get("failing")):
            reason = FAILED.format(failures=failing.failures)
        else:
            # once may be a deadlock, or an operator's row that is gone by now
            if failing.fields() != operation.detail.get("failing"):
                claimed, _ = await self._claim(operation, actor)
                await run_unbound(claimed.note_failing(failing))
                logger.warning(
                    "move %d: the former database of tenant %s fails to follow", operation.id, operation.slug
                )
            return []
        claimed, _ = await self._claim(operation, actor)
        await run_unbound(claimed.give_up_return(reason))
        logger.error("move %d of tenant %s has no way back any more: %s", operation.id, operation.slug, reason)
        return [operation.id]


__all__ = ["MoveManager"]
