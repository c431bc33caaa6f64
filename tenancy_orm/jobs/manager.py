"""``Jobs``: the rows of jobs in the control database, which processes claim, renew and finish."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..errors import ConfigurationError
from . import rows
from .claims import CLAIM_SECONDS, Claimant

_LONGEST_NAME = 200
_LONGEST_ERROR = 2_000


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job returns: ``result`` is kept in its row, as JSON; with ``errors`` it counts as failed."""

    result: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """Something that is done again and again, by one process at a time.

    Args:
        name: The name of its row: up to 200 characters.
        every: The seconds from its end to its next beginning, more or less a tenth.
        run: Does it, once. It may be cancelled: when the process ends, and when another process has taken the job over.

    Raises:
        ConfigurationError: the name is empty or too long, or ``every`` is not above 0.
    """

    name: str
    every: float
    run: Callable[[], Awaitable[JobResult | None]] = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what no row can be."""
        if not 1 <= len(self.name) <= _LONGEST_NAME or not self.name.isprintable():
            raise ConfigurationError(f"a job's name has 1 to {_LONGEST_NAME} printable characters, not {self.name!r}")
        if not 0 < self.every < float("inf"):
            raise ConfigurationError(f"the job {self.name!r} needs seconds above 0 as every, not {self.every!r}")


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this process does now.

    ``failures`` is how often in a row it has failed. ``taken_from`` is the process that had claimed it and has not
    finished it, as ``host/pid``; None where there is none.
    """

    name: str
    claimant: Claimant
    failures: int
    taken_from: str | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's row.

    ``state`` is ``running`` (a process has claimed it), ``abandoned`` (the process that had claimed it has not renewed
    the claim in time, so that the next one takes it over), ``failed`` (its last run, ``failures`` times in a row) or
    ``waiting``. ``late_seconds`` is for how long it has been due and not begun. ``host`` and ``pid`` are the last
    process that has begun it.
    """

    name: str
    state: str
    due_at: datetime
    late_seconds: float
    host: str | None
    pid: int | None
    claimed_until: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    failures: int
    error: str | None
    result: Mapping[str, Any] | None


class Jobs:
    """Jobs in the control database: ``tenancy.jobs``. ``Worker`` does them.

    Args:
        control: The open control database.
    """

    def __init__(self, control: ControlDatabase) -> None:
        self._control = control

    async def ensure(self, names: Iterable[str], *, due_at: datetime | None = None) -> None:
        """Make rows of the jobs that have none, due at ``due_at``: now where None.

        Raises:
            ControlUnavailableError: the control database does not answer.
            CrossTenantError: a tenant is bound, as for all methods.
        """
        refuse_while_bound("jobs")
        async with self._control.transaction() as connection:
            await connection.execute(rows.ENSURE, {"names": list(names), "due_at": due_at})

    async def claim(self, names: Iterable[str], claimant: Claimant, *, limit: int = 1) -> list[ClaimedJob]:
        """Claim jobs that are due and that nobody does, for ``CLAIM_SECONDS``, the longest due first."""
        refuse_while_bound("jobs")
        parameters = {
            "names": list(names),
            "claim": claimant.id,
            "host": claimant.host,
            "pid": claimant.pid,
            "limit": limit,
            "seconds": CLAIM_SECONDS,
        }
        async with self._control.transaction() as connection:
            found = (await connection.execute(rows.CLAIM, parameters)).all()
        return [
            ClaimedJob(x.name, claimant, x.failures, f"{x.before_host}/{x.before_pid}" if x.was_claimed else None)
            for x in found
        ]

    async def renew(self, job: ClaimedJob) -> bool:
        """Extend a claim; False if another process has the job by now."""
        return await self._write(rows.RENEW, job, seconds=CLAIM_SECONDS)

    async def finish(
        self, job: ClaimedJob, *, after: float, error: str | None = None, result: Mapping[str, Any] | None = None
    ) -> bool:
        """Record the end of a job, which is due again in ``after`` seconds; False if another process has it by now."""
        error = None if error is None else (error[:_LONGEST_ERROR].replace("\x00", "") or "unknown")
        return await self._write(rows.FINISH, job, after=after, error=error, result=result)

    async def release(self, job: ClaimedJob) -> bool:
        """Give a claim up: the job is due at once, for anybody."""
        return await self._write(rows.RELEASE, job)

    async def _write(self, statement: Any, job: ClaimedJob, **parameters: Any) -> bool:
        refuse_while_bound("jobs")
        async with self._control.transaction() as connection:
            given = {"name": job.name, "claim": job.claimant.id, **parameters}
            return bool((await connection.execute(statement, given)).rowcount)

    async def wait(self, names: Iterable[str]) -> float | None:
        """Return in how many seconds one of the jobs can be claimed, below 0 for now; None where there is no row."""
        refuse_while_bound("jobs")
        async with self._control.connect() as connection:
            found: float | None = await connection.scalar(rows.WAIT, {"names": list(names)})
        return found

    async def hasten(self, name: str) -> bool:
        """Make a job due now; False if there is none of this name."""
        refuse_while_bound("jobs")
        async with self._control.transaction() as connection:
            return (await connection.execute(rows.HASTEN, {"name": name})).first() is not None

    async def list(self) -> tuple[JobStatus, ...]:
        """Return all jobs, by name."""
        refuse_while_bound("jobs")
        async with self._control.connect() as connection:
            found = (await connection.execute(rows.LIST)).all()
        return tuple(_status(x) for x in found)

    async def forget(self, name: str) -> bool:
        """Remove a job's row, for a job that no code has any more; False if there is none, or a process does it now."""
        refuse_while_bound("jobs")
        async with self._control.transaction() as connection:
            return bool((await connection.execute(rows.FORGET, {"name": name})).rowcount)


def _status(row: Any) -> JobStatus:
    state = (
        "running" if row.is_claimed else "abandoned" if row.is_abandoned else "failed" if row.failures else "waiting"
    )
    return JobStatus(
        name=row.name,
        state=state,
        due_at=row.due_at,
        late_seconds=0.0 if row.is_claimed else max(0.0, row.late_seconds),
        host=row.host,
        pid=row.pid,
        claimed_until=row.claimed_until,
        started_at=row.started_at,
        ended_at=row.ended_at,
        failures=row.failures,
        error=row.error,
        result=row.result,
    )


__all__ = ["ClaimedJob", "Job", "JobResult", "JobStatus", "Jobs"]
