"""The application of the tests of Celery, and its tasks."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

from celery import Celery, Task, chord

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.correlation import current_request_id
from tenancy_orm.errors import CrossTenantError
from tenancy_orm.integrations.celery import TenancyCelery
from tenancy_orm.tasks import ArrivalPolicy, needs_no_tenant, needs_tenant
from tests.support.models import Note
from tests.support.queues import tasks

URL = f"redis+socket://{os.environ['QUEUE_REDIS']}"

tenancy = Tenancy(TenancyConfig.from_env())
app = Celery(
    "tests.support.queues.celery_app",
    broker=URL,
    backend=URL,
    set_as_current=False,
)
queues = TenancyCelery(app, tenancy, policy=ArrivalPolicy(retry_seconds=0.2))
app.conf.update(
    accept_content=["json", "pickle"],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    worker_concurrency=2,
    result_chord_join_timeout=30,
    beat_schedule={"tick": {"task": "tick", "schedule": 1.0}},
)
# not made in other applications of the process too: this module may be imported again
task = functools.partial(app.task, shared=False)


@task(name="write")
@needs_tenant
def write(body: str) -> str:
    with tenancy.sync.transaction() as session:
        session.add(Note(body=body))
    return str(tasks.bound())


@task(name="write_second_time", bind=True, max_retries=1)
def write_second_time(self: Any, body: str) -> str:
    if tasks.first_time(f"fail-{tasks.bound()}-{body}"):
        raise self.retry(countdown=0.05)
    return str(write(body))


@task(name="write_after_death")
def write_after_death(body: str) -> str:
    if tasks.first_time(f"kill-{tasks.bound()}-{body}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return str(write(body))


class Calling:
    """What an application adds to ``__call__``, as Flask's documentation has it."""

    called = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).called += 1
        return self.run(*args, **kwargs)  # type: ignore[attr-defined]


class Foreign(Calling, Task):  # type: ignore[misc]
    """Has not the application's class of tasks."""


class Derived(Calling, app.Task):  # type: ignore[misc, name-defined]
    """Has it."""


@task(name="write_foreign", base=Foreign, bind=True)
@needs_tenant
def write_foreign(self: Any, body: str) -> int:
    write(body)
    return int(self.called)


@task(name="write_derived", base=Derived, bind=True)
@needs_tenant
def write_derived(self: Any, body: str) -> int:
    write(body)
    return int(self.called)


@task(name="escape")
def escape(other: str) -> str:
    try:
        with tenancy.sync.session(other):
            return "reached"
    except CrossTenantError:
        return "refused"


@task(name="bound")
def bound(*_: object) -> str | None:
    return tasks.bound()


@task(name="all_bound")
def all_bound(earlier: list[str]) -> list[str | None]:
    return [*earlier, tasks.bound()]


@task(name="start_chord")
def start_chord() -> str:
    return str(chord([bound.s(), bound.s()])(all_bound.s()).id)


@task(name="fail")
def fail() -> None:
    raise RuntimeError


@task(name="on_error")
def on_error(*_: object) -> None:
    with tenancy.sync.transaction() as session:
        session.add(Note(body="on_error"))


@task(name="request_id")
def request_id() -> str | None:
    return current_request_id()


@task(name="operate")
@needs_no_tenant
def operate() -> str | None:
    return tasks.bound()


@task(name="read", serializer="pickle")
def read(note: object) -> str:
    return tasks.body_of(note)


@task(name="tick")
def tick() -> None:
    tasks.first_time(f"tick-{tasks.bound()}")
