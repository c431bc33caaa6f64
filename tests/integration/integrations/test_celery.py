"""Celery, with a worker of its own on a Redis server."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytest_asyncio
from celery import Celery, _state, chain, chord, group

from tenancy_orm import Tenancy
from tenancy_orm.correlation import RequestLabels, reset_labels, set_labels
from tenancy_orm.errors import ConfigurationError, CrossTenantError, NoTenantError, NotOpenError, TaskRefusedError
from tenancy_orm.integrations.celery import TenancyCelery
from tenancy_orm.tasks.envelope import HEADER
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.queues.plane import QueuePlane, both, import_application, queue_plane, redis_server, worker_process
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMAND = [
    *("celery", "--app", "tests.support.queues.celery_app:app"),
    *("worker", "--beat", "--loglevel", "INFO", "--without-gossip", "--without-mingle"),
]


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the body by itself.

    A result of Celery that is collected takes the lock of its PubSub, which redis-py 5 lets no thread take twice: in
    ``subscribe`` it would wait for itself for ever.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class App:
    """The application of this process, beside the worker's."""

    def __init__(self, module: Any, plane: QueuePlane) -> None:
        self.tasks = module
        self.plane = plane

    async def result(self, sent: Any) -> Any:
        """What a task returned, or the error that it ended with."""
        await until(sent.ready)
        # not in another thread, where Celery's listener to Redis is not
        return sent.get(timeout=10, propagate=False)

    async def past(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a message as somebody would who can write to the broker."""
        send: Callable[..., Any] = self.tasks.queues._send_task
        return await asyncio.to_thread(send, name, args, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(postgres: Postgres) -> AsyncIterator[App]:
    """An application whose ``Tenancy`` is the plane's, and a worker."""
    async with redis_server() as redis, queue_plane(postgres, QUEUE_REDIS=str(redis), C_FORCE_ROOT="1") as plane:
        module = import_application("celery_app", plane)
        module.queues.gate.tenancy = plane.tenancy
        with worker_process(COMMAND, plane, "celery.log"), uncollected():
            yield App(module, plane)
            # a result that is dropped tells Redis
            gc.collect()
            module.app.close()


async def test_each_task_runs_for_the_tenant_that_sent_it(app: App) -> None:
    """Two tenants interleaved in two processes; also in chains, groups, chords, callbacks and later on."""
    tenancy, tasks = app.plane.tenancy, app.tasks
    sent = []
    for tenant, number in await both(app.plane, times=10):
        async with tenancy.scope(tenant):
            sent.append((tenant, tasks.write.delay(f"{tenant.slug} {number}")))
    for tenant, task in sent:
        assert await app.result(task) == tenant.slug
    for tenant in (app.plane.acme, app.plane.globex):
        assert sorted(await app.plane.notes(tenant)) == sorted(f"{tenant.slug} {number}" for number in range(10))
    await app.plane.clear()
    async with tenancy.scope("acme"):
        assert await app.result(tasks.escape.delay("globex")) == "refused"
        assert await app.result(chain(tasks.bound.s(), tasks.bound.s(), tasks.bound.s())()) == "acme"
        assert await app.result(group(tasks.bound.s() for _ in range(3))()) == ["acme"] * 3
        assert await app.result(chord([tasks.bound.s()] * 2)(tasks.all_bound.s())) == ["acme"] * 3
        started = await app.result(tasks.start_chord.delay())
        assert await app.result(tasks.app.AsyncResult(started)) == ["acme"] * 3
        assert await app.result(tasks.bound.apply_async(countdown=0.1)) == "acme"
        assert await app.result(tasks.app.send_task("bound")) == "acme"
        await app.result(tasks.fail.apply_async(link_error=tasks.on_error.s()))
        token = set_labels(RequestLabels("req-1"))
        with_request = tasks.request_id.delay()
        reset_labels(token)
        assert await app.result(with_request) == "req-1"
    await until(lambda: app.plane.notes(app.plane.acme))
    assert await app.plane.notes(app.plane.acme) == ["on_error"]
    await app.plane.clear()
    # the binding ended with the tasks, in each of the processes
    assert {await app.result(tasks.bound.delay()) for _ in range(6)} == {None}
    assert await app.result(tasks.operate.delay()) is None
    await until((app.plane.directory / "once-tick-None").exists)


async def test_a_retried_and_a_redelivered_task_keep_the_tenant(app: App) -> None:
    """After ``retry``, and after the worker's process was killed in the middle of it."""
    async with app.plane.tenancy.scope("globex"):
        assert await app.result(app.tasks.write_second_time.delay("retried")) == "globex"
        assert await app.result(app.tasks.write_after_death.delay("redelivered")) == "globex"
    assert await app.plane.notes(app.plane.globex) == ["retried", "redelivered"]
    assert await app.plane.notes(app.plane.acme) == []
    await app.plane.clear()


async def test_a_suspended_tenant_gets_no_task(app: App) -> None:
    """Suspended between sending and running: rejected. In maintenance: run when that has ended."""
    tenancy = app.plane.tenancy
    async with tenancy.scope("acme"):
        rejected = app.tasks.write.apply_async(("suspended",), countdown=1.5)
    await tenancy.tenants.suspend("acme")
    error = await app.result(rejected)
    assert isinstance(error, TaskRefusedError) and (error.reason, error.outcome) == ("suspended", "reject")
    await tenancy.tenants.activate("acme")
    async with tenancy.scope("acme"):
        waiting = app.tasks.write.apply_async(("after maintenance",), countdown=1.5)
    await tenancy.tenants.start_maintenance("acme")
    await until(lambda: waiting.state == "RETRY")
    await tenancy.tenants.end_maintenance("acme")
    assert await app.result(waiting) == "acme"
    await app.plane.clear()


async def test_a_header_is_of_one_message(app: App) -> None:
    """Whoever can write to the broker makes none: neither by hand, nor of another message, nor for another tenant."""
    async with app.plane.tenancy.scope("acme"):
        genuine = app.tasks.queues._headers("write", "one", ("genuine",), {}, None)[HEADER]
    # it does run with the id that it is of
    assert await app.result(await app.past("write", "genuine", task_id="one", headers={HEADER: genuine})) == "acme"
    other = genuine.replace(app.plane.acme.id.hex, app.plane.globex.id.hex)
    attempts = [("two", genuine), ("one", other), ("three", f"1;{app.plane.globex.id.hex};1;;{'A' * 43}")]
    for number, (task_id, header) in enumerate([*attempts, ("four", "nonsense"), ("five", 7)]):
        app.tasks.app.AsyncResult(task_id).forget()
        error = await app.result(await app.past("write", f"{number}", task_id=task_id, headers={HEADER: header}))
        assert isinstance(error, TaskRefusedError) and error.reason == "forged", (task_id, header)
    error = await app.result(await app.past("write", "without"))
    assert isinstance(error, TaskRefusedError) and error.reason == "no-tenant"
    assert await app.plane.notes(app.plane.globex) == []
    await app.plane.clear()


async def test_a_task_with_a_call_of_its_own_is_guarded(app: App) -> None:
    """Its ``__call__`` is called, and not where the message is refused; whatever the task's base class."""
    for task in (app.tasks.write_foreign, app.tasks.write_derived):
        async with app.plane.tenancy.scope("acme"):
            assert await app.result(task.delay(task.name)) >= 1
            assert task.apply(("eager",), throw=False).result != 0
            header = app.tasks.queues._headers(task.name, "one", ("other",), {}, None)[HEADER]
        for reason, headers in (("no-tenant", {}), ("forged", {HEADER: header})):
            error = await app.result(await app.past(task.name, "forged", headers=headers))
            assert isinstance(error, TaskRefusedError) and error.reason == reason
    assert set(await app.plane.notes(app.plane.acme)) == {"write_foreign", "write_derived"}
    await app.plane.clear()


async def test_objects_of_another_tenant_do_not_travel(app: App) -> None:
    """They are refused on sending; and on arrival, where somebody has sent them past the application."""
    tenancy = app.plane.tenancy
    note = Note(body="acme's secret")
    async with tenancy.transaction("acme") as session:
        session.add(note)
        await session.flush()
        session.expunge(note)
    async with tenancy.scope("acme"):
        assert await app.result(app.tasks.read.delay(note)) == "acme's secret"
    async with tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            app.tasks.read.delay({"deep": [(note,)]})
        with pytest.raises(CrossTenantError):
            app.tasks.read.apply((note,))
        headers = app.tasks.queues._headers("read", "theirs", (), {}, None)
    sent = await app.past("read", [note], task_id="theirs", headers=headers, serializer="pickle")
    error = await app.result(sent)
    assert isinstance(error, TaskRefusedError) and error.reason == "cross-tenant"
    await app.plane.clear()


async def test_sending_checks_who_sends(app: App, tenancy_config: Any) -> None:
    """A task that needs a tenant is not sent without; an operator's is not sent with one."""
    with pytest.raises(NoTenantError):
        app.tasks.write.delay("nobody's")
    with pytest.raises(NoTenantError):
        app.tasks.write.apply(("nobody's",))
    async with app.plane.tenancy.scope("acme"):
        for send in (app.tasks.operate.delay, app.tasks.operate.apply):
            with pytest.raises(CrossTenantError):
                send()
    with pytest.raises(ConfigurationError):
        TenancyCelery(app.tasks.app, app.plane.tenancy)
    late = Celery("late", set_as_current=False)
    assert late.Task
    with pytest.raises(ConfigurationError):
        TenancyCelery(late, Tenancy(tenancy_config))


async def test_eager_tasks_keep_tenants_apart(app: App) -> None:
    """They run in the sender's thread, and the sender stays bound to its own tenant; a chain as well."""
    app.tasks.app.conf.task_always_eager = True
    try:
        for tenant in ("acme", "globex"):
            async with app.plane.tenancy.scope(tenant):
                assert app.tasks.bound.delay().get() == tenant
                assert app.tasks.fail.delay().failed()
                assert chain(app.tasks.bound.s(), app.tasks.bound.s())().get() == tenant
                assert app.tasks.tasks.bound() == tenant
                assert app.tasks.bound() == tenant
        assert app.tasks.bound.delay().get() is None
        assert app.tasks.tasks.bound() is None
    finally:
        app.tasks.app.conf.task_always_eager = False


async def test_a_second_application_of_the_process_binds_its_tasks_too(app: App) -> None:
    """Each runs its own tasks for the tenant that sent them."""
    second = Celery("second", broker="memory://", backend="cache+memory://", set_as_current=False)
    TenancyCelery(second, app.plane.tenancy)

    @second.task  # type: ignore[untyped-decorator]
    def bound() -> str | None:
        found: str | None = app.tasks.tasks.bound()
        return found

    for tenant in ("acme", "globex"):
        async with app.plane.tenancy.scope(tenant):
            assert bound.apply().get() == tenant
            assert app.tasks.bound.apply().get() == tenant


async def test_a_task_that_another_application_shares_is_this_ones(
    app: App, tenancy_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery makes it in both, with the base class of the one that it was written for."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))
    first, second = (Celery(name, broker="memory://", set_as_current=False) for name in ("first", "second"))
    TenancyCelery(first, Tenancy(tenancy_config))

    class Base(first.Task):  # type: ignore[misc, name-defined]
        """Of the first one."""

        abstract = True

    @first.task(name="shared", base=Base)  # type: ignore[untyped-decorator]
    def shared() -> str | None:
        found: str | None = app.tasks.tasks.bound()
        return found

    TenancyCelery(second, app.plane.tenancy)
    async with app.plane.tenancy.scope("acme"):
        assert second.tasks["shared"].apply().get() == "acme"
        # the first one's Tenancy is not open
        with pytest.raises(NotOpenError):
            first.tasks["shared"].apply()
