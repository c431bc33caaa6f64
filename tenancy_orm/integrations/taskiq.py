"""taskiq: tasks run for the tenant that was bound when they were sent (extra ``taskiq``).

```python
broker = RedisStreamBroker("redis://localhost").with_middlewares(TenancyTaskiqMiddleware(tenancy))


@broker.task
@needs_tenant
async def report(month: str) -> int:
    async with tenancy.session() as session: ...
```

The tenant travels in the label ``tenancy``, signed for this message. The worker checks it before the task's
dependencies are resolved, and binds the tenant until the result is saved: what the task sends, and its dependencies,
are the tenant's as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from ..context import current_tenant_or_none
from ..errors import ConfigurationError, MissingExtraError, TaskRefusedError
from ..tasks.envelope import HEADER
from ..tasks.gate import Message, TaskGate
from ..tasks.policy import ArrivalPolicy, Outcome
from ..tenancy import Tenancy

try:
    from taskiq import AsyncBroker, ScheduledTask, ScheduleSource, TaskiqMessage, TaskiqMiddleware, TaskiqResult
    from taskiq.exceptions import NoResultError
    from taskiq.utils import maybe_awaitable
except ImportError as exc:
    raise MissingExtraError("taskiq", "taskiq") from exc

_SCHEDULE = "schedule"


@dataclass(eq=False)
class _Run:
    """A message that is being executed."""

    refusal: TaskRefusedError | None = None
    binding: ExitStack = field(default_factory=ExitStack)
    token: Token[_Run | None] | None = None


_running: ContextVar[_Run | None] = ContextVar("tenancy_orm.taskiq", default=None)


class TenancyTaskiqMiddleware(TaskiqMiddleware):
    """Sends tasks with the bound tenant, and runs them with it.

    It opens the ``Tenancy`` when the broker starts, unless the application has; add it to every process that sends or
    runs tasks, the scheduler as well.

    Args:
        tenancy: The application's.
        policy: What is done with a task for a tenant that cannot be used. Where its answer is "retry" and there is no
            ``retry_source``, the task is rejected.
        retry_source: Where a task waits to be tried again, a ``ListRedisScheduleSource`` for example, which a
            ``TaskiqScheduler`` of this broker reads.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        *,
        policy: ArrivalPolicy | None = None,
        retry_source: ScheduleSource | None = None,
    ) -> None:
        super().__init__()
        self.gate = TaskGate(tenancy, queue="taskiq", policy=policy)
        self._retry_source = retry_source

    async def startup(self) -> None:
        """Open the ``Tenancy``, unless the application has."""
        await self.gate.open()

    async def shutdown(self) -> None:
        """Close the ``Tenancy``, if ``startup`` has opened it."""
        await self.gate.close()

    # --- sending ----------------------------------------------------------------------------------------------------

    async def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Write the bound tenant into the message.

        Raises:
            NoTenantError, CrossTenantError, AdmissionEndedError: as ``TaskGate.send``.
        """
        given = message.labels.pop(HEADER, None)
        sent = self._message(message)
        if given is not None and current_tenant_or_none() is None:
            # the scheduler sends what was scheduled while the tenant was bound
            scheduled = _scheduled(message, str(message.labels.get("schedule_id", "")))
            header: str | None = await self.gate.forward(given, scheduled, sent)
        else:
            header = self.gate.send(sent)
        if header is not None:
            message.labels[HEADER] = header
        return message

    def _message(self, message: TaskiqMessage) -> Message:
        task = self.broker.find_task(message.task_name)
        function = None if task is None else task.original_func
        return Message(message.task_name, message.task_id, [message.args, message.kwargs], function)

    # --- running ----------------------------------------------------------------------------------------------------

    async def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Check the message, and bind its tenant."""
        task = self.broker.find_task(message.task_name)
        # taskiq calls what stands here after this method; a middleware itself cannot keep a task from running
        if task is not None and not hasattr(task.original_func, "__tenancy_guard__"):
            task.original_func = _guard(task.original_func)
        run = _Run()
        run.token = _running.set(run)
        try:
            arrival = await self.gate.arrive(message.labels.get(HEADER), self._message(message))
            run.binding.enter_context(arrival.bound())
        except TaskRefusedError as exc:
            run.refusal = exc
        return message

    async def on_error(self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException) -> None:
        """Send a task again later that has arrived at a bad time."""
        run = _running.get()
        if run is None or run.refusal is None or run.refusal.outcome != Outcome.RETRY or self._retry_source is None:
            return
        schedule_id = f"{message.task_id}-{datetime.now(UTC).timestamp():.6f}"
        header = await self.gate.forward(
            message.labels[HEADER], self._message(message), _scheduled(message, schedule_id)
        )
        await self._retry_source.add_schedule(
            ScheduledTask(
                schedule_id=schedule_id,
                task_name=message.task_name,
                labels={**message.labels, HEADER: header},
                args=message.args,
                kwargs=message.kwargs,
                task_id=message.task_id,
                time=datetime.now(UTC) + timedelta(seconds=run.refusal.retry_seconds or 0),
            )
        )

    async def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """End the binding, and say in the result why a task did not run."""
        run = _running.get()
        if run is None:
            return
        if run.token is not None:
            _running.reset(run.token)
        run.binding.close()
        if run.refusal is None:
            return
        if run.refusal.outcome == Outcome.DROP:
            result.is_err, result.error = False, None
        elif run.refusal.outcome == Outcome.REJECT or self._retry_source is None:
            result.is_err, result.error = True, run.refusal


def _guard(function: Any) -> Any:
    """A task's function that does not run where the message was refused."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            _refuse()
            return await function(*args, **kwargs)

        guarded.__tenancy_guard__ = True  # type: ignore[attr-defined]
        return guarded
    return _GuardedFunction(function)


class _GuardedFunction:
    """A plain function that taskiq runs in a thread."""

    __tenancy_guard__ = True

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _refuse()
        return self._function(*args, **kwargs)

    def __reduce__(self) -> NoReturn:
        raise ConfigurationError("a task with a tenant cannot run in a pool of processes: leave out --use-process-pool")


def _refuse() -> None:
    run = _running.get()
    if run is not None and run.refusal is not None:
        # the one error that the retry middlewares of taskiq pass over
        raise NoResultError


def _scheduled(message: TaskiqMessage | ScheduledTask, schedule_id: str) -> Message:
    return Message(message.task_name, f"{_SCHEDULE}:{schedule_id}", [message.args, message.kwargs])


class TenancyScheduleSource(ScheduleSource):
    """A schedule source in which what a tenant schedules stays the tenant's.

    taskiq writes a schedule (``schedule_by_time``, ``schedule_by_cron``) past the middlewares: add it through this.

    Args:
        source: The source that keeps the schedules.
        middleware: The broker's.
    """

    def __init__(self, source: ScheduleSource, middleware: TenancyTaskiqMiddleware) -> None:
        self._source = source
        self._middleware = middleware

    async def startup(self) -> None:
        """Start the source."""
        await self._source.startup()

    async def shutdown(self) -> None:
        """Shut the source down."""
        await self._source.shutdown()

    async def get_schedules(self) -> list[ScheduledTask]:
        """Return the source's schedules."""
        return await self._source.get_schedules()

    async def add_schedule(self, schedule: ScheduledTask) -> None:
        """Write the bound tenant into a schedule, and add it.

        Raises:
            NoTenantError, CrossTenantError, AdmissionEndedError: as ``TaskGate.send``.
        """
        scheduled = _scheduled(schedule, schedule.schedule_id)
        task = self._broker.find_task(schedule.task_name)
        function = None if task is None else task.original_func
        header = self._middleware.gate.send(Message(scheduled.task, scheduled.id, scheduled.arguments, function))
        labels = {name: value for name, value in schedule.labels.items() if name != HEADER}
        if header is not None:
            labels[HEADER] = header
        await self._source.add_schedule(schedule.model_copy(update={"labels": labels}))

    async def delete_schedule(self, schedule_id: str) -> None:
        """Delete a schedule of the source."""
        await self._source.delete_schedule(schedule_id)

    async def pre_send(self, task: ScheduledTask) -> None:
        """Tell the source."""
        await maybe_awaitable(self._source.pre_send(task))

    async def post_send(self, task: ScheduledTask) -> None:
        """Tell the source."""
        await maybe_awaitable(self._source.post_send(task))

    @property
    def _broker(self) -> AsyncBroker:
        return self._middleware.broker


__all__ = ["TenancyScheduleSource", "TenancyTaskiqMiddleware"]
