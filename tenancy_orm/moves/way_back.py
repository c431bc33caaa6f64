"""The way back of a move: after the switch the former database follows the new one, so that going back loses nothing.

The new server keeps its log for a former database that does not read it, until its disk is full. So a way back that is
of no use any more is ended.
"""

from __future__ import annotations

import asyncio
import logging

from ..cancellation import run_to_completion
from ..errors import OperationStateError, TenancyError
from ..migrations.database import lock as lock_migrations
from ..operations import Operation
from ..postgres import connections
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.server_objects import databases
from ..routing.marker import marker_text
from . import checks, tenant_role
from .copying import copy_sequences
from .pause import BothDatabases, carry, switch_to
from .record import MoveRecord
from .streams import SLOT_SECONDS, Failing
from .survey import Survey

logger = logging.getLogger("tenancy_orm.moves")

FULL = "it kept {kept:,} bytes of the log, so housekeeping ended it"
"""Why there is no way back."""
UNWANTED = "it was moved without a way back"
"""Why there is none, where nobody wanted one."""


def check_way_back(operation: Operation) -> None:
    """Refuse to roll a move back if its former database does not follow.

    Raises:
        OperationStateError: it does not.
    """
    if (known := operation.detail.get("reverse")) != "following":
        raise OperationStateError(
            f"move {operation.id} of tenant {operation.slug!r} cannot be rolled back, since its former database does "
            f"not follow ({known}); confirm it, and move the tenant back: tenancy move {operation.slug} --to "
            f"{operation.detail['from']['server']}"
        )


async def prepare(move: MoveRecord, found: Survey) -> str:
    """Make what the way back needs, which costs nothing within the pause; "ready", or why there is none."""
    if not move.operation.detail.get("way_back", True):
        return UNWANTED
    reverse = move.reverse
    try:
        inside = await reverse.connect(move.new)
        try:
            level = await inside.fetchval("SELECT current_setting('wal_level')")
        finally:
            await run_to_completion(connections.close(inside))
        if level != "logical":
            return f"server {move.new.server!r} has wal_level = {level}"
        owner = await reverse.connect(move.new, role=move.provisioning.names.owner)
        try:
            await reverse.publish(owner, found.replicated)
        finally:
            await run_to_completion(connections.close(owner))
        await reverse.create_slot(timeout=SLOT_SECONDS)
    except (TenancyError, *SERVER_FAILURES) as exc:
        logger.warning("move %d of tenant %s has no way back: %s", move.operation.id, move.tenant.slug, describe(exc))
        await reverse.drop_source()
        return describe(exc)
    return "ready"


async def follow(move: MoveRecord) -> str:
    """Have the old database follow the new one; "following", or why it does not."""
    reason = str(move.operation.detail.get("reverse") or "it was not prepared")
    if reason in ("ready", "following"):
        try:
            await move.reverse.follow(seconds=move.config.keep_seconds + move.config.timeout)
        except (TenancyError, *SERVER_FAILURES) as exc:
            logger.warning(
                "move %d of tenant %s has no way back: %s", move.operation.id, move.tenant.slug, describe(exc)
            )
            reason = describe(exc)
            # first: what is dropped cannot follow, whatever ends this process
            await move.note("switched", reverse=reason)
        else:
            return "following"
    if move.online:
        await move.reverse.drop()
    return reason


async def switch_back(move: MoveRecord) -> None:
    """Pause the tenant until the old database has all that the new one has, and make it the one in use again.

    Raises:
        OperationError: the schema has changed since, or the old database did not catch up.
    """
    config, reverse = move.config, move.reverse
    async with BothDatabases(reverse, move.provisioning.names.owner) as both:
        await lock_migrations(both.from_admin, timeout=move.provisioning.config.provisioning.timeout)
        found = await checks.look(move, both.from_admin)
        expected = await checks.read_schema(move, both.to_admin)
        remedy = "since its move: {}; confirm that, and move the tenant back"
        await checks.refuse_other_schema(move, both.from_admin, expected, remedy=remedy)
        await reverse.wait(both.from_admin, timeout=config.timeout)
        async with move.services.switch.pause(
            move.tenant, seconds=config.pause_seconds, drain=config.drain_seconds
        ) as paused:
            await checks.refuse_prepared(move, both.from_admin)
            await asyncio.gather(
                reverse.wait(both.from_admin, timeout=config.pause_seconds),
                copy_sequences(both.from_owner, both.to_owner),
            )
            await carry(move, both, found)
            await tenant_role.renew_password(move.provisioning, paused.tenant, move.old)
            mark = marker_text(move.provisioning.installation, paused.tenant.id)
            await databases.set_marker(both.to_admin, move.old.database, mark)
            await switch_to(move, paused, move.old, action="tenant.move_back")


async def failing(move: MoveRecord) -> Failing | None:
    """What the former database fails to apply; None where it fails at nothing, or does not answer."""
    try:
        return await move.reverse.failing()
    except (TenancyError, *SERVER_FAILURES) as exc:
        logger.debug("the former database of tenant %s is not reached: %s", move.tenant.slug, describe(exc))
        return None


async def note_failing(move: MoveRecord, found: Failing) -> None:
    """Write down that the former database fails, to compare with when it is looked at again."""
    await move.finish("waiting", detail={"failing": found.fields()})


async def give_up(move: MoveRecord, reason: str) -> None:
    """End the way back, but keep the former database: its slot would fill the disk."""
    await move.reverse.drop()
    await move.finish("waiting", detail={"reverse": reason})


async def give_up_slot(move: MoveRecord, most: int) -> bool:
    """End the way back where the new server keeps more of its log for it, in bytes; returns whether it did.

    For a move that cannot go on, since its former server does not answer: its slot would fill the disk.
    """
    kept = await move.reverse.kept_bytes()
    if kept is None or kept <= most:
        return False
    await move.reverse.drop_source()
    await move.note(move.operation.step, reverse=FULL.format(kept=kept))
    return True


__all__ = [
    "FULL",
    "UNWANTED",
    "check_way_back",
    "failing",
    "follow",
    "give_up",
    "give_up_slot",
    "note_failing",
    "prepare",
    "switch_back",
]
