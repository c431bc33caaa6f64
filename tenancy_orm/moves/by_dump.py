"""Moving a tenant by a dump: nobody uses it for as long as the copy takes, and no server need replicate anything."""

from __future__ import annotations

from ..cancellation import run_to_completion
from ..migrations.database import lock as lock_migrations
from ..postgres import connections
from ..tenant import Status
from . import checks, making, tenant_role
from .copying import copy_sequences
from .pause import BothDatabases, Switched, switch_to
from .record import MoveRecord
from .survey import refuse_configured

_SERVED = frozenset({Status.TRIAL, Status.ACTIVE})


async def move_by_dump(move: MoveRecord) -> Switched:
    """Put the tenant into maintenance, make the new database within a pause, and switch to it.

    Raises:
        TenancyError: it failed; what was made is left to be undone.
    """
    config = move.config
    source = await move.forward.connect(move.old)
    try:
        # until the end: a migration of the old database would be lost, and recorded as done
        await lock_migrations(source, timeout=move.provisioning.config.provisioning.timeout)
        found = await checks.look(move, source)
        # large objects belong to the tenant's role
        reader = await move.forward.create_login(
            seconds=2 * config.timeout, replicates=False, member_of=[move.old.role]
        )
        if found.hides_rows:
            await move.forward.see_all_rows()
        before = move.tenant.status
        await move.advance("copying", status=before.value, maintenance=before in _SERVED)
        if before in _SERVED:
            # first: requests are answered at once, and do not wait
            await move.services.tenants.start_maintenance(move.tenant, reason="it is being moved", actor=move.actor)
        async with move.services.switch.pause(
            move.tenant, seconds=config.timeout, drain=config.drain_seconds
        ) as paused:
            await checks.refuse_prepared(move, source)
            await refuse_configured(source, move.tenant.slug)
            checks.refuse_migrated(move, paused.tenant)
            expected = await checks.read_schema(move, source)
            await making.make_copy(move, source, reader, expected, found, snapshot=None)
            async with BothDatabases(move.forward, move.provisioning.names.owner) as both:
                await copy_sequences(both.from_owner, both.to_owner)
            await move.advance("switching", reverse="it was moved by a dump", **found.notes)
            # it still has the lock that keeps migrations away, for as long as the copy took
            await checks.refuse_prepared(move, source)
            await tenant_role.renew_password(move.provisioning, paused.tenant, move.new)
            return await switch_to(move, paused, move.new, action="tenant.move")
    finally:
        await run_to_completion(connections.close(source))


__all__ = ["move_by_dump"]
