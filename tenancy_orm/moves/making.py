"""Making the new database of a move: a copy of the old one, with the tenant's role, which cannot connect to it yet."""

from __future__ import annotations

import asyncio

from ..cancellation import run_to_completion
from ..drift.catalogue import Catalogue
from ..errors import OperationError
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.programs import find_programs
from ..provisioning.copies.database_properties import read_properties
from ..provisioning.copies.empty_databases import read_extensions
from ..provisioning.logins.copy_logins import CopyLogin
from . import tenant_role
from .copying import Copying
from .policy import SamePolicy
from .record import MoveRecord
from .survey import Survey

_SHOWN = 5


async def make_copy(
    move: MoveRecord,
    source: Connection,
    reader: CopyLogin,
    expected: Catalogue,
    found: Survey,
    *,
    snapshot: str | None,
) -> None:
    """Make the new database with what the old one has, and the tenant's role, which cannot connect to it yet.

    Args:
        move: The move.
        source: An administrative connection to the old database.
        reader: A login that reads it.
        expected: Its schema, which the copy must have.
        found: What it has.
        snapshot: The snapshot that is read; None: one of the dump's own.

    Raises:
        OperationError: the copy is not what the old database is, or only an administrator can copy all of that.
        TenancyError: a server refused, or does not answer.
    """
    config, provisioner = move.provisioning.config, move.services.provisioner
    extensions = await read_extensions(source)
    async with provisioner.new_databases.open(
        move.tenant,
        move.new.server,
        move.new.database,
        extensions_of=extensions,
        like=await read_properties(source),
        timeout=config.provisioning.timeout,
        valid_for=move.config.timeout,
    ) as new:
        inside = await new.connect()
        await run_to_completion(connections.close(inside))
        versions = connections.version(source), connections.version(inside)
        programs = await asyncio.to_thread(find_programs, max(versions), config.provisioning.client_programs)
        copying = Copying(
            programs=programs,
            reader=reader,
            restorer=new.login,
            snapshot=snapshot,
            schemas=frozenset(one.schema for one in extensions),
            exact={*versions} == {programs.version},
            everything=not move.online,
            without_rows=found.configured,
        )
        async with asyncio.timeout(move.config.timeout):
            left_out = await copying.run(connect_timeout=config.pool.connect_timeout)
        if left_out:
            raise OperationError(
                f"tenant {move.tenant.slug!r} cannot be moved: its database has objects that only an administrator can "
                f"copy: {', '.join(left_out[:_SHOWN])}"
            )
        await tenant_role.create(move)
        policy = SamePolicy(expected, owner=move.provisioning.names.owner, tenant=move.tenant.slug)
        await new.hand_over(move.tenant, move.new.role, policy=policy)
        await new.shut_guests_out(move.new.role)


__all__ = ["make_copy"]
