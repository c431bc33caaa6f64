"""Celery: tasks run for the tenant that was bound when they were sent (extra ``celery``).

```python
app = Celery("shop", broker="redis://localhost")
TenancyCelery(app, tenancy)


@app.task
@needs_tenant
def report(month: str) -> int:
    with tenancy.sync.session() as session: ...
```

The tenant travels in the message's header ``tenancy``, signed for this task's id. It stays bound until Celery is done
with the task: what follows in a chain, a chord's body, ``link`` and retries are the tenant's as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from ..context import current_tenant_or_none
from ..correlation import current_request_id
from ..errors import ConfigurationError, MissingExtraError, NoTenantError, TaskRefusedError
from ..tasks.envelope import HEADER
from ..tasks.gate import Arrival, Message, TaskGate
from ..tasks.policy import ArrivalPolicy, Outcome
from ..tenancy import Tenancy

try:
    from celery import Celery, Task, signals
    from celery.app.registry import TaskRegistry
    from celery.exceptions import Ignore, Retry
    from celery.utils.imports import symbol_by_name
except ImportError as exc:
    raise MissingExtraError("celery", "celery") from exc


@dataclass(eq=False)
class _Run:
    """A task that Celery is executing in this thread."""

    task_id: str
    refusal: Exception | None = None
    binding: ExitStack = field(default_factory=ExitStack)
    token: Token[_Run | None] | None = None


_running: ContextVar[_Run | None] = ContextVar("tenancy_orm.celery", default=None)


class TenancyCelery:
    """Sends an application's tasks with the bound tenant, and runs them with it.

    Make it right after the application. Each worker process opens the ``Tenancy`` for ``tenancy.sync`` with its first
    task, after a fork. Do not open it at import.

    Args:
        app: The application. It must not have made its tasks' class yet.
        tenancy: The application's.
        policy: What is done with a task for a tenant that cannot be used. A task that is dropped has no result.

    Raises:
        ConfigurationError: the application has tasks already, or was given a ``Tenancy`` before.
    """

    def __init__(self, app: Celery, tenancy: Tenancy, *, policy: ArrivalPolicy | None = None) -> None:
        self.gate = TaskGate(tenancy, queue="celery", policy=policy)
        self._app = app
        if hasattr(app, "__tenancy__"):
            raise ConfigurationError(f"{app!r} has a Tenancy already")
        if "Task" in vars(app):
            raise ConfigurationError("make TenancyCelery right after the Celery application, before anything uses it")
        app.__tenancy__ = self
        app.task_cls = _tenant_task(self, symbol_by_name(app.task_cls))
        app._tasks = _Tasks(self, app._tasks)
        self._send_task: Callable[..., Any] = app.send_task
        # every message that is not eager comes through here, also those of tasks that are known by name alone
        app.send_task = self.send_task
        for signal, receiver in (
            (signals.task_prerun, self._begin),
            (signals.task_postrun, self._end),
            (signals.worker_process_shutdown, self._close),
            (signals.worker_shutdown, self._close),
        ):
            # with a name: Celery takes a method of two objects for one receiver, and would not connect the second
            signal.connect(receiver, weak=False, dispatch_uid=(id(self), receiver.__name__))

    # --- sending ----------------------------------------------------------------------------------------------------

    def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *rest: Any,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Send a task, as ``Celery.send_task``.

        Raises:
            NoTenantError, CrossTenantError, AdmissionEndedError: as ``TaskGate.send``.
        """
        task_id = task_id or str(uuid4())
        found = self._headers(name, task_id, args, kwargs, headers)
        return self._send_task(name, args, kwargs, *rest, task_id=task_id, headers=found, **options)

    def _headers(
        self,
        name: str,
        task_id: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        given: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        # a task of which only the proxy exists is not registered before the application is finalized
        task = self._app.tasks.get(name) if self._app.finalized or self._app.autofinalize else None
        found = dict(given or {})
        if current_tenant_or_none() is None and HEADER in found:
            return found  # a task that waits for its tenant; the header is of this id, and is checked on arrival
        found.pop(HEADER, None)
        header = self.gate.send(Message(name, task_id, [args, kwargs], getattr(task, "run", None)))
        if header is not None:
            found[HEADER] = header
        return found

    # --- running ----------------------------------------------------------------------------------------------------

    def _begin(self, *, task: Task, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], **_: Any) -> None:
        if task.app is not self._app:
            return
        eager = bool(task.request.is_eager)
        if not eager:
            while (left := _running.get()) is not None:  # of a task that Celery has given up without a word
                _finish(left)
        run = _Run(task_id)
        run.token = _running.set(run)
        try:
            arrival = self._arrive_eagerly() if eager else self._arrive(task, task_id, args, kwargs)
            run.binding.enter_context(arrival.bound())
        except Exception as exc:  # noqa: BLE001 - Celery would log it, and run the task
            run.refusal = exc

    def _arrive(self, task: Task, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arrival:
        header = (task.request.headers or {}).get(HEADER)
        sync = self.gate.tenancy.sync
        if not sync.is_open:
            sync.open()
        return sync.call(self.gate.arrive, header, Message(task.name, task_id, [args, kwargs], task.run))

    def _arrive_eagerly(self) -> Arrival:
        # ``apply`` has checked it, and no message was sent
        return Arrival(current_tenant_or_none(), current_request_id())

    def _end(self, *, task: Task, task_id: str, **_: Any) -> None:
        run = _running.get()
        if task.app is self._app and run is not None and run.task_id == task_id:
            _finish(run)

    def _close(self, **_: Any) -> None:
        self.gate.tenancy.sync.close()


def _finish(run: _Run) -> None:
    # in this order: when a soft time limit comes in between, the next task finds the run, and ends its binding
    run.binding.close()
    if run.token is not None:
        _running.reset(run.token)


class _TenantTask:
    """What a task has besides what Celery gives it."""

    __tenancy__: TenancyCelery

    def __init_subclass__(cls, **options: Any) -> None:
        """Guard the class's ``__call__``, also one of an application's own that calls ``run`` by itself."""
        super().__init_subclass__(**options)
        owner = next(one for one in cls.__mro__ if "__call__" in vars(one))
        call = vars(owner)["__call__"]
        if not hasattr(call, "__tenancy_guard__"):
            cls.__call__ = _guarded(None if owner is Task else call)  # type: ignore[method-assign]

    def apply(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *rest: Any,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Run the task here, as in Celery, for the bound tenant.

        Raises:
            NoTenantError, CrossTenantError, AdmissionEndedError: as ``TaskGate.send``.
        """
        task: Any = self
        task_id = task_id or str(uuid4())
        # no message comes from elsewhere
        given = {name: value for name, value in (headers or {}).items() if name != HEADER}
        found = self.__tenancy__._headers(task.name, task_id, args, kwargs, given)
        inherited: Any = super()
        return inherited.apply(args, kwargs, *rest, task_id=task_id, headers=found, **options)


def _refuse(task: Any, refusal: Exception, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not isinstance(refusal, TaskRefusedError) or refusal.outcome == Outcome.REJECT:
        raise refusal
    if refusal.outcome == Outcome.DROP:
        raise Ignore
    request = task.request
    # not by ``retry``, which counts against the task's own ``max_retries``
    later = task.signature_from_request(
        request, args, kwargs, countdown=refusal.retry_seconds, retries=request.retries, headers=request.headers
    )
    later.apply_async()
    raise Retry(str(refusal), exc=refusal, when=refusal.retry_seconds, is_eager=False, sig=later)


def _guarded(call: Callable[..., Any] | None) -> Callable[..., Any]:
    """A ``__call__`` that does not run a task that was refused; ``call`` is None where it is Celery's own."""

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.request.called_directly:
            run = _running.get()
            if run is None or run.task_id != self.request.id:
                raise NoTenantError
            if run.refusal is not None:
                _refuse(self, run.refusal, args, kwargs)
            if call is None:
                return self.run(*args, **kwargs)  # as Celery does it: its __call__ would push another request
        return (call or Task.__call__)(self, *args, **kwargs)

    guarded.__tenancy_guard__ = True  # type: ignore[attr-defined]
    return guarded


def _tenant_task(tenancy: TenancyCelery, base: type) -> type:
    """A class of tasks, guarded."""
    found = {"__tenancy__": tenancy, "abstract": True, "__module__": base.__module__}
    bases = (base,) if issubclass(base, _TenantTask) else (_TenantTask, base)
    return type("TenantTask", bases, found)


class _Tasks(TaskRegistry):  # type: ignore[misc]
    """An application's tasks. One that has another base class than ``app.Task`` is guarded as well.

    So is one of another application: Celery makes a task in each application of the process, with its own base class.
    """

    def __init__(self, tenancy: TenancyCelery, tasks: Mapping[str, Any]) -> None:
        super().__init__()
        self._tenancy = tenancy
        for name, task in tasks.items():
            self[name] = task

    def __setitem__(self, name: str, task: Any) -> None:
        if getattr(task, "__tenancy__", None) is not self._tenancy:
            task.__class__ = _tenant_task(self._tenancy, type(task))
        super().__setitem__(name, task)


__all__ = ["TenancyCelery"]
