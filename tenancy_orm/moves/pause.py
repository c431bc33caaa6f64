"""The pause of a move: the connections that it needs, what is copied in it, and the switch to the other database."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Self

from ..cancellation import run_to_completion
from ..operations import Paused
from ..postgres import connections
from ..postgres.connections import Connection
from ..tenant import Placement
from .copying import TEXTS, copy_large_objects, copy_tables
from .record import MoveRecord
from .streams import Stream
from .survey import Survey, refuse_configured


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """The pause of a switch: how long it was, and how many sessions it has ended in the middle of something."""

    pause_seconds: float
    ended_sessions: int


class BothDatabases:
    """Connections to both databases, opened before a pause to be used in it: as the owner, and as the administrator.

    Args:
        stream: The direction of the move, or of its way back.
        owner: The owner of tenants' databases.
    """

    from_owner: Connection
    from_admin: Connection
    to_owner: Connection
    to_admin: Connection

    def __init__(self, stream: Stream, owner: str) -> None:
        self._stream = stream
        self._owner = owner
        self._opened: list[Connection] = []

    async def __aenter__(self) -> Self:
        source, target = self._stream.source, self._stream.target
        try:
            self.from_owner = await self._open(source, self._owner)
            self.from_admin = await self._open(source, None)
            self.to_owner = await self._open(target, self._owner)
            self.to_admin = await self._open(target, None)
        except BaseException:
            await run_to_completion(self._close())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await run_to_completion(self._close())

    async def _open(self, place: Placement, role: str | None) -> Connection:
        self._opened.append(await self._stream.connect(place, role=role, settings=TEXTS))
        return self._opened[-1]

    async def _close(self) -> None:
        await asyncio.gather(*(connections.close(one) for one in self._opened))


async def carry(move: MoveRecord, both: BothDatabases, found: Survey) -> None:
    """Copy what replication does not carry, and refuse what is not copied.

    Raises:
        OperationError: tables of extensions have rows of users.
    """
    await refuse_configured(both.from_admin, move.tenant.slug)
    await copy_tables(both.from_owner, both.to_owner, found.unlogged)
    await copy_large_objects(both.from_admin, both.to_admin, move.new.role)


async def switch_to(move: MoveRecord, paused: Paused, place: Placement, *, action: str) -> Switched:
    """Make one of the databases the one in use.

    Args:
        move: The move.
        paused: The tenant, in a pause.
        place: The database.
        action: The action, for the audit log.

    Raises:
        TenancyError: as ``Paused.to``; then nothing has changed.
    """
    assert paused.tenant.placement is not None  # noqa: S101 - for the type checker: it is paused in it
    await paused.to(
        replace(place, sealed_password=paused.tenant.placement.sealed_password),
        action=action,
        revision=paused.tenant.schema_revision,
        # until the move is confirmed
        kept_until=None,
        operation=move.operation.id,
        claim=move.claimant.id,
        detail={"ended_sessions": paused.ended_sessions},
        actor=move.actor,
    )
    return Switched(pause_seconds=time.monotonic() - paused.began, ended_sessions=paused.ended_sessions)


__all__ = ["BothDatabases", "Switched", "carry", "switch_to"]
