"""``run_to_completion``: work that a cancellation must not cut in half."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tenancy_orm.cancellation import run_to_completion


async def test_the_result_is_returned() -> None:
    """Without a cancellation it is a plain await."""

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await run_to_completion(work()) == 7


async def test_an_error_is_raised() -> None:
    """The work's own error reaches the caller."""

    async def work() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await run_to_completion(work())


async def test_a_cancellation_waits_for_the_work() -> None:
    """However often the caller is cancelled, the work ends first, and then the cancellation is delivered."""
    begun, proceed, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await proceed.wait()
        done.set()

    task = asyncio.create_task(run_to_completion(work()))
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_an_error_after_a_cancellation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets its cancellation, and the error is not lost."""
    begun, proceed = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await proceed.wait()
        raise LookupError("too late")

    task = asyncio.create_task(run_to_completion(work()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    proceed.set()
    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        await task
    assert "LookupError: too late" in caplog.text


async def test_a_deadline_works_across_it() -> None:
    """``asyncio.timeout`` around it becomes a TimeoutError once the work has ended."""
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run_to_completion(work())
    assert done.is_set()
