"""Moving a tenant by logical replication: it is copied and followed while it is used, and paused for a moment."""

from __future__ import annotations

import asyncio

from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue
from ..migrations.database import lock as lock_migrations
from ..postgres import connections
from ..postgres.connections import Connection
from ..provisioning.checks.differences import enumeration
from . import checks, identities, making, tenant_role, way_back
from .copying import copy_sequences
from .pause import BothDatabases, Switched, carry, switch_to
from .record import MoveRecord
from .streams import SLOT_SECONDS
from .survey import Survey
from .truncations import referred_by_unlogged

TRUNCATED = "unlogged tables refer to {tables}, so a TRUNCATE of these ends the move, or its way back; DELETE does not"
"""What a move tells of such tables."""


async def move_by_replication(move: MoveRecord) -> Switched:
    """Make the new database, have it follow the old one, and switch to it.

    Raises:
        TenancyError: it failed; what was made is left to be undone.
    """
    forward, timeout = move.forward, move.config.timeout
    source = await forward.connect(move.old)
    try:
        # until the end: no migration changes the schema, which would not be replicated
        await lock_migrations(source, timeout=move.provisioning.config.provisioning.timeout)
        found = await checks.look(move, source)
        expected = await checks.read_schema(move, source)
        referred = await referred_by_unlogged(source)
        if referred:
            move.progress(TRUNCATED.format(tables=enumeration(referred)))
        await move.advance("publishing", identities=found.without_identity, not_to_truncate=referred)
        await identities.use_all_columns(move, found.without_identity)
        owner = await forward.connect(move.old, role=move.provisioning.names.owner)
        try:
            await forward.publish(owner, found.replicated)
        finally:
            await run_to_completion(connections.close(owner))
        expected = await checks.read_schema(move, source) if found.without_identity else expected
        reader = await forward.create_login(seconds=2 * timeout)
        await move.advance("copying")
        async with forward.begin(reader, timeout=SLOT_SECONDS) as snapshot:
            await making.make_copy(move, source, reader, expected, found, snapshot=snapshot.name)
        await move.advance("replicating")
        await forward.restrict_login()
        await forward.subscribe(reader)
        # the second time it is what was written during the first
        for _ in range(2):
            await forward.wait(source, timeout=timeout)
        back = await way_back.prepare(move, found)
        await forward.wait(source, timeout=timeout)
        await move.advance("switching", reverse=back, **found.notes)
        return await _switch(move, source, found, expected)
    finally:
        await run_to_completion(connections.close(source))


async def _switch(move: MoveRecord, source: Connection, found: Survey, expected: Catalogue) -> Switched:
    """Pause the tenant until the new database has all that the old one has, and make it the one in use."""
    config = move.config
    # the connections are opened before the pause
    async with (
        BothDatabases(move.forward, move.provisioning.names.owner) as both,
        move.services.switch.pause(move.tenant, seconds=config.pause_seconds, drain=config.drain_seconds) as paused,
    ):
        checks.refuse_migrated(move, paused.tenant)
        await checks.refuse_prepared(move, both.from_admin)
        await asyncio.gather(
            move.forward.wait(source, timeout=config.pause_seconds),
            checks.refuse_other_schema(move, both.from_admin, expected),
            copy_sequences(both.from_owner, both.to_owner),
        )
        await carry(move, both, found)
        await tenant_role.renew_password(move.provisioning, paused.tenant, move.new)
        if move.operation.detail.get("reverse") == "ready":
            await move.reverse.skip(both.to_admin)
        return await switch_to(move, paused, move.new, action="tenant.move")


__all__ = ["move_by_replication"]
