"""``MoveUpkeep``: what housekeeping does about moves, so that no killed process and no slot is left to itself."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from ..audit.actor import SYSTEM, Actor
from ..context import run_unbound
from ..errors import JobLostError, OperationStateError, TenancyError
from ..jobs.claims import Claimant
from ..operations import Operation
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..tenant import Status
from . import way_back
from .leftovers import Leftovers
from .record import MoveRecord, MoveServices, claim
from .report import TidyReport
from .steps import Move, carry_out
from .streams import FAILED

logger = logging.getLogger("tenancy_orm.moves")

_PAGE = 500


class MoveUpkeep:
    """Finishes what was left of moves, and ends what nobody needs any more.

    Args:
        services: What moves use.
    """

    def __init__(self, services: MoveServices) -> None:
        self._services = services
        self._operations = services.operations
        self._registry = services.provisioning.registry
        self._config = services.config
        self._leftovers = Leftovers(services.provisioning, services.operations)

    async def tidy(self, *, actor: Actor = SYSTEM) -> TidyReport:
        """Finish or undo moves that killed processes have left, confirm those that are due, and drop what is left over.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        resumed, confirmed, given_up, errors = list[int](), list[int](), list[int](), list[str]()
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
                    await run_unbound(Move(await claim(self._services, found, actor=actor)).confirm())
                    confirmed.append(found.id)
                elif found.state == "waiting" and found.detail.get("reverse") == "following":
                    given_up += await self._check_way_back(found, actor)
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

    async def _unfinished(self) -> list[Operation]:
        """Return all moves that have not ended, the oldest first."""
        found: list[Operation] = []
        before = None
        while page := await self._operations.list(
            kinds=("move",), states=("running", "waiting"), limit=_PAGE, before=before
        ):
            found += page
            before = page[-1].id
        return found[::-1]

    async def _resume(self, found: Operation, actor: Actor, given_up: list[int]) -> None:
        """Finish or undo a move that was left; where that fails, bound what its way back keeps of the server's log."""
        record = await claim(self._services, found, actor=actor)
        try:
            await carry_out(self._operations, record.operation, Move(record).resume())
        except (TenancyError, *SERVER_FAILURES) as exc:
            if await run_unbound(way_back.give_up_slot(record, self._config.max_slot_bytes)):
                given_up.append(found.id)
                logger.error("move %d of tenant %s has no way back any more: %s", found.id, found.slug, describe(exc))
            raise

    async def _is_due(self, operation: Operation) -> bool:
        by = operation.detail.get("confirm_by")
        if by is not None and datetime.fromisoformat(str(by)) <= datetime.now(UTC):
            return True
        # a purge drops what is in use, and the former database with it
        return (await self._registry.get(operation.tenant_id)).status is Status.DELETED

    async def _check_way_back(self, operation: Operation, actor: Actor) -> list[int]:
        """Give the way back of a move up where it is of no use, or keeps too much; returns its number then."""
        # looked at without a claim: it is taken only for what is written down
        tenant = await self._registry.get(operation.tenant_id)
        record = MoveRecord(self._services, Claimant(), operation, tenant, actor=actor)
        kept = await record.reverse.kept_bytes()
        revision = (await self._registry.get(operation.tenant_id)).schema_revision
        if revision != operation.detail["revision"]:
            reason = f"the schema was migrated to {revision} since"
        elif kept is None:
            reason = "its slot is gone, or the server has removed the log that it needs"
        elif kept > self._config.max_slot_bytes:
            reason = way_back.FULL.format(kept=kept)
        elif (failing := await way_back.failing(record)) is None:
            return []
        elif failing.since(operation.detail.get("failing")):
            reason = FAILED.format(failures=failing.failures)
        else:
            # once may be a deadlock, or an operator's row that is gone by now
            if failing.fields() != operation.detail.get("failing"):
                claimed = await claim(self._services, operation, actor=actor)
                await run_unbound(way_back.note_failing(claimed, failing))
                logger.warning(
                    "move %d: the former database of tenant %s fails to follow", operation.id, operation.slug
                )
            return []
        claimed = await claim(self._services, operation, actor=actor)
        await run_unbound(way_back.give_up(claimed, reason))
        logger.error("move %d of tenant %s has no way back any more: %s", operation.id, operation.slug, reason)
        return [operation.id]


__all__ = ["MoveUpkeep"]
