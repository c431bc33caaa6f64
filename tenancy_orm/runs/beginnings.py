"""``Beginnings``: records what tenants have before they are changed, those that begin at the same time together."""

from __future__ import annotations

import asyncio
from contextvars import Context
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from ..control.database import ControlDatabase
from ..control.notifications import CHANNEL, SCHEMA_CHANGING
from ..errors import JobLostError
from ..jobs import Claimant
from ..registry.revisions import BASE, MARK_BEGUN

# One statement: what they had before is recorded by the time when anybody may see the change. It locks in one order,
# so that two such statements do not wait for each other.
_BEGIN: Final = (
    "WITH given AS (SELECT * FROM unnest($4::uuid[], $5::text[], $6::text[], $7::double precision[], $8::boolean[]) "  # noqa: S608 - constants
    "AS g (tenant_id, before, target, seconds, again)), "
    "claimed AS MATERIALIZED (SELECT t.tenant_id FROM tenancy.migration_run_tenants t JOIN given g USING (tenant_id) "
    "JOIN tenancy.tenants n ON n.id = t.tenant_id "
    "WHERE t.run = $1::bigint AND t.claim = $2::uuid AND (g.again OR EXISTS "
    "(SELECT FROM tenancy.migration_runs r WHERE r.id = $1::bigint AND r.state = 'running')) "
    "ORDER BY t.tenant_id FOR NO KEY UPDATE OF t, n), "
    "begun AS (UPDATE tenancy.migration_run_tenants t SET state = 'running', "
    "started_at = coalesce(t.started_at, clock_timestamp()), "
    "revision_before = CASE WHEN t.is_read THEN t.revision_before ELSE g.before END, is_read = true "
    "FROM claimed c JOIN given g USING (tenant_id) WHERE t.run = $1::bigint AND t.tenant_id = c.tenant_id "
    "AND t.claim = $2::uuid RETURNING t.tenant_id, g.target, g.seconds), " + MARK_BEGUN + " "  # noqa: S608 - constants
    "SELECT tenant_id, pg_notify($3::text, "
    f"json_build_object('t', tenant_id, 'k', NULL, 'c', '{SCHEMA_CHANGING}')::text) FROM begun"
)


@dataclass(frozen=True, slots=True)
class Beginning:
    """A tenant that is about to be changed, as for ``RunClaims.begin``."""

    tenant_id: UUID
    before: str | None
    target: str | None
    seconds: float
    again: bool


class Beginnings:
    """Records what tenants have before they are changed, and announces the changes to every process.

    While one statement is under way, what comes is collected for the next one: each is a commit, which an announcement
    makes dear, since commits with one wait for each other on the whole server.

    Args:
        control: The control database.
        run: The run's number.
        claimant: The process that has claimed the tenants.
    """

    def __init__(self, control: ControlDatabase, run: int, claimant: Claimant) -> None:
        self._control = control
        self._run = run
        self._claimant = claimant
        self._waiting: list[tuple[Beginning, asyncio.Future[bool]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def record(self, beginning: Beginning) -> None:
        """Record and announce one, and return when that is committed.

        Raises:
            JobLostError, ControlUnavailableError: as ``RunClaims.begin``.
        """
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((beginning, done))
        if self._writing is None:
            # it writes for all of them, so nothing of this tenant's is in its context
            self._writing = asyncio.create_task(self._write_all(), name="tenancy-beginnings", context=Context())
        if not await done:
            raise JobLostError

    async def wait_until_written(self) -> None:
        """Return when nothing is being written any more."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._write([one for one in batch if not one[1].done()])
        finally:
            self._writing = None

    async def _write(self, batch: list[tuple[Beginning, asyncio.Future[bool]]]) -> None:
        if not batch:
            return
        given = [one for one, _ in batch]
        try:
            rows = await self._control.fetch(
                _BEGIN,
                self._run,
                self._claimant.id,
                CHANNEL,
                [one.tenant_id for one in given],
                [one.before for one in given],
                [one.target or BASE for one in given],
                [one.seconds for one in given],
                [one.again for one in given],
            )
        except BaseException as exc:
            for _, done in batch:
                if not done.done():
                    # whoever waits tries again, or ends its tenant's migration
                    done.set_exception(exc) if isinstance(exc, Exception) else done.cancel()
            if not isinstance(exc, Exception):
                raise
        else:
            begun = {row["tenant_id"] for row in rows}
            for one, done in batch:
                if not done.done():
                    done.set_result(one.tenant_id in begun)


__all__ = ["Beginning", "Beginnings"]
