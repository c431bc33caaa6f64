"""``RestoreUpkeep``: what housekeeping does about restores that were left behind, and databases that were replaced."""

from __future__ import annotations

from ..audit.actor import Actor
from ..errors import TenancyError
from ..operations import Operation
from ..postgres.errors import describe
from ..postgres.failures import FAILURES
from ..registry.databases import TenantDatabase
from ..tenant import Status
from .report import UpkeepReport
from .steps import RestoreServices, claim
from .tombstones import Tombstones

_LISTED = 1_000
_BLOCKING = ("restore", "adopt", "move")


class RestoreUpkeep:
    """Ends restores that no process does any more, and drops replaced databases that are kept no longer.

    Args:
        services: What restores use.
        tombstones: Know who was purged.
    """

    def __init__(self, services: RestoreServices, tombstones: Tombstones) -> None:
        self._services = services
        self._operations = services.operations
        self._registry = services.registry
        self._new_databases = services.provisioner.new_databases
        self._tombstones = tombstones

    async def tidy(self, *, actor: Actor) -> UpkeepReport:
        """Write tombstones, end restores, and drop databases; what fails does not stop the others.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        ended, dropped, errors = list[int](), list[str](), list[str]()
        try:
            await self._tombstones.write()
        except FAILURES as exc:
            errors.append(f"tombstones in the store of backups: {describe(exc)}")
        for operation in await self._operations.list(kinds=("restore",), states=("running", "waiting"), limit=_LISTED):
            if not operation.is_abandoned and not await self._is_over(operation):
                continue
            try:
                await self._end(operation, actor)
                ended.append(operation.id)
            except FAILURES as exc:
                errors.append(f"operation {operation.id}: {describe(exc)}")
        for beside in await self._registry.databases_to_drop():
            try:
                if await self._is_needed(beside):
                    continue
                await self._new_databases.drop(beside)
                dropped.append(beside.name)
            except FAILURES as exc:
                errors.append(f"database {beside.name}: {describe(exc)}")
        return UpkeepReport(ended=tuple(ended), dropped=tuple(dropped), errors=tuple(errors))

    async def _is_over(self, operation: Operation) -> bool:
        """Whether an operation waits for a tenant that has been purged since."""
        if operation.state != "waiting":
            return False
        return (await self._registry.get(operation.tenant_id)).status is Status.PURGED

    async def _end(self, operation: Operation, actor: Actor) -> None:
        if operation.step == "switching":
            try:
                restore = await claim(self._services, operation.id)
                await restore.go_on(actor)
            except TenancyError:
                if (await self._operations.get(operation.id)).state == "running":
                    raise
            return  # finished, or failed and taken back
        restore = await claim(self._services, operation.id)
        await restore.discard(actor)

    async def _is_needed(self, beside: TenantDatabase) -> bool:
        """Whether an operation that is not over may go back to a database."""
        if beside.state != "kept":
            return False
        unfinished = await self._operations.list(tenant_id=beside.tenant_id, states=("running", "waiting"), limit=10)
        return any(one.kind in _BLOCKING and one.detail.get("database") == beside.name for one in unfinished)


__all__ = ["RestoreUpkeep"]
