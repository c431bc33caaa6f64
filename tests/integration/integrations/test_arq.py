"""arq, with a worker of its own on a Redis server."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from arq.constants import default_queue_name, job_key_prefix
from arq.jobs import Job

from tenancy_orm.correlation import RequestLabels, reset_labels, set_labels
from tenancy_orm.errors import ConfigurationError, CrossTenantError, NoTenantError, TaskRefusedError
from tenancy_orm.integrations.arq import ARGUMENT, TenancyArqRedis
from tests.support.models import Note
from tests.support.postgres import Postgres
from tests.support.queues.plane import QueuePlane, both, import_application, queue_plane, redis_server, worker_process
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMAND = ["arq", "tests.support.queues.arq_app.WorkerSettings"]


class App:
    """The queue of this process, beside the worker's."""

    def __init__(self, redis: TenancyArqRedis, plane: QueuePlane) -> None:
        self.redis = redis
        self.plane = plane

    async def send(self, function: str, *args: Any, **options: Any) -> Job:
        """Enqueue a job."""
        job = await self.redis.enqueue_job(function, *args, **options)
        assert job is not None
        return job

    async def result(self, job: Job) -> Any:
        """What a job returned, or the error that it ended with."""
        try:
            return await job.result(timeout=60, poll_delay=0.02)
        except Exception as exc:  # noqa: BLE001 - of whatever kind
            return exc


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(postgres: Postgres) -> AsyncIterator[App]:
    """A queue whose ``Tenancy`` is the plane's, and a worker."""
    async with redis_server() as redis, queue_plane(postgres, QUEUE_REDIS=str(redis)) as plane:
        arq_app = import_application("arq_app", plane)
        arq_app.queue.gate.tenancy = plane.tenancy
        pool = await arq_app.queue.create_pool(arq_app.SETTINGS)
        with worker_process(COMMAND, plane, "arq.log"):
            yield App(pool, plane)
            await pool.aclose()


async def test_each_job_runs_for_the_tenant_that_sent_it(app: App) -> None:
    """Two tenants interleaved in one process; also from inside a job, after a time-out, and with the request's id."""
    tenancy = app.plane.tenancy
    sent = []
    for tenant, number in await both(app.plane, times=15):
        async with tenancy.scope(tenant):
            sent.append((tenant, await app.send("write", f"{tenant.slug} {number}")))
    for tenant, job in sent:
        assert await app.result(job) == tenant.slug
    for tenant in (app.plane.acme, app.plane.globex):
        assert sorted(await app.plane.notes(tenant)) == sorted(f"{tenant.slug} {number}" for number in range(15))
    await app.plane.clear()
    async with tenancy.scope("acme"):
        assert await app.result(await app.send("escape", "globex")) == "refused"
        await app.result(await app.send("send_another", "sent by a job"))
        token = set_labels(RequestLabels("req-1"))
        with_request = await app.send("request_id")
        reset_labels(token)
        assert await app.result(with_request) == "req-1"
        assert isinstance(await app.result(await app.send("sleep")), TimeoutError)
        assert await app.result(await app.send("bound", _defer_by=0.05)) == "acme"
    await until(lambda: app.plane.notes(app.plane.acme))
    assert await app.plane.notes(app.plane.acme) == ["sent by a job"]
    await app.plane.clear()
    # the binding ended with the jobs
    assert await app.result(await app.send("bound")) is None
    assert await app.result(await app.send("operate")) is None
    assert (app.plane.directory / "once-tick-None").exists()


async def test_a_retried_and_a_redelivered_job_keep_the_tenant(app: App) -> None:
    """After ``Retry``, and by another worker after the first was killed in the middle of it."""
    async with app.plane.tenancy.scope("globex"):
        assert await app.result(await app.send("write_second_time", "retried")) == "globex"
        killing = await app.send("write_after_death", "redelivered")
    await until((app.plane.directory / "once-kill-globex-redelivered").exists)
    await app.redis.delete(f"arq:in-progress:{killing.job_id}")  # rather than wait for it to expire
    with worker_process(COMMAND, app.plane, "second.log"):
        assert await app.result(killing) == "globex"
        assert await app.plane.notes(app.plane.globex) == ["retried", "redelivered"]
        assert await app.plane.notes(app.plane.acme) == []
        await app.plane.clear()
        await arrivals(app)


async def arrivals(app: App) -> None:
    """Jobs that must not run; this worker is the one that is left."""
    tenancy = app.plane.tenancy
    # suspended between sending and running
    async with tenancy.scope("acme"):
        rejected = await app.send("write", "suspended", _defer_by=600)
        waiting = await app.send("write", "after maintenance", _defer_by=600)
    await tenancy.tenants.suspend("acme")
    await run_now(app, rejected)
    error = await app.result(rejected)
    assert isinstance(error, TaskRefusedError) and (error.reason, error.outcome) == ("suspended", "reject")
    await tenancy.tenants.activate("acme")
    await tenancy.tenants.start_maintenance("acme")
    await run_now(app, waiting)
    await until(lambda: app.redis.get(f"arq:retry:{waiting.job_id}"))
    await tenancy.tenants.end_maintenance("acme")
    assert await app.result(waiting) == "acme"
    await app.plane.clear()
    await headers(app)


async def run_now(app: App, job: Job) -> None:
    """Make a job due that was deferred, so that what happens before it does not race with the clock."""
    assert await app.redis.zadd(default_queue_name, {job.job_id: 1}, xx=True, ch=True)


async def headers(app: App) -> None:
    """A header that was written by hand, of another job, or for another tenant; and none at all."""
    async with app.plane.tenancy.scope("acme"):
        genuine = await app.send("write", "genuine", _defer_by=600)
    stored = pickle.loads(await app.redis.get(job_key_prefix + genuine.job_id))  # noqa: S301 - its own
    header = stored["k"][ARGUMENT]
    other = header.replace(app.plane.acme.id.hex, app.plane.globex.id.hex)
    for forged in (header, other, f"1;{app.plane.globex.id.hex};1;;{'A' * 43}", "nonsense", 7):
        job = await past_the_queue(app, "write", "forged", **{ARGUMENT: forged})
        error = await app.result(job)
        assert isinstance(error, TaskRefusedError) and error.reason == "forged"
    error = await app.result(await past_the_queue(app, "write", "without"))
    assert isinstance(error, TaskRefusedError) and error.reason == "no-tenant"
    assert await app.plane.notes(app.plane.globex) == await app.plane.notes(app.plane.acme) == []


async def past_the_queue(app: App, function: str, *args: Any, **kwargs: Any) -> Job:
    """Enqueue a job as somebody would who can write to Redis."""
    job = await super(TenancyArqRedis, app.redis).enqueue_job(function, *args, **kwargs)
    assert job is not None
    return job


async def test_sending_checks_who_sends_and_what(app: App) -> None:
    """A job that needs a tenant is not sent without; nor an operator's with one; nor another tenant's object."""
    tenancy = app.plane.tenancy
    note = Note(body="acme's secret")
    async with tenancy.transaction("acme") as session:
        session.add(note)
        await session.flush()
        session.expunge(note)
    with pytest.raises(NoTenantError):
        await app.send("write", "nobody's")
    with pytest.raises(ConfigurationError):
        await app.send("bound", **{ARGUMENT: "by hand"})
    async with tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            await app.send("operate")
        for place in (note, {"deep": [(note,)]}):
            with pytest.raises(CrossTenantError):
                await app.send("read", place)
            with pytest.raises(CrossTenantError):
                await app.send("read", note=place)
    await app.plane.clear()
