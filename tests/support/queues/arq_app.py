"""The worker's settings of the tests of arq, and its jobs."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from arq import Retry, cron
from arq.connections import RedisSettings

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.correlation import current_request_id
from tenancy_orm.integrations.arq import TenancyArq
from tenancy_orm.tasks import ArrivalPolicy, needs_no_tenant, needs_tenant
from tests.support.queues import tasks

SETTINGS = RedisSettings(unix_socket_path=os.environ["QUEUE_REDIS"])

tenancy = Tenancy(TenancyConfig.from_env())
queue = TenancyArq(
    tenancy,
    policy=ArrivalPolicy(retry_seconds=0.2),
)


@needs_tenant
async def write(ctx: dict[str, Any], body: str) -> str:
    return await tasks.write(tenancy, body)


async def write_second_time(ctx: dict[str, Any], body: str) -> str:
    try:
        return await tasks.write_second_time(tenancy, body)
    except RuntimeError as exc:
        raise Retry(defer=0.05) from exc


async def write_after_death(ctx: dict[str, Any], body: str) -> str:
    return await tasks.write_after_death(tenancy, body)


async def escape(ctx: dict[str, Any], other: str) -> str:
    return await tasks.escape(tenancy, other)


async def send_another(ctx: dict[str, Any], body: str) -> None:
    await ctx["redis"].enqueue_job("write", body)


async def bound(ctx: dict[str, Any]) -> str | None:
    return tasks.bound()


async def request_id(ctx: dict[str, Any]) -> str | None:
    return current_request_id()


@needs_no_tenant
async def operate(ctx: dict[str, Any]) -> str | None:
    return tasks.bound()


async def read(ctx: dict[str, Any], note: object) -> str:
    return tasks.body_of(note)


async def sleep(ctx: dict[str, Any]) -> None:
    await tasks.forever()


async def tick(ctx: dict[str, Any]) -> None:
    tasks.first_time(f"tick-{tasks.bound()}")


@queue.worker
class WorkerSettings:
    functions: ClassVar[list[Any]] = [
        write,
        write_second_time,
        write_after_death,
        escape,
        send_another,
        bound,
        request_id,
        operate,
        read,
        sleep,
    ]
    cron_jobs: ClassVar[list[Any]] = [cron(tick, second=set(range(60)), run_at_startup=True)]
    redis_settings = SETTINGS
    poll_delay = 0.02
    job_timeout = 1
    max_tries = 100
