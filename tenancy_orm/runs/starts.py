"""Starts of runs: which run is joined instead, and which others a run contradicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

LIVE: Final = "p.left_at IS NULL AND p.claimed_until >= clock_timestamp()"
"""The condition that a process ``p`` of ``tenancy.migration_run_processes`` takes part now."""

_STARTS = 0x74656E616E637907  # an advisory lock of the control database
_LOCK_STARTS = text("SELECT pg_advisory_xact_lock(:key)")

# Who comes late must not go on where the others have paused: a paused run is found, unless a later one has replaced it.
_FIND = text(
    "SELECT r.id FROM tenancy.migration_runs r WHERE r.command = :command AND r.target = :target "
    "AND r.fingerprint = :fingerprint AND r.plan -> 'all' = 'true' AND (r.state = 'running' OR r.state = 'paused' "
    "AND NOT EXISTS (SELECT FROM tenancy.migration_runs later WHERE later.id > r.id AND later.plan -> 'all' = 'true' "
    "AND later.command <> 'extensions')) ORDER BY r.id DESC LIMIT 1"
)
# Upgrades do each other no harm, nor do two runs of the same. What a run has done already may be moved by another one.
_CONTRADICTING = text(
    f"SELECT r.id, r.command, r.target, EXISTS (SELECT FROM tenancy.migration_run_processes p "  # noqa: S608 - a constant
    f"WHERE p.run = r.id AND {LIVE}) AS is_live FROM tenancy.migration_runs r "
    "JOIN tenancy.migration_runs mine ON mine.id = :run "
    "WHERE r.id <> mine.id AND r.state = 'running' AND 'extensions' NOT IN (r.command, mine.command) "
    "AND NOT (r.command = mine.command AND (r.command = 'upgrade' OR r.target = mine.target)) "
    "AND EXISTS (SELECT FROM tenancy.migration_run_tenants t JOIN tenancy.migration_run_tenants m "
    "ON m.run = mine.id AND m.tenant_id = t.tenant_id WHERE t.run = r.id AND t.state IN ('waiting', 'running') "
    "AND m.state IN ('waiting', 'running')) ORDER BY is_live DESC, r.id"
)


@dataclass(frozen=True, slots=True)
class Contradicting:
    """A run that is to change tenants of another one otherwise; ``is_live`` is whether a process works on it."""

    id: int
    command: str
    target: str
    is_live: bool


async def lock_starts(connection: AsyncConnection) -> None:
    """Let no other run begin or go on before the end of the transaction. Take it before the lock of a run."""
    await connection.execute(_LOCK_STARTS, {"key": _STARTS})


async def find_to_join(connection: AsyncConnection, command: str, target: str, fingerprint: str) -> int | None:
    """Return the run over all tenants that does the same and has not ended; None if there is none."""
    names = {"command": command, "target": target, "fingerprint": fingerprint}
    found: int | None = await connection.scalar(_FIND, names)
    return found


async def contradicting(connection: AsyncConnection, run: int) -> list[Contradicting]:
    """Return the runs that contradict ``run``, those that a process works on first. Call it after ``lock_starts``."""
    return [Contradicting(*row) for row in await connection.execute(_CONTRADICTING, {"run": run})]


__all__ = ["LIVE", "Contradicting", "contradicting", "find_to_join", "lock_starts"]
