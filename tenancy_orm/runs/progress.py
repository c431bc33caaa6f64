"""The progress of a run, read from its records: whichever machine asks sees all of the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import text

from ..control.database import ControlDatabase
from ..errors import RunNotFoundError, counted
from ..jobs import CLAIM_SECONDS
from .starts import LIVE
from .waves import Waves

WINDOW_SECONDS = 30.0
"""The rate is that of so many seconds."""

_SILENT_SECONDS = 8.0  # a process that works renews its claim more often


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProgress:
    """How far a run is on one server: numbers of tenants. ``done`` is without those that failed."""

    server: str
    total: int
    done: int
    failed: int
    skipped: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentProcess:
    """A process that has tenants of a run, and gives no sign: others get them after ``claimed_until``."""

    host: str
    pid: int
    tenants: int
    claimed_until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """How far a run is.

    ``wave`` counts from 1, ``wave_name`` is its name. ``rate`` is tenants a second, of the last ``WINDOW_SECONDS``;
    ``remaining_seconds`` is for all that are left at this rate, without what waits between waves, None while the rate
    is 0. ``data_rows`` of about ``data_estimate`` are done by the data migrations that are under way. ``silent`` are
    the processes that may have been killed: the run waits for their tenants.
    """

    run: int
    command: str
    target: str
    state: str
    reason: str | None
    wave: int
    waves: int
    wave_name: str
    rate: float
    seconds: float
    servers: tuple[ServerProgress, ...]
    data_rows: int = 0
    data_estimate: int = 0
    silent: tuple[SilentProcess, ...] = ()

    @property
    def total(self) -> int:
        """How many tenants the run is for."""
        return sum(server.total for server in self.servers)

    @property
    def done(self) -> int:
        """How many were migrated, or were at the target already."""
        return sum(server.done for server in self.servers)

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(server.failed for server in self.servers)

    @property
    def running(self) -> int:
        """How many are being migrated."""
        return sum(server.running for server in self.servers)

    @property
    def left(self) -> int:
        """How many are not at an end."""
        return self.total - self.done - self.failed - sum(server.skipped for server in self.servers)

    @property
    def remaining_seconds(self) -> float | None:
        """How long the rest takes at this rate."""
        if not self.left:
            return 0.0
        return self.left / self.rate if self.rate else None

    @property
    def data_text(self) -> str | None:
        """How far data migrations are, for a line; None if none is under way."""
        if not self.data_estimate:
            return None
        return f"data migrations {self.data_rows:,} of {self.data_estimate:,} rows"

    @property
    def wait_text(self) -> str | None:
        """For which tenants the run waits since a process that has them gives no sign; None if it does not."""
        if not self.silent or self.state != "running":
            return None
        return "waits for " + " and ".join(
            f"{counted(one.tenants)} claimed by {one.host}:{one.pid} "
            f"until {one.claimed_until.astimezone(UTC):%H:%M:%S} UTC"
            for one in self.silent
        )

    def line(self) -> str:
        """Return one line for a log."""
        parts = [f"{self.done + self.failed} of {self.total} done", f"{self.failed} failed", f"{self.running} running"]
        parts.append(f"{self.rate:.1f}/s")
        if self.remaining_seconds is not None and self.state == "running":
            parts.append(f"{duration_text(self.remaining_seconds)} left")
        if self.data_text is not None:
            parts.append(self.data_text)
        if self.wait_text is not None:
            parts.append(self.wait_text)
        wave = f", wave {self.wave} of {self.waves} ({self.wave_name})" if self.waves > 1 else ""
        state = "" if self.state == "running" else f" {self.state}"
        found = f"run {self.run}{state}, {self.command} {self.target}{wave}: {', '.join(parts)}"
        if len(self.servers) > 1:
            found += "; " + ", ".join(
                f"{one.server} {one.done + one.failed}/{one.total}" + (f" ({one.failed} failed)" if one.failed else "")
                for one in self.servers
            )
        return found


def duration_text(seconds: float) -> str:
    """Return a time in the two largest units: ``1 h 5 min``, ``12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60} min"


_READ = text(f"""
SELECT r.id, r.command, r.target, r.state, r.reason, r.wave, r.plan,
    extract(epoch FROM coalesce(r.ended_at, clock_timestamp()) - r.created_at) AS seconds,
    t.server, t.total, t.done, t.failed, t.skipped,
    -- what is above has ended, and is not recorded yet; or its process is lost
    least(t.running, (
        SELECT coalesce(sum(greatest((p.slots ->> t.server)::integer, 0)), 0) FROM tenancy.migration_run_processes p
        WHERE p.run = r.id AND {LIVE}
    )) AS running, t.recent, t.data_rows, t.data_estimate,
    extract(epoch FROM clock_timestamp() - t.first) AS since
FROM tenancy.migration_runs r LEFT JOIN LATERAL (
    SELECT server, count(*) AS total,
        count(*) FILTER (WHERE state = 'done') AS done,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE state = 'skipped') AS skipped,
        count(*) FILTER (WHERE state = 'running') AS running,
        -- of data migrations that are under way
        coalesce(sum(d.rows) FILTER (WHERE state = 'running'), 0)::bigint AS data_rows,
        coalesce(sum(d.estimate) FILTER (WHERE state = 'running'), 0)::bigint AS data_estimate,
        count(*) FILTER (
            WHERE state IN ('done', 'failed') AND ended_at > clock_timestamp() - make_interval(secs => :window)
        ) AS recent,
        min(started_at) FILTER (
            WHERE ended_at IS NULL OR ended_at > clock_timestamp() - make_interval(secs => :window)
        ) AS first
    FROM tenancy.migration_run_tenants CROSS JOIN LATERAL (
        SELECT sum((one.value ->> 'rows')::bigint) AS rows, sum((one.value ->> 'estimate')::bigint) AS estimate
        FROM jsonb_each(detail -> 'data') AS one WHERE NOT (one.value ->> 'done')::boolean
    ) AS d WHERE run = r.id GROUP BY server
) t ON true
WHERE r.id = :run ORDER BY t.server
""")  # noqa: S608 - a constant

_READ_SILENT = text(f"""
SELECT p.host, p.pid, p.claimed_until, count(*) AS tenants
FROM tenancy.migration_run_processes p JOIN tenancy.migration_run_tenants t ON t.run = p.run AND t.claim = p.id
WHERE p.run = :run AND {LIVE}
    AND p.claimed_until < clock_timestamp() + make_interval(secs => :seconds)
GROUP BY p.id, p.host, p.pid, p.claimed_until ORDER BY p.claimed_until, p.host, p.pid
""")  # noqa: S608 - a constant


class ProgressReader:
    """Reads how far runs are.

    Args:
        control: The control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def read(self, run: int) -> RunProgress:
        """Return how far a run is.

        Raises:
            RunNotFoundError: there is none of that number.
            ControlUnavailableError: the control database does not answer.
        """
        async with self._control.connect() as connection:
            rows = (await connection.execute(_READ, {"run": run, "window": WINDOW_SECONDS})).all()
            values = {"run": run, "seconds": CLAIM_SECONDS - _SILENT_SECONDS}
            silent = (await connection.execute(_READ_SILENT, values)).all()
        if not rows:
            raise RunNotFoundError(run)
        head, waves = rows[0], Waves.from_json(rows[0].plan)
        number = min(max(head.wave, 0), waves.last)
        found = [row for row in rows if row.server is not None]
        recent = sum(row.recent for row in found)
        since = max((float(row.since) for row in found if row.since is not None), default=0.0)
        return RunProgress(
            run=head.id,
            command=head.command,
            target=head.target,
            state=head.state,
            reason=head.reason,
            wave=number + 1,
            waves=len(waves),
            wave_name=waves[number].name,
            # of a run that began less than a window ago
            rate=recent / max(1.0, min(WINDOW_SECONDS, since)),
            seconds=float(head.seconds),
            servers=tuple(
                ServerProgress(
                    server=row.server,
                    total=row.total,
                    done=row.done,
                    failed=row.failed,
                    skipped=row.skipped,
                    running=row.running,
                )
                for row in found
            ),
            data_rows=sum(row.data_rows for row in found),
            data_estimate=sum(row.data_estimate for row in found),
            silent=tuple(
                SilentProcess(host=row.host, pid=row.pid, tenants=row.tenants, claimed_until=row.claimed_until)
                for row in silent
            ),
        )

    async def watch(self, run: int, *, every: float = 1.0) -> AsyncIterator[RunProgress]:
        """Yield how far a run is, every so many seconds, until it does not run any more."""
        while True:
            progress = await self.read(run)
            yield progress
            if progress.state != "running":
                return
            await asyncio.sleep(every)


__all__ = ["ProgressReader", "RunProgress", "ServerProgress", "SilentProcess", "duration_text"]
