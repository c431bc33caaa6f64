"""Blocks of a quota that a process spends without asking, on a database in memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from tenancy_orm.errors import QuotaExceededError
from tenancy_orm.loops import HomeLoop
from tenancy_orm.quotas.blocks import BlockManager, LeasedQuota
from tests.support.control import Clock
from tests.support.waiting import HANGS


class Database(BlockManager):
    """Answers a leased quota's queries one by one, on demand; ``asked`` has those that wait."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[int, int, asyncio.Future[Any]]] = asyncio.Queue()
        self.home = HomeLoop()

    def handle_outcome(self, tenant_id: UUID, resource: str, amount: int, row: Any) -> None:
        if row.outcome == "exceeded":
            raise QuotaExceededError(tenant="acme", resource=resource, limit=0, used=0, requested=amount)

    async def take_block(self, quota: LeasedQuota, block_id: UUID, unspent: int, amount: int, block: int) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.put_nowait((unspent, amount, answer))
        return await answer

    async def return_block(self, block_id: UUID, unspent: int) -> None:
        pass

    def watch(self, quota: LeasedQuota) -> None:
        pass

    def unwatch(self, quota: LeasedQuota) -> None:
        pass

    async def answer(self, granted: int, *, seconds: float | None = None) -> tuple[int, int]:
        """Grant this much to the next query, or refuse it (0), and return how much was unspent and asked for."""
        async with asyncio.timeout(HANGS):
            unspent, amount, waiting = await self.asked.get()
        outcome = "counted" if granted else "exceeded"
        waiting.set_result(SimpleNamespace(outcome=outcome, granted=granted, seconds=seconds, in_blocks=0))
        return unspent, amount


async def test_nothing_is_spent_while_the_database_is_asked() -> None:
    """The query includes the unspent part of the block: spending it as well would count it twice."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    first = asyncio.create_task(share.consume(6))
    await database.answer(10)
    await first
    second = asyncio.create_task(share.consume(5))
    unspent, amount, answer = await database.asked.get()
    assert (unspent, amount) == (4, 5)
    assert not share.try_consume()
    answer.set_result(SimpleNamespace(outcome="counted", granted=1, seconds=None, in_blocks=0))
    await second
    assert share.unspent == 0


async def test_a_block_lasts_from_before_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that took long says how long the period lasts from when it was given: by now it may be over."""
    clock = Clock()
    monkeypatch.setattr("tenancy_orm.quotas.blocks.time", SimpleNamespace(monotonic=clock))
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    task = asyncio.create_task(share.consume())
    unspent, _, answer = await database.asked.get()
    clock.now += 10
    answer.set_result(SimpleNamespace(outcome="counted", granted=10, seconds=5.0, in_blocks=0))
    await task
    assert unspent == 0 and share.unspent == 9
    assert not share.try_consume()


async def test_a_change_that_is_heard_of_while_a_block_is_on_its_way_reaches_it() -> None:
    """The block was granted by the limit as it was: it is returned before more is used."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    task = asyncio.create_task(share.consume())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    share.expire()
    await database.answer(10)
    await task
    assert not share.try_consume()
    task = asyncio.create_task(share.consume())
    assert await database.answer(10) == (0, 1)
    await task
    assert share.try_consume()


async def test_a_refusal_holds_for_those_who_want_as_much_and_for_nobody_else() -> None:
    """A waiting caller that wants less sends its own query; one that wants more gets the same answer."""
    database = Database()
    share = LeasedQuota(database, UUID(int=1), "calls", 10)
    tasks = [asyncio.create_task(share.consume(amount)) for amount in (1, 5, 6, 2)]
    await asyncio.sleep(0)
    assert await database.answer(1) == (0, 1)
    assert await database.answer(0) == (0, 5)
    assert await database.answer(2) == (0, 2)
    async with asyncio.timeout(HANGS):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, QuotaExceededError) for result in results] == [False, True, True, False]
