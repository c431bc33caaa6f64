"""Waiting for something to become true, until a deadline."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Final

HANGS: Final = 60.0
"""Seconds after which a test takes what it waits for as lost. It asserts nothing about how long that takes."""


async def until(condition: Callable[[], object | Awaitable[object]], *, seconds: float = HANGS) -> None:
    """Wait until ``condition``, a function or a coroutine function, returns something true.

    Raises:
        TimeoutError: it does not within ``seconds``.
    """
    async with asyncio.timeout(seconds):
        while True:
            outcome = condition()
            if inspect.isawaitable(outcome):
                outcome = await outcome
            if outcome:
                return
            await asyncio.sleep(0.002)
