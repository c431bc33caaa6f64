"""arq: jobs run for the tenant that was bound when they were enqueued (extra ``arq``).

```python
queue = TenancyArq(tenancy)


@needs_tenant
async def report(ctx: dict[str, Any], month: str) -> int:
    async with tenancy.session() as session: ...


@queue.worker
class WorkerSettings:
    functions = [report]


redis = await queue.create_pool(RedisSettings())
await redis.enqueue_job("report", "2026-11")
```

arq's messages have no headers: the tenant travels in an argument of its own, signed for this job, which the job's
function does not see.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar
from uuid import uuid4

from ..errors import ConfigurationError, MissingExtraError, TaskRefusedError
from ..tasks.gate import Message, TaskGate
from ..tasks.policy import ArrivalPolicy, Outcome
from ..tenancy import Tenancy

try:
    from arq import ArqRedis, Retry, create_pool, func
    from arq.connections import RedisSettings
    from arq.cron import CronJob
    from arq.jobs import Job
    from arq.worker import Function
except ImportError as exc:
    raise MissingExtraError("arq", "arq") from exc

C = TypeVar("C", bound=type)

ARGUMENT: Final = "_tenancy_header"


class TenancyArqRedis(ArqRedis):
    """arq's Redis client, which enqueues jobs with the bound tenant; ``TenancyArq.create_pool`` makes one."""

    tenancy_gate: TaskGate
    tenancy_functions: dict[str, object]

    async def enqueue_job(self, function: str, *args: Any, _job_id: str | None = None, **kwargs: Any) -> Job | None:
        """Enqueue a job, as in arq.

        Raises:
            NoTenantError, CrossTenantError, AdmissionEndedError: as ``TaskGate.send``.
        """
        if ARGUMENT in kwargs:
            raise ConfigurationError(f"{ARGUMENT} is an argument of this package's own; bind the tenant instead")
        job_id = _job_id or uuid4().hex
        message = Message(function, job_id, [args, kwargs], self.tenancy_functions.get(function))
        if (header := self.tenancy_gate.send(message)) is not None:
            kwargs[ARGUMENT] = header
        return await super().enqueue_job(function, *args, _job_id=job_id, **kwargs)


class TenancyArq:
    """Enqueues jobs with the bound tenant, and runs them with it.

    Args:
        tenancy: The application's.
        policy: What is done with a job for a tenant that cannot be used. A job that is tried again counts in arq's
            ``max_tries``.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        *,
        policy: ArrivalPolicy | None = None,
    ) -> None:
        self.gate = TaskGate(tenancy, queue="arq", policy=policy)
        self._functions: dict[str, object] = {}

    async def create_pool(self, settings: RedisSettings | None = None, **options: Any) -> TenancyArqRedis:
        """Connect to Redis, as ``arq.create_pool`` does; the jobs that it enqueues are the bound tenant's."""
        return self._adopt(await create_pool(settings, **options))

    def _adopt(self, pool: ArqRedis) -> TenancyArqRedis:
        adopted = TenancyArqRedis(
            pool_or_conn=pool.connection_pool,
            job_serializer=pool.job_serializer,
            job_deserializer=pool.job_deserializer,
            default_queue_name=pool.default_queue_name,
            expires_extra_ms=pool.expires_extra_ms,
        )
        adopted.tenancy_gate = self.gate
        adopted.tenancy_functions = self._functions
        # who closes it closes its connections
        adopted.auto_close_connection_pool = True
        return adopted

    def worker(self, settings: C) -> C:
        """Have a class of worker settings run each job for its tenant: ``@queue.worker`` above it.

        Its ``functions`` and ``cron_jobs`` are replaced; it opens the ``Tenancy`` before ``on_startup`` and closes it
        after ``on_shutdown``; ``ctx["redis"]`` enqueues with the bound tenant. A cron job runs for no tenant.

        Raises:
            ConfigurationError: a setting is not arq's.
        """
        replaced: Any = settings
        own = settings.__dict__
        functions = [self.wrap(function) for function in own.get("functions", ())]
        crons = own.get("cron_jobs")
        replaced.functions = functions
        if crons:
            replaced.cron_jobs = [self._wrap_cron(job) for job in crons]
        replaced.on_startup = self._starting(_function(own.get("on_startup")))
        replaced.on_shutdown = self._stopping(_function(own.get("on_shutdown")))
        return settings

    def wrap(self, function: Any) -> Function:
        """Return one of a worker's functions that runs for its job's tenant; ``worker`` does this with all of them."""
        found = func(function)
        self._functions[found.name] = found.coroutine
        return replace(found, coroutine=self._bound(found.name, found.coroutine))

    def _wrap_cron(self, job: CronJob) -> CronJob:
        return replace(job, coroutine=self._bound(job.name, job.coroutine))

    def _bound(self, name: str, coroutine: Callable[..., Awaitable[Any]]) -> Any:
        if hasattr(coroutine, "__tenancy_guard__"):
            return coroutine

        @functools.wraps(coroutine)
        async def bound(ctx: dict[Any, Any], /, *args: Any, **kwargs: Any) -> Any:
            header = kwargs.pop(ARGUMENT, None)
            message = Message(name, ctx["job_id"], [args, kwargs], coroutine)
            try:
                arrival = await self.gate.arrive(header, message)
            except TaskRefusedError as exc:
                if exc.outcome == Outcome.DROP:
                    return None
                if exc.outcome == Outcome.RETRY:
                    raise Retry(defer=exc.retry_seconds) from exc
                raise
            with arrival.bound():
                return await coroutine(ctx, *args, **kwargs)

        bound.__tenancy_guard__ = True  # type: ignore[attr-defined]
        return bound

    def _starting(self, inner: Callable[[dict[Any, Any]], Awaitable[None]] | None) -> Any:
        async def on_startup(ctx: dict[Any, Any]) -> None:
            await self.gate.open()
            adopted = self._adopt(ctx["redis"])
            adopted.auto_close_connection_pool = False  # the worker closes its own
            ctx["redis"] = adopted
            if inner is not None:
                await inner(ctx)

        return on_startup

    def _stopping(self, inner: Callable[[dict[Any, Any]], Awaitable[None]] | None) -> Any:
        async def on_shutdown(ctx: dict[Any, Any]) -> None:
            try:
                if inner is not None:
                    await inner(ctx)
            finally:
                await self.gate.close()

        return on_shutdown


def _function(given: Any) -> Any:
    """A function of a class of settings; ``staticmethod`` is how some write it there."""
    return given.__func__ if isinstance(given, staticmethod) else given


__all__ = ["TenancyArq", "TenancyArqRedis"]
