"""procrastinate: jobs run for the tenant that was bound when they were deferred (extra ``procrastinate``).

```python
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo="..."))
TenancyProcrastinate(tenancy).install(app)


@app.task
@needs_tenant
async def report(month: str) -> None:
    async with tenancy.session() as session: ...


await report.defer_async(month="2026-11")
```

procrastinate's jobs have no headers: the tenant travels in an argument of its own, signed for this task with these
arguments, which the task's function does not see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from ..errors import ConfigurationError, MissingExtraError, TaskRefusedError
from ..tasks.gate import Message, TaskGate
from ..tasks.policy import ArrivalPolicy, Outcome
from ..tenancy import Tenancy

try:
    from procrastinate import App, BaseRetryStrategy, JobContext, RetryDecision
    from procrastinate.exceptions import JobAborted
    from procrastinate.jobs import Job
    from procrastinate.manager import JobManager
    from procrastinate.worker import Worker
except ImportError as exc:
    raise MissingExtraError("procrastinate", "procrastinate") from exc

ARGUMENT: Final = "tenancy_header"


class TenancyProcrastinate:
    """Defers jobs with the bound tenant, and runs them with it.

    Args:
        tenancy: The application's. The worker opens it, unless the application has.
        policy: What is done with a job for a tenant that cannot be used. A job that is dropped ends as "aborted", one
            that is rejected as "failed".
    """

    def __init__(
        self,
        tenancy: Tenancy,
        *,
        policy: ArrivalPolicy | None = None,
    ) -> None:
        self.gate = TaskGate(tenancy, queue="procrastinate", policy=policy)

    def install(self, app: App) -> None:
        """Make an application's jobs the tenants': once, before jobs are deferred and the worker runs.

        Raises:
            ConfigurationError: it was installed in this application before.
        """
        if isinstance(app.job_manager, _TenancyJobManager):
            raise ConfigurationError("TenancyProcrastinate is installed in this application already")
        app.job_manager = _TenancyJobManager(app, self.gate)
        given = list(app.worker_defaults.get("worker_middleware") or [])
        app.worker_defaults = {**app.worker_defaults, "worker_middleware": [self.middleware, *given]}
        run = app.run_worker_async

        async def run_worker_async(**options: Any) -> None:
            # ``worker_middleware`` takes the place of the defaults
            if (others := options.get("worker_middleware", ...)) is not ...:
                others = [one for one in others or () if one != self.middleware]
                options["worker_middleware"] = [self.middleware, *others]
            await run(**options)

        # the command line and ``run_worker`` come through here
        app.run_worker_async = run_worker_async  # type: ignore[method-assign]

    async def middleware(self, call_next: Callable[[], Awaitable[Any]], context: JobContext, worker: Worker) -> Any:
        """Run a job for its tenant; ``install`` has every worker begin with it."""
        job, task = context.job, context.app.tasks.get(context.job.task_name)
        # the arguments are passed on to the task from here
        header = job.task_kwargs.pop(ARGUMENT, None)
        try:
            message = _message(job, None if task is None else task.func)
            arrival = await self.gate.arrive(header, message)
        except TaskRefusedError as exc:
            if exc.outcome == Outcome.DROP:
                raise JobAborted from exc
            if exc.outcome == Outcome.RETRY and task is not None and not isinstance(task.retry_strategy, _LaterOrElse):
                task.retry_strategy = _LaterOrElse(task.retry_strategy)
            raise
        with arrival.bound():
            return await call_next()


class _TenancyJobManager(JobManager):
    """Writes the bound tenant into jobs."""

    def __init__(self, app: App, gate: TaskGate) -> None:
        super().__init__(app.connector)
        self._app = app
        self._gate = gate

    async def register_worker(self) -> int:
        await self._gate.open()
        return await super().register_worker()

    async def unregister_worker(self, worker_id: int) -> None:
        try:
            await super().unregister_worker(worker_id)
        finally:
            await self._gate.close()

    async def batch_defer_jobs_async(self, jobs: list[Job], connection: Any | None = None) -> list[Job]:
        return await super().batch_defer_jobs_async([self._addressed(job) for job in jobs], connection)

    def batch_defer_jobs(self, jobs: list[Job], connection: Any | None = None) -> list[Job]:
        return super().batch_defer_jobs([self._addressed(job) for job in jobs], connection)

    def _addressed(self, job: Job) -> Job:
        if ARGUMENT in job.task_kwargs:
            raise ConfigurationError(f"{ARGUMENT} is an argument of this package's own; bind the tenant instead")
        task = self._app.tasks.get(job.task_name)
        header = self._gate.send(_message(job, None if task is None else task.func))
        if header is None:
            return job
        return job.evolve(task_kwargs={**job.task_kwargs, ARGUMENT: _Header(header)})

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        job = await super().fetch_job(queues, worker_id)
        if job is not None and isinstance(header := job.task_kwargs.get(ARGUMENT), str):
            job.task_kwargs[ARGUMENT] = _Header(header)
        return job


class _Header(str):
    """A header that is not written into logs, as procrastinate does with all arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<signed>"


class _LaterOrElse(BaseRetryStrategy):
    """The retry strategy of a task, and that of the gate."""

    def __init__(self, inner: BaseRetryStrategy | None) -> None:
        self.inner = inner

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        if isinstance(exception, TaskRefusedError):
            if exception.outcome == Outcome.RETRY:
                return RetryDecision(retry_in={"seconds": int(exception.retry_seconds or 1)})
            return None
        if self.inner is None:
            return None
        found = self.inner.get_retry_exception(exception, job)
        return None if found is None else found.retry_decision


def _message(job: Job, function: object) -> Message:
    """The job's id is not known when it is signed: its arguments stand for it, which are always JSON."""
    text = json.dumps(_canonical(job.task_kwargs), sort_keys=True, default=str)
    return Message(job.task_name, hashlib.sha256(text.encode()).hexdigest(), job.task_kwargs, function)


def _canonical(value: Any) -> Any:
    """A JSON value as it is before and after PostgreSQL has stored it as jsonb, which writes some numbers otherwise."""
    if isinstance(value, dict):
        return {str(name): _canonical(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) < _EXACT:
            return int(value) if value == int(value) else value
        return repr(float(value)) if isinstance(value, float) or abs(value) < _LARGEST else str(value)
    return value


_EXACT = 2**53
_LARGEST = 10**308


__all__ = ["TenancyProcrastinate"]
