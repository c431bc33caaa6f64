"""``Move``: one tenant's move, step by step, so that one writable copy of its data is left wherever it stops.

Each step is named in the operation's row before it begins. The tenant's own row decides what a process does that takes
the move over: as long as it names the old database, everything new is removed; once it names the new one, the move is
finished.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from ..cancellation import run_to_completion
from ..context import run_unbound
from ..errors import OperationError, OperationStateError, TenancyError
from ..events import TenantMoved
from ..operations import Operation, Operations
from ..postgres import connections
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.server_objects.replaced_databases import refuse_stale
from ..routing.marker import replaced_text
from ..tenant import Placement, Status, Tenant
from . import identities, way_back
from .by_dump import move_by_dump
from .by_replication import move_by_replication
from .copying import MATERIALIZED
from .pause import Switched
from .record import MoveRecord
from .way_back import check_way_back

logger = logging.getLogger("tenancy_orm.moves")


class Move:
    """One move that this process has claimed.

    Args:
        record: Its record.
    """

    def __init__(self, record: MoveRecord) -> None:
        self.record = record
        self._services = record.services
        self._provisioning = record.provisioning
        self._tenant = record.tenant

    # --- forward ----------------------------------------------------------------------------------------------------

    async def run(self) -> Tenant:
        """Move the tenant; afterwards the operation waits to be confirmed, or rolled back.

        Raises:
            TenancyError: it failed, and what was made has been undone, or is left to whoever resumes it.
        """
        record = self.record
        async with record.keep():
            try:
                switched = await (move_by_replication(record) if record.online else move_by_dump(record))
            except BaseException as exc:
                if await run_to_completion(record.is_switched()):
                    # what follows the switch is finished by whoever resumes it
                    raise
                await run_to_completion(self._give_up(exc))
                raise
            return await self.finish_switch(switched)

    async def _give_up(self, error: BaseException) -> None:
        """Undo what was begun; what cannot be undone now is left to ``resume``."""
        try:
            await self.undo(error=describe(error))
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.error(
                "move %d of tenant %s is not undone yet, housekeeping repeats it: %s",
                self.record.operation.id,
                self._tenant.slug,
                describe(exc),
            )

    async def finish_switch(self, switched: Switched | None = None) -> Tenant:
        """Do what follows the switch; to finish an interrupted one, repeat it. Then the operation waits.

        Args:
            switched: The pause of the switch, where this process has switched.

        Raises:
            TenancyError: a server does not answer; the tenant is served in its new database all the same.
        """
        record = self.record
        await record.advance("switched")
        tenant = await self._reopen_tenant(record.old, replaced=True)
        await record.forward.drop()
        await identities.put_back(record, record.old)
        back = await way_back.follow(record)
        await self._refresh_views()
        confirm_by = datetime.now(UTC) + timedelta(seconds=record.config.keep_seconds)
        detail: dict[str, Any] = {"reverse": back, "confirm_by": confirm_by.isoformat()}
        if switched is not None:
            detail |= {"pause_seconds": round(switched.pause_seconds, 3), "ended_sessions": switched.ended_sessions}
        await record.finish("waiting", detail=detail)
        self._provisioning.events.emit(
            TenantMoved(
                tenant_id=tenant.id,
                slug=tenant.slug,
                moved_from=record.old.server,
                moved_to=record.new.server,
                pause_seconds=None if switched is None else switched.pause_seconds,
            )
        )
        return tenant

    async def _refresh_views(self) -> None:
        """Fill the materialized views again: the old database may have filled them since they were copied."""
        owner = self._provisioning.names.owner
        connection = await self.record.forward.connect(self.record.new, role=owner)
        try:
            for row in await connection.fetch(MATERIALIZED):
                with suppress(*SERVER_FAILURES):
                    await connection.execute(f"REFRESH MATERIALIZED VIEW {row['beside_readers']} {row['name']}")
        finally:
            await run_to_completion(connections.close(connection))

    async def undo(self, *, error: str) -> None:
        """Remove what was made before the switch; to finish an interrupted one, repeat it. The operation has failed.

        Raises:
            TenancyError: something could not be removed.
        """
        record = self.record
        if await record.is_switched():
            raise OperationStateError(f"tenant {self._tenant.slug!r} is in its new database already")
        try:
            await self._reopen_tenant(record.new, replaced=False)
        finally:
            await record.forward.drop()
        await record.reverse.drop()
        await identities.put_back(record, record.old)
        await self._drop_database(record.new)
        await record.finish("failed", error=error)

    # --- back, and confirmed ----------------------------------------------------------------------------------------

    async def roll_back(self) -> Tenant:
        """Go back to the old database, which has followed the new one: nothing that was written since is lost.

        Raises:
            OperationStateError: the old database does not follow.
            OperationError: the schema has changed since, or the old database did not catch up; the tenant stays.
        """
        record = self.record
        check_way_back(record.operation)
        async with record.keep():
            await self._refuse_stale()
            await record.advance("rolling_back")
            try:
                await way_back.switch_back(record)
            except BaseException:
                if not await run_to_completion(record.is_switched()):
                    raise
                await run_to_completion(self._stay())
                raise
            return await self.finish_roll_back()

    async def _stay(self) -> None:
        await self._reopen_tenant(self.record.old, replaced=True)
        await self.record.finish("waiting")

    async def finish_roll_back(self) -> Tenant:
        """Do what follows the switch back; to finish an interrupted one, repeat it. The operation is undone then."""
        tenant = await self._reopen_tenant(self.record.new, replaced=True)
        await self.record.reverse.drop()
        await self._drop_database(self.record.new)
        await self.record.finish("undone")
        return tenant

    async def confirm(self) -> None:
        """End the way back: the former database is dropped. To finish an interrupted one, repeat it.

        Raises:
            TenancyError: a server does not answer.
        """
        async with self.record.keep():
            await self._refuse_stale()
            await self._confirm()

    async def _confirm(self) -> None:
        record = self.record
        await record.advance("confirming")
        await record.reverse.drop()
        await identities.put_back(record, record.new)
        await self._drop_database(record.old)
        await record.finish("done")

    async def resume(self) -> None:
        """Finish or undo a move that another process has left, by the step and by where the tenant is.

        Raises:
            TenancyError: a server does not answer; try again.
        """
        async with self.record.keep():
            await self._refuse_stale()
            step, switched = self.record.operation.step, await self.record.is_switched()
            if step == "confirming":
                await self._confirm()
            elif step == "rolling_back":
                await (self._stay() if switched else self.finish_roll_back())
            elif switched:
                await self.finish_switch()
            else:
                await self.undo(error=f"the process that did it has ended at step {step!r}")

    # --- the two databases ------------------------------------------------------------------------------------------

    async def _refuse_stale(self) -> None:
        """Refuse to close or drop a database if the tenant's row is older than its last switch."""
        place = (await self._provisioning.registry.get(self._tenant.id)).placement
        if place is not None:
            server = self._provisioning.servers[place.server]
            await refuse_stale(self._provisioning.admin_connections, server, place.database)

    async def _reopen_tenant(self, unused: Placement, *, replaced: bool) -> Tenant:
        """Open the database in use, close the other one, and let everybody go on.

        Args:
            unused: The other one.
            replaced: Whether the tenant has used it: then its marker says that the one in use has replaced it.
        """
        registry = self._provisioning.registry
        tenant = await registry.get(self._tenant.id)
        await self._services.provisioner.align(tenant, timeout=self._provisioning.config.provisioning.timeout)
        await registry.end_pause(tenant.id)
        if self.record.operation.detail.get("maintenance") and tenant.status is Status.MAINTENANCE:
            tenant = await self._services.tenants.end_maintenance(tenant, actor=self.record.actor)
        # closed since the pause, or never opened; last, since its server may not answer
        if unused.server in self._provisioning.servers:
            place, installation = tenant.placement, self._provisioning.installation
            mark = None if place is None or not replaced else replaced_text(installation, tenant.id, place)
            await self._services.switch.close_kept(unused, mark=mark)
        return tenant

    async def _drop_database(self, place: Placement) -> None:
        for beside in await self._provisioning.registry.databases_of(self._tenant.id):
            if (beside.server, beside.name) == (place.server, place.database):
                await self._services.provisioner.new_databases.drop(beside)


async def carry_out(operations: Operations, operation: Operation, work: Coroutine[Any, Any, object]) -> Operation:
    """Await what a move does, bound to no tenant, and return its record.

    Raises:
        OperationError: a server refused, or does not answer; the message says how to go on.
        TenancyError: as the work.
    """
    try:
        await run_unbound(work)
    except TenancyError:
        raise
    except SERVER_FAILURES as exc:
        now = await operations.get(operation.id)
        remedy = "" if now.state != "running" else f"; continue with: tenancy operations resume {now.id}"
        raise OperationError(
            f"move {now.id} of tenant {now.slug!r} failed at step {now.step!r} ({describe(exc)}){remedy}"
        ) from exc
    return await operations.get(operation.id)


__all__ = ["Move", "carry_out"]
