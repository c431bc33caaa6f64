"""The application of the tests of procrastinate, and its tasks."""

from __future__ import annotations

import os
from pathlib import Path

import procrastinate

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.correlation import current_request_id
from tenancy_orm.integrations.procrastinate import TenancyProcrastinate
from tenancy_orm.tasks import ArrivalPolicy, needs_no_tenant, needs_tenant
from tests.support.queues import tasks

tenancy = Tenancy(TenancyConfig.from_env())
app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=os.environ["QUEUE_DATABASE"], min_size=1, max_size=5),
    worker_defaults={
        "concurrency": 5,
        "stalled_worker_timeout": 1.0,
        "update_heartbeat_interval": 0.2,
        "fetch_job_polling_interval": 0.05,
    },
)
queues = TenancyProcrastinate(
    tenancy,
    policy=ArrivalPolicy(retry_seconds=1, suspended="drop"),
)
queues.install(app)


def write_down(name: str, value: object) -> None:
    """Leave a result in a file, since procrastinate keeps none."""
    target = Path(os.environ["QUEUE_DIRECTORY"]) / name
    new = target.with_suffix(".new")
    new.write_text(str(value), "utf-8")
    new.replace(target)


@app.task(name="write")
@needs_tenant
async def write(body: str) -> None:
    await tasks.write(tenancy, body)


@app.task(name="write_second_time", retry=3)
async def write_second_time(body: str) -> None:
    await tasks.write_second_time(tenancy, body)


@app.task(name="write_after_death")
async def write_after_death(body: str) -> None:
    await tasks.write_after_death(tenancy, body)


@app.task(name="escape")
async def escape(other: str, out: str) -> None:
    write_down(out, await tasks.escape(tenancy, other))


@app.task(name="send_another")
async def send_another(body: str) -> None:
    await write.defer_async(body=body)


@app.task(name="bound")
async def bound(out: str, number: float = 0, **rest: object) -> None:
    write_down(out, f"{tasks.bound()} {sorted(rest)}")


@app.task(name="bound_in_thread")
def bound_in_thread(out: str) -> None:
    write_down(out, tasks.bound())


@app.task(name="request_id")
async def request_id(out: str) -> None:
    write_down(out, current_request_id())


@app.task(name="operate")
@needs_no_tenant
async def operate(out: str) -> None:
    write_down(out, tasks.bound())


@app.periodic(cron="* * * * * *")
@app.task(name="tick")
async def tick(timestamp: int) -> None:
    tasks.first_time(f"tick-{tasks.bound()}")


@app.periodic(cron="* * * * * *")
@app.task(name="pick_up")
async def pick_up(timestamp: int) -> None:
    """Retry what a killed worker has left, as procrastinate's documentation has it."""
    for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=1):
        await app.job_manager.retry_job(job)
