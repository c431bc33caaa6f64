"""``Worker``: does jobs, on any number of machines, each job in one process at a time (``tenancy worker``)."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from .backups import BackupManager
from .cancellation import run_to_completion
from .config import TenancyConfig
from .context import refuse_while_bound
from .deadlines import clock
from .errors import ConfigurationError, ControlUnavailableError, JobLostError
from .events import EventBus, JobDone, JobFailed, JobLost, JobTakenOver
from .housekeeping import Housekeeping
from .jobs import Claimant, ClaimedJob, Job, JobResult, Jobs, keep_claims
from .migrations.failures import describe
from .postgres.errors import without_detail
from .postgres.failures import SERVER_FAILURES
from .provisioning import WarmPool
from .restores.recovery import RecoveryManager
from .runs.background import BackgroundUpgrades

logger = logging.getLogger("tenancy_orm.worker")

_LOOK_SECONDS = 5.0  # how often a worker looks for jobs that are due, at least
_ENSURE_SECONDS = 60.0  # how often it looks whether its jobs have rows
_FIRST_RETRY_SECONDS = 5.0  # doubled at each failure in a row
_LAST_RETRY_SECONDS = 300.0  # or the job's interval, where that is longer
_AWAY_LOG_SECONDS = 60.0  # how often it is logged that the control database does not answer
_JITTER = 0.1
_UPGRADES_SECONDS = 30.0  # from one look for tenants that are behind to the next

_BACKUPS_SECONDS = 60.0  # from one look for tenants that are to be backed up to the next
_BASES_SECONDS = 900.0  # from one look for servers that are to be copied to the next: one that fails may copy for hours

_AWAY = (ControlUnavailableError, SQLAlchemyError, *SERVER_FAILURES)


@dataclass(slots=True)
class WorkerReport:
    """How many runs of jobs have ended well, with a failure, and in the hands of another process."""

    done: int = 0
    failed: int = 0
    lost: int = 0


class Worker:
    """Does jobs that are due, until ``stop`` is called.

    A process that is killed loses its claims after ``CLAIM_SECONDS``, and others take its jobs over. While the control
    database does not answer nothing is claimed; what runs is cancelled before another process may begin it.

    Args:
        jobs: The rows of jobs.
        registered: What to do. Names of others are left to other workers.
        events: Receives ``JobDone``, ``JobFailed``, ``JobTakenOver`` and ``JobLost``.
        stop_seconds: How long running jobs may go on after ``stop``.
        alive_file: A file that is touched again and again while the worker's event loop runs.

    Raises:
        ConfigurationError: two jobs have one name.
    """

    def __init__(
        self,
        jobs: Jobs,
        registered: Sequence[Job],
        events: EventBus,
        *,
        stop_seconds: float = 25.0,
        alive_file: Path | None = None,
    ) -> None:
        self._jobs = jobs
        self._registered = {job.name: job for job in registered}
        if len(self._registered) < len(registered):
            raise ConfigurationError(f"two jobs have one name: {', '.join(sorted(job.name for job in registered))}")
        self._events = events
        self._stop_seconds = stop_seconds
        self._alive_file = alive_file
        self._report = WorkerReport()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._cancelling = asyncio.Event()
        self._ensure_at = 0.0
        self._away_since: float | None = None
        self._away_logged = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its jobs."""
        return tuple(self._registered)

    def stop(self) -> None:
        """Claim nothing more, and let running jobs finish; called again, cancel them."""
        if self._stopping.is_set():
            self._cancelling.set()
        self._stopping.set()

    async def run(self, *, once: bool = False) -> WorkerReport:
        """Do jobs until ``stop`` is called.

        Args:
            once: Do what is due now, each job once, and return.

        Raises:
            ControlUnavailableError: with ``once``, the control database does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("running a worker")
        left = set(self._registered)
        try:
            while not self._stopping.is_set():
                self._beat()
                claimed = await self._claim(left if once else set(self._registered), patient=not once)
                for job in claimed:
                    left.discard(job.name)
                    # unbound, whoever has started the worker
                    task = asyncio.get_running_loop().create_task(self._do(job), context=Context())
                    self._running[job.name] = task
                if claimed:
                    continue
                if once and not self._running:
                    break
                await self._pause(await self._due_in())
        finally:
            await self._end()
        return self._report

    # --- claiming -----------------------------------------------------------------------------------------------------

    async def _claim(self, names: set[str], *, patient: bool) -> list[ClaimedJob]:
        free = names - self._running.keys()
        if not free:
            return []
        try:
            if clock() >= self._ensure_at:
                await self._jobs.ensure(self._registered)
                self._ensure_at = clock() + _ENSURE_SECONDS
            # a claimant of its own for each: what an earlier run of the same process writes late is not this run's
            claimed = await self._jobs.claim(free, Claimant())
        except _AWAY as exc:
            if not patient:
                raise
            self._away(exc)
            return []
        if self._away_since is not None:
            logger.warning("the control database answers again after %.0f s", clock() - self._away_since)
            self._away_since, self._ensure_at = None, 0.0
        return claimed

    def _away(self, error: BaseException) -> None:
        now = clock()
        if self._away_since is None:
            self._away_since = now
        elif now - self._away_logged < _AWAY_LOG_SECONDS:
            return
        self._away_logged = now
        logger.error(
            "the control database does not answer, nothing is claimed (%.0f s so far): %s",
            now - self._away_since,
            describe(error),
        )

    async def _due_in(self) -> float:
        free = self._registered.keys() - self._running.keys()
        if self._away_since is not None or not free:
            return _LOOK_SECONDS
        with suppress(*_AWAY):
            seconds = await self._jobs.wait(free)
            return _LOOK_SECONDS if seconds is None else min(_LOOK_SECONDS, max(0.05, seconds))
        return _LOOK_SECONDS

    async def _pause(self, seconds: float) -> None:
        """Wait for so long, or until a job has ended or the worker is stopped."""
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            # not all workers at the same moment
            limit = seconds * random.uniform(1.0, 1.0 + _JITTER)
            await asyncio.wait([stop, *self._running.values()], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()

    def _beat(self) -> None:
        if self._alive_file is not None:
            show_alive(self._alive_file)

    # --- doing --------------------------------------------------------------------------------------------------------

    async def _do(self, claimed: ClaimedJob) -> None:
        job, began = self._registered[claimed.name], clock()
        if claimed.taken_from is not None:
            logger.warning("%s: taken over from %s, which did not finish it", job.name, claimed.taken_from)
            self._events.emit(JobTakenOver(job=job.name, taken_from=claimed.taken_from))
        try:
            await self._run_claimed(job, claimed, began)
        except JobLostError as exc:
            self._report.lost += 1
            logger.error("%s: stopped after %.1f s: %s", job.name, clock() - began, exc)
            self._events.emit(JobLost(job=job.name, seconds=clock() - began))
        except asyncio.CancelledError:
            logger.warning("%s: cancelled after %.1f s; the next worker does it", job.name, clock() - began)
            await run_to_completion(self._write(claimed, self._jobs.release(claimed)))
            raise
        finally:
            del self._running[job.name]

    async def _run_claimed(self, job: Job, claimed: ClaimedJob, began: float) -> None:
        result: JobResult | None = None
        error: str | None = None
        try:
            async with keep_claims(lambda: self._jobs.renew(claimed)):
                result = _checked(job, await job.run())
        except JobLostError:
            raise
        except Exception as exc:
            logger.debug("%s failed", job.name, exc_info=without_detail(exc))
            error, after = describe(exc), self._retry_in(job, claimed.failures + 1)
        else:
            error = "; ".join(result.errors) or None if result is not None else None
            after = job.every * random.uniform(1 - _JITTER, 1 + _JITTER)
        seconds = clock() - began
        kept = None if result is None else result.result
        await self._write(claimed, self._jobs.finish(claimed, after=after, error=error, result=kept))
        if error is None:
            self._report.done += 1
            logger.info("%s: done in %.1f s", job.name, seconds)
            self._events.emit(JobDone(job=job.name, seconds=seconds))
        else:
            self._report.failed += 1
            logger.error("%s: failed after %.1f s: %s; again in %.0f s", job.name, seconds, error, after)
            self._events.emit(JobFailed(job=job.name, error=error, failures=claimed.failures + 1, seconds=seconds))

    def _retry_in(self, job: Job, failures: int) -> float:
        """Seconds until a job that has failed is tried again: soon at first, then more and more seldom."""
        longest = max(job.every, _LAST_RETRY_SECONDS)
        return min(longest, _FIRST_RETRY_SECONDS * 2.0 ** min(failures, 20)) * random.uniform(1 - _JITTER, 1 + _JITTER)

    async def _write(self, claimed: ClaimedJob, writing: Any) -> None:
        """Write a job's end; where the control database does not answer, its claim runs out instead."""
        try:
            if not await writing:
                logger.error("%s: another process has it now, so its end is not recorded", claimed.name)
        except _AWAY as exc:
            logger.error("%s: its end cannot be recorded: %s", claimed.name, describe(exc))

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Let running jobs finish within their time, and cancel the rest."""
        deadline = clock() + self._stop_seconds
        cancel = asyncio.ensure_future(self._cancelling.wait())
        try:
            while self._running and not cancel.done() and (left := deadline - clock()) > 0:
                self._beat()
                waiting: list[asyncio.Future[Any]] = [cancel, *self._running.values()]
                limit = min(left, _LOOK_SECONDS)
                await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancel.cancel()
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _checked(job: Job, result: JobResult | None) -> JobResult | None:
    """Return what a job has returned; what its row cannot hold is the job's failure, and not seen as an outage.

    Raises:
        ConfigurationError: it is not a ``JobResult`` of JSON.
    """
    if result is None:
        return None
    if not isinstance(result, JobResult):
        raise ConfigurationError(f"the job {job.name!r} returned {type(result).__name__}; return a JobResult, or None")
    try:
        text = json.dumps(dict(result.result), allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(f"the result of the job {job.name!r} is not JSON: {exc}") from exc
    if "\\u0000" in text:
        raise ConfigurationError(f"the result of the job {job.name!r} has a null character, which PostgreSQL refuses")
    return replace(result, errors=[str(error) for error in result.errors])


def show_alive(file: Path) -> None:
    """Touch ``file``, for a liveness probe."""
    try:
        file.touch()
    except OSError as exc:
        logger.error("the file that shows that this worker is alive cannot be touched: %s", exc)


def built_in_jobs(
    config: TenancyConfig,
    housekeeping: Housekeeping,
    warm_pool: WarmPool,
    upgrades: BackgroundUpgrades,
    backups: BackupManager,
    recovery: RecoveryManager,
) -> tuple[Job, ...]:
    """Return the jobs of every installation."""

    async def keep_house() -> JobResult:
        report = await housekeeping.run()
        return JobResult({"suspended": report.suspended, "purged": report.purged}, report.errors)

    async def fill_warm_pool() -> JobResult:
        report = await warm_pool.refill()
        return JobResult({"made": len(report.made), "dropped": len(report.dropped)}, report.errors)

    async def upgrade_tenants() -> JobResult:
        report = await upgrades.run()
        if report is None:
            return JobResult()
        migrated = sum(outcome.ok for outcome in report.changed)
        errors = [f"{slug}: {reason}" for slug, reason in report.reasons.items()]
        return JobResult({"run": report.run, "migrated": migrated}, errors)

    async def back_up() -> JobResult:
        report = await backups.run_due()
        errors = [f"{slug}: {reason}" for slug, reason in report.reasons.items()]
        if not report.done and not report.reasons:
            return JobResult({"made": 0, "pruned": 0}, errors)  # nothing has become older by that
        pruned = await backups.prune()
        return JobResult({"made": len(report.done), "pruned": len(pruned.pruned)}, [*errors, *pruned.errors])

    async def take_bases() -> JobResult:
        report = await recovery.take_due_bases()
        return JobResult({"taken": [one.taken.id for one in report.taken]}, report.errors)

    jobs = [Job("housekeeping", config.worker.housekeeping_seconds, keep_house)]
    if config.provisioning.warm_pool:
        jobs.append(Job("warm_pool", config.worker.warm_pool_seconds, fill_warm_pool))
    if config.migrations is not None and config.migration.background:
        jobs.append(Job("upgrades", _UPGRADES_SECONDS, upgrade_tenants))
    if config.backup.store is not None and config.backup.every_seconds:
        jobs.append(Job("backups", min(_BACKUPS_SECONDS, config.backup.every_seconds), back_up))
    if config.recovery.base_directory is not None and config.recovery.base_seconds:
        jobs.append(Job("base_backups", min(_BASES_SECONDS, config.recovery.base_seconds), take_bases))
    return tuple(jobs)


__all__ = ["Worker", "WorkerReport", "built_in_jobs", "show_alive"]
