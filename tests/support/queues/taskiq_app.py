"""The broker of the tests of taskiq, and its tasks."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import LockError
from taskiq import BrokerMessage, SimpleRetryMiddleware, TaskiqFormatter, TaskiqMessage, TaskiqScheduler
from taskiq_redis import ListRedisScheduleSource, RedisAsyncResultBackend, RedisStreamBroker

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.correlation import current_request_id
from tenancy_orm.integrations.taskiq import TenancyScheduleSource, TenancyTaskiqMiddleware
from tenancy_orm.tasks import ArrivalPolicy, needs_no_tenant, needs_tenant
from tests.support.queues import tasks

URL = f"unix://{os.environ['QUEUE_REDIS']}"


class PickleFormatter(TaskiqFormatter):
    """Sends any object; those of taskiq send JSON."""

    def dumps(self, message: TaskiqMessage) -> BrokerMessage:
        return BrokerMessage(
            task_id=message.task_id,
            task_name=message.task_name,
            message=pickle.dumps(message),
            labels=message.labels,
        )

    def loads(self, message: bytes) -> TaskiqMessage:
        loaded: TaskiqMessage = pickle.loads(message)  # noqa: S301 - its own
        return loaded


tenancy = Tenancy(TenancyConfig.from_env())
source = ListRedisScheduleSource(URL)
middleware = TenancyTaskiqMiddleware(
    tenancy,
    policy=ArrivalPolicy(retry_seconds=0.2),
    retry_source=source,
)
broker = (
    RedisStreamBroker(URL, consumer_id="0", xread_block=100, idle_timeout=5_000)
    .with_result_backend(RedisAsyncResultBackend(URL))
    .with_formatter(PickleFormatter())
    .with_middlewares(SimpleRetryMiddleware(), middleware)
)
tenant_source = TenancyScheduleSource(source, middleware)
scheduler = TaskiqScheduler(broker, [source])


@broker.task
@needs_tenant
async def write(body: str) -> str:
    return await tasks.write(tenancy, body)


@broker.task(retry_on_error=True, max_retries=3)
async def write_second_time(body: str) -> str:
    return await tasks.write_second_time(tenancy, body)


@broker.task
async def write_after_death(body: str) -> str:
    # The broker takes this lock now and then, without an end: killed with it, nobody would get what it has not done.
    lock = Redis(connection_pool=broker.connection_pool).lock(
        f"autoclaim:{broker.consumer_group_name}:{broker.queue_name}", timeout=5.0
    )
    await lock.acquire()
    try:
        return await tasks.write_after_death(tenancy, body)
    finally:
        with suppress(LockError):
            await lock.release()


@broker.task
async def escape(other: str) -> str:
    return await tasks.escape(tenancy, other)


@broker.task
async def send_another(body: str) -> str:
    sent = await write.kiq(body)
    return sent.task_id


@broker.task
async def bound() -> str | None:
    return tasks.bound()


@broker.task
def bound_in_thread() -> str | None:
    return tasks.bound()


@broker.task
async def request_id() -> str | None:
    return current_request_id()


@broker.task
@needs_no_tenant
async def operate() -> str | None:
    return tasks.bound()


@broker.task
async def read(note: object) -> str:
    return tasks.body_of(note)
