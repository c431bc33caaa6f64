"""taskiq, with a worker of its own on a Redis server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from taskiq import AsyncTaskiqTask, InMemoryBroker, TaskiqScheduler
from taskiq.kicker import AsyncKicker

from tenancy_orm.correlation import RequestLabels, reset_labels, set_labels
from tenancy_orm.errors import CrossTenantError, NoTenantError, TaskRefusedError
from tenancy_orm.events import TaskRefused
from tenancy_orm.integrations.taskiq import TenancyScheduleSource, TenancyTaskiqMiddleware
from tenancy_orm.tasks.envelope import HEADER
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.queues.plane import QueuePlane, both, import_application, queue_plane, redis_server, worker_process
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


class App:
    """The broker of this process, beside the worker's."""

    def __init__(self, module: Any, plane: QueuePlane) -> None:
        self.tasks = module
        self.plane = plane

    async def result(self, sent: AsyncTaskiqTask[Any]) -> Any:
        """What a task returned, or the error that it ended with."""
        outcome = await sent.wait_result(timeout=60, check_interval=0.02)
        return outcome.error if outcome.is_err else outcome.return_value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(postgres: Postgres) -> AsyncIterator[App]:
    """A broker whose ``Tenancy`` is the plane's, and a worker."""
    async with redis_server() as redis, queue_plane(postgres, QUEUE_REDIS=str(redis)) as plane:
        module = import_application("taskiq_app", plane)
        module.middleware.gate.tenancy = plane.tenancy
        command = ["taskiq", "worker", "tests.support.queues.taskiq_app:broker", "--workers", "1"]
        with worker_process(command, plane, "taskiq.log"):
            await module.broker.startup()
            await module.source.startup()
            yield App(module, plane)
            await module.source.shutdown()
            await module.broker.shutdown()


async def test_each_task_runs_for_the_tenant_that_sent_it(app: App) -> None:
    """Two tenants interleaved in one process; also in threads, from inside a task, and with the request's id."""
    tenancy = app.plane.tenancy
    sent = []
    for tenant, number in await both(app.plane, times=15):
        async with tenancy.scope(tenant):
            sent.append((tenant, await app.tasks.write.kiq(f"{tenant.slug} {number}")))
    for tenant, task in sent:
        assert await app.result(task) == tenant.slug
    for tenant in (app.plane.acme, app.plane.globex):
        assert sorted(await app.plane.notes(tenant)) == sorted(f"{tenant.slug} {number}" for number in range(15))
    await app.plane.clear()
    async with tenancy.scope("acme"):
        assert await app.result(await app.tasks.bound_in_thread.kiq()) == "acme"
        assert await app.result(await app.tasks.escape.kiq("globex")) == "refused"
        assert await app.result(await app.tasks.escape.kiq(str(app.plane.globex.id))) == "refused"
        await app.result(await app.tasks.send_another.kiq("sent by a task"))
        token = set_labels(RequestLabels("req-1"))
        with_request = await app.tasks.request_id.kiq()
        reset_labels(token)
        assert await app.result(with_request) == "req-1"
    await until(lambda: app.plane.notes(app.plane.acme))
    assert await app.plane.notes(app.plane.acme) == ["sent by a task"]
    await app.plane.clear()
    # the binding ended with the tasks
    assert await app.result(await app.tasks.bound.kiq()) is None
    assert await app.result(await app.tasks.operate.kiq()) is None


async def test_a_retried_and_a_redelivered_task_keep_the_tenant(app: App) -> None:
    """After an error of its own, and after the worker was killed in the middle of it."""
    async with app.plane.tenancy.scope("globex"):
        failing = await app.tasks.write_second_time.kiq("retried")
        await until(failing.is_ready)
        # the second time too: the worker would take it along when it is killed
        await until(lambda: has_written(app, {"retried"}))
        killing = await app.tasks.write_after_death.kiq("redelivered")
    await until(killing.is_ready)
    await until(lambda: has_written(app, {"retried", "redelivered"}))
    assert await app.plane.notes(app.plane.acme) == []
    await app.plane.clear()


async def has_written(app: App, bodies: set[str]) -> bool:
    return bodies <= set(await app.plane.notes(app.plane.globex))


async def test_a_suspended_tenant_gets_no_task(app: App) -> None:
    """Suspended between sending and running: rejected. In maintenance: run when that has ended."""
    tenancy = app.plane.tenancy
    async with tenancy.scope("acme"):
        message = app.tasks.write.kicker()._prepare_message("suspended")
        message = await app.tasks.middleware.pre_send(message)
    await tenancy.tenants.suspend("acme")
    error = await app.result(await kick(app, message))
    assert isinstance(error, TaskRefusedError) and (error.reason, error.outcome) == ("suspended", "reject")
    await tenancy.tenants.activate("acme")

    async with tenancy.scope("acme"):
        message = app.tasks.write.kicker()._prepare_message("after maintenance")
        message = await app.tasks.middleware.pre_send(message)
    await tenancy.tenants.start_maintenance("acme")
    sent = await kick(app, message)
    await until(app.tasks.source.get_schedules)
    await tenancy.tenants.end_maintenance("acme")
    [waiting] = await app.tasks.source.get_schedules()
    await app.tasks.scheduler.on_ready(app.tasks.source, waiting)
    assert await app.result(sent) == "acme"
    await app.plane.clear()


async def kick(app: App, message: Any) -> AsyncTaskiqTask[Any]:
    """Put a message into the broker as it is."""
    await app.tasks.broker.kick(app.tasks.broker.formatter.dumps(message))
    return AsyncTaskiqTask(message.task_id, app.tasks.broker.result_backend)


async def test_a_header_is_of_one_message(app: App) -> None:
    """Whoever can write to Redis makes none: neither by hand, nor of another message, nor for another tenant."""
    async with app.plane.tenancy.scope("acme"):
        genuine = (await app.tasks.middleware.pre_send(app.tasks.write.kicker()._prepare_message("genuine"))).labels[
            HEADER
        ]
    forged = [
        f"1;{app.plane.globex.id.hex};1;;{'A' * 43}",
        genuine,
        genuine.replace(app.plane.acme.id.hex, app.plane.globex.id.hex),
        "nonsense",
        str(app.plane.globex.id),
    ]
    for header in forged:
        message = app.tasks.write.kicker()._prepare_message("forged")
        message.labels[HEADER] = header
        error = await app.result(await kick(app, message))
        assert isinstance(error, TaskRefusedError) and error.reason == "forged", header
    # a task that needs a tenant does not run without
    error = await app.result(await kick(app, app.tasks.write.kicker()._prepare_message("without")))
    assert isinstance(error, TaskRefusedError) and error.reason == "no-tenant"
    assert await app.plane.notes(app.plane.globex) == await app.plane.notes(app.plane.acme) == []


async def test_objects_of_another_tenant_do_not_travel(app: App) -> None:
    """They are refused on sending; and on arrival, where somebody has sent them past the middleware."""
    tenancy = app.plane.tenancy
    note = Note(body="acme's secret")
    async with tenancy.transaction("acme") as session:
        session.add(note)
        await session.flush()
        session.expunge(note)
    refused: list[TaskRefused] = []
    unsubscribe = tenancy.events.subscribe(TaskRefused, refused.append)
    async with tenancy.scope("acme"):
        assert await app.result(await app.tasks.read.kiq(note)) == "acme's secret"
    async with tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            await app.tasks.read.kiq({"deep": [(note,)]})
        assert [(event.reason, event.slug) for event in refused] == [("cross-tenant", "globex")]
        message = await app.tasks.middleware.pre_send(app.tasks.read.kicker()._prepare_message(None))
    unsubscribe()
    message.args[0] = [note]
    error = await app.result(await kick(app, message))
    assert isinstance(error, TaskRefusedError) and error.reason == "cross-tenant"
    await app.plane.clear()


async def test_sending_checks_who_sends(app: App) -> None:
    """A task that needs a tenant is not sent without; an operator's is not sent with one."""
    with pytest.raises(NoTenantError):
        await app.tasks.write.kiq("nobody's")
    async with app.plane.tenancy.scope("acme"):
        with pytest.raises(CrossTenantError):
            await app.tasks.operate.kiq()
        # what the caller writes there does not count
        other = f"1;{app.plane.globex.id.hex};1;;{'A' * 43}"
        assert await app.result(await app.tasks.bound.kicker().with_labels(**{HEADER: other}).kiq()) == "acme"
    with pytest.raises(TaskRefusedError):
        await app.tasks.bound.kicker().with_labels(**{HEADER: other}).kiq()


async def test_what_a_tenant_schedules_stays_its_own(app: App) -> None:
    """Of taskiq: it adds schedules past its middlewares: without the wrapped source the tenant is lost."""
    in_time = datetime.now(UTC) - timedelta(seconds=1)
    async with app.plane.tenancy.scope("globex"):
        lost = await app.tasks.write.kicker().schedule_by_time(app.tasks.source, in_time, "lost")
        kept = await app.tasks.write.kicker().schedule_by_time(app.tasks.tenant_source, in_time, "kept")
    found = {schedule.schedule_id: schedule for schedule in await app.tasks.source.get_schedules()}
    scheduler: TaskiqScheduler = app.tasks.scheduler
    with pytest.raises(NoTenantError):
        await scheduler.on_ready(app.tasks.source, found[lost.schedule_id])
    await scheduler.on_ready(app.tasks.source, found[kept.schedule_id])
    await until(lambda: app.plane.notes(app.plane.globex))
    assert await app.plane.notes(app.plane.globex) == ["kept"]
    await app.tasks.source.delete_schedule(lost.schedule_id)
    # the header of one schedule is not that of another
    stolen = found[kept.schedule_id].model_copy(update={"schedule_id": "other"})
    with pytest.raises(TaskRefusedError):
        await scheduler.on_ready(app.tasks.source, stolen)
    await app.plane.clear()


@pytest.mark.parametrize("inplace", [False, True])
async def test_the_broker_in_memory_keeps_tenants_apart(app: App, inplace: bool) -> None:
    """Tasks run in the sender's process, and the sender stays bound to its own tenant."""
    broker = InMemoryBroker(await_inplace=inplace)
    middleware = TenancyTaskiqMiddleware(app.plane.tenancy)
    broker.with_middlewares(middleware)
    seen = []

    @broker.task(task_name="see")
    async def see() -> None:
        seen.append(app.tasks.tasks.bound())

    @broker.task(task_name="fail")
    async def fail() -> None:
        raise RuntimeError

    await broker.startup()
    for tenant in ("acme", "globex"):
        async with app.plane.tenancy.scope(tenant):
            await fail.kiq()
            await see.kiq()
            assert app.tasks.tasks.bound() == tenant
            # a message without a header, from code of a tenant: not an operator's task
            plain = AsyncKicker("see", broker, {})._prepare_message()
            await broker.kick(broker.formatter.dumps(plain))
            await broker.wait_all()
            error = (await broker.result_backend.get_result(plain.task_id)).error
            assert isinstance(error, TaskRefusedError) and error.reason == "tenant-bound"
    await see.kiq()
    await broker.wait_all()
    assert seen == ["acme", "globex", None]
    assert app.tasks.tasks.bound() is None
    await broker.shutdown()
    await asyncio.sleep(0)
    assert isinstance(TenancyScheduleSource(app.tasks.source, middleware), TenancyScheduleSource)
