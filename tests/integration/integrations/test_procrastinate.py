"""procrastinate, with two workers of its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import pytest_asyncio
from procrastinate.testing import InMemoryConnector

from tenancy_orm.correlation import RequestLabels, reset_labels, set_labels
from tenancy_orm.errors import ConfigurationError, CrossTenantError, NoTenantError
from tenancy_orm.integrations.procrastinate import ARGUMENT
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.queues.plane import QueuePlane, both, import_application, queue_plane, worker_process
from tests.support.queues.tasks import bound
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMAND = [
    *("procrastinate", "--app", "tests.support.queues.procrastinate_app.app"),
    *("worker", "--fetch-job-polling-interval", "0.05"),
]


class App:
    """The application of this process, beside the worker's."""

    def __init__(self, module: Any, plane: QueuePlane, connection: asyncpg.Connection) -> None:
        self.tasks = module
        self.plane = plane
        self._connection = connection

    async def run(self, statement: str, *args: Any) -> list[Any]:
        """Run SQL on the queue's database, past the queue."""
        return list(await self._connection.fetch(statement, *args))

    async def ended(self, job_id: int) -> str:
        """Wait until a job has ended, and return how."""
        status = ""

        async def has_ended() -> bool:
            nonlocal status
            [row] = await self.run("SELECT status::text FROM procrastinate_jobs WHERE id = $1", job_id)
            status = row["status"]
            return status not in ("todo", "doing")

        await until(has_ended)
        return status

    async def answer(self, task: Any, **arguments: Any) -> str:
        """Defer a job that writes its answer into a file, and return that."""
        out = uuid4().hex
        assert await self.ended(await task.defer_async(out=out, **arguments)) == "succeeded"
        return (self.plane.directory / out).read_text("utf-8")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(postgres: Postgres) -> AsyncIterator[App]:
    """An application whose ``Tenancy`` is the plane's, and two workers, of which a test kills one."""
    name = postgres.new_name()
    url = (await postgres.create_database(name)).replace("postgresql+asyncpg:", "postgresql:", 1)
    async with queue_plane(postgres, QUEUE_DATABASE=url) as plane:
        module = import_application("procrastinate_app", plane)
        module.queues.gate.tenancy = plane.tenancy
        async with module.app.open_async():
            await module.app.schema_manager.apply_schema_async()
            async with postgres.connect(name) as connection:
                with worker_process(COMMAND, plane, "first.log"), worker_process(COMMAND, plane, "second.log"):
                    yield App(module, plane, connection)
    await postgres.drop_database(name)


async def test_each_job_runs_for_the_tenant_that_deferred_it(app: App) -> None:
    """Two tenants interleaved in two processes; also in threads, from inside a job, and with the request's id."""
    tenancy, tasks = app.plane.tenancy, app.tasks
    sent = []
    for tenant, number in await both(app.plane, times=10):
        async with tenancy.scope(tenant):
            sent.append(await tasks.write.defer_async(body=f"{tenant.slug} {number}"))
    async with tenancy.scope("acme"):
        sent += await tasks.write.batch_defer_async({"body": "acme 10"}, {"body": "acme 11"})
    for job in sent:
        assert await app.ended(job) == "succeeded"
    for tenant, count in ((app.plane.acme, 12), (app.plane.globex, 10)):
        assert sorted(await app.plane.notes(tenant)) == sorted(f"{tenant.slug} {number}" for number in range(count))
    await app.plane.clear()
    async with tenancy.scope("acme"):
        assert await app.answer(tasks.bound_in_thread) == "acme"
        assert await app.answer(tasks.escape, other="globex") == "refused"
        # the function does not see the header; and numbers that jsonb writes otherwise change no signature
        numbers: list[float] = [1.0, 1e22, 12345678901234567890, -0.0, 1e-7]
        for large_or_small in numbers:
            assert await app.answer(tasks.bound, number=large_or_small, list=[{"n": large_or_small}]) == "acme ['list']"
        await app.ended(await tasks.send_another.defer_async(body="sent by a job"))
        token = set_labels(RequestLabels("req-1"))
        assert await app.answer(tasks.request_id) == "req-1"
        reset_labels(token)
    await until(lambda: app.plane.notes(app.plane.acme))
    assert await app.plane.notes(app.plane.acme) == ["sent by a job"]
    await app.plane.clear()
    # the binding ended with the jobs
    assert await app.answer(tasks.bound) == "None []"
    assert await app.answer(tasks.operate) == "None"
    assert (app.plane.directory / "once-tick-None").exists()


async def test_a_retried_and_a_redelivered_job_keep_the_tenant(app: App) -> None:
    """After an error of its own, and by another worker after the first was killed in the middle of it."""
    async with app.plane.tenancy.scope("globex"):
        assert await app.ended(await app.tasks.write_second_time.defer_async(body="retried")) == "succeeded"
        killing = await app.tasks.write_after_death.defer_async(body="redelivered")
        assert await app.ended(killing) == "succeeded"
    assert (app.plane.directory / "once-kill-globex-redelivered").exists()
    assert await app.plane.notes(app.plane.globex) == ["retried", "redelivered"]
    assert await app.plane.notes(app.plane.acme) == []
    await app.plane.clear()


async def test_a_suspended_tenant_gets_no_job(app: App) -> None:
    """Suspended between deferring and running: dropped, by this policy. In maintenance: run when that has ended."""
    tenancy = app.plane.tenancy
    later = {"hours": 1}
    async with tenancy.scope("acme"):
        dropped = await app.tasks.write.configure(schedule_in=later).defer_async(body="suspended")
    await tenancy.tenants.suspend("acme")
    due = "UPDATE procrastinate_jobs SET scheduled_at = now() WHERE id = $1"
    await app.run(due, dropped)
    assert await app.ended(dropped) == "aborted"
    await tenancy.tenants.activate("acme")
    async with tenancy.scope("acme"):
        waiting = await app.tasks.write.configure(schedule_in=later).defer_async(body="after maintenance")
    await tenancy.tenants.start_maintenance("acme")
    await app.run(due, waiting)
    tried = "SELECT FROM procrastinate_jobs WHERE id = $1 AND attempts > 0"
    await until(lambda: app.run(tried, waiting))
    await tenancy.tenants.end_maintenance("acme")
    assert await app.ended(waiting) == "succeeded"
    assert await app.plane.notes(app.plane.acme) == ["after maintenance"]
    await app.plane.clear()


async def test_a_header_is_of_one_job(app: App) -> None:
    """A header that was written by hand, of a job with other arguments, or for another tenant; and none at all."""
    async with app.plane.tenancy.scope("acme"):
        genuine = await app.tasks.write.configure(schedule_in={"hours": 1}).defer_async(body="genuine")
    [row] = await app.run("SELECT args FROM procrastinate_jobs WHERE id = $1", genuine)
    header = json.loads(row["args"])[ARGUMENT]
    other = header.replace(app.plane.acme.id.hex, app.plane.globex.id.hex)
    by_hand = f"1;{app.plane.globex.id.hex};1;;{'A' * 43}"
    attempts = [("forged", header), ("genuine", other), ("x", by_hand), ("x", "nonsense"), ("x", 7), ("x", None)]
    for body, forged in attempts:
        arguments = {"body": body} if forged is None else {"body": body, ARGUMENT: forged}
        [row] = await app.run(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args) VALUES ('default', 'write', $1) RETURNING id",
            json.dumps(arguments),
        )
        assert await app.ended(row["id"]) == "failed"
    assert await app.plane.notes(app.plane.globex) == await app.plane.notes(app.plane.acme) == []


async def test_deferring_checks_who_defers_and_what(app: App) -> None:
    """A job that needs a tenant is not sent without; nor an operator's with one; nor another tenant's object."""
    tenancy, tasks = app.plane.tenancy, app.tasks
    note = Note(body="acme's secret")
    async with tenancy.transaction("acme") as session:
        session.add(note)
        await session.flush()
        session.expunge(note)
    with pytest.raises(NoTenantError):
        await tasks.write.defer_async(body="nobody's")
    with pytest.raises(ConfigurationError):
        await tasks.bound.defer_async(out="x", **{ARGUMENT: "by hand"})
    with pytest.raises(ConfigurationError):
        tasks.queues.install(tasks.app)
    async with tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            await tasks.operate.defer_async(out="x")
        with pytest.raises(CrossTenantError):
            await tasks.bound.defer_async(out="x", rest=[{"deep": note}])
    await app.plane.clear()


async def test_a_worker_middleware_of_ones_own_comes_after(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """In procrastinate it takes the place of the defaults. A worker that has it still runs jobs for their tenants."""
    monkeypatch.setenv("QUEUE_DIRECTORY", str(app.plane.directory))
    seen: list[str | None] = []

    async def own(call_next: Any, *_: object) -> object:
        seen.append(bound())
        return await call_next()

    options: Any = {"wait": False, "install_signal_handlers": False, "listen_notify": False}
    with app.tasks.app.replace_connector(InMemoryConnector()):
        for number, given in enumerate(([own], [own, app.tasks.queues.middleware], None)):
            async with app.plane.tenancy.scope("acme"):
                await app.tasks.bound.defer_async(out=f"own-{number}")
            await app.tasks.app.run_worker_async(worker_middleware=given, **options)
            assert (app.plane.directory / f"own-{number}").read_text("utf-8") == "acme []"
    assert [tenant for tenant in seen if tenant] == ["acme", "acme"]  # without the periodic ones
