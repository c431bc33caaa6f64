"""A process of its own that uses one quota, or appends to the audit log, in a race with others.

Run as ``python -m tests.support.quota_worker MODE URL ...``. It prints ``ready``, waits for a line, does its work, and
prints one number: how often it succeeded.
"""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

from sqlalchemy import text

from tenancy_orm.audit.actor import Actor
from tenancy_orm.errors import QuotaExceededError
from tests.support.quotas import QuotaPlane, quota_plane


async def told() -> str:
    """Wait for a line from whoever started this."""
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


async def ready() -> None:
    """Say so, and wait to be let go."""
    print("ready", flush=True)
    await told()


async def consume(plane: QuotaPlane, tenant: str, resource: str, *_: str) -> int:
    """Use the quota one by one until it is refused three times over."""
    await plane.quotas.usage(UUID(tenant))  # connected before the race
    await ready()
    done = refused = 0
    while refused < 3:
        try:
            await plane.quotas.consume(UUID(tenant), resource)
            done += 1
        except QuotaExceededError:
            refused += 1
    return done


async def lease(plane: QuotaPlane, tenant: str, resource: str, block: str, *_: str) -> int:
    """Use the leased quota until it is refused."""
    await plane.quotas.usage(UUID(tenant))
    await ready()
    done = 0
    while True:
        try:
            await plane.quotas.leased(UUID(tenant), resource, block=int(block)).consume()
            done += 1
        except QuotaExceededError:
            return done


async def sit(plane: QuotaPlane, tenant: str, resource: str, block: str, *_: str) -> int:
    """Take a block, use one of it, and sit on the rest until told; then leave without a word."""
    share = plane.quotas.leased(UUID(tenant), resource, block=int(block))
    await share.consume()
    print("ready", flush=True)
    await told()
    return share.unspent


async def hold(plane: QuotaPlane, tenant: str, resource: str, *_: str) -> int:
    """Hold one until killed."""
    async with plane.quotas.hold(UUID(tenant), resource):
        print("ready", flush=True)
        await told()
    return 1


async def append(plane: QuotaPlane, count: str, number: str) -> int:
    """Append entries, each in a transaction of its own."""
    await plane.audit.events(limit=1)
    await ready()
    actor = Actor("operator", f"writer-{number}")
    for index in range(int(count)):
        await plane.append("test.append", actor=actor, after={"index": index})
    return int(count)


async def insert(plane: QuotaPlane, count: str, number: str) -> int:
    """Insert plain rows, each in a transaction of its own: what appending costs without a chain."""
    statement = text("INSERT INTO plain (writer, content) VALUES (:writer, CAST(:content AS jsonb))")
    await plane.audit.events(limit=1)
    await ready()
    for index in range(int(count)):
        async with plane.control.transaction() as connection:
            await connection.execute(statement, {"writer": number, "content": f'{{"index": {index}}}'})
    return int(count)


MODES = {function.__name__: function for function in (consume, lease, sit, hold, append, insert)}


async def main(mode: str, url: str, *arguments: str) -> None:
    """Do one of ``MODES``."""
    async with quota_plane(url, initialise=False) as plane:
        print(await MODES[mode](plane, *arguments), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
