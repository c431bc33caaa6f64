"""Programs of tests that kill themselves at a point of their work."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import pytest

from tests.support.shell import ROOT, environment
from tests.support.warm import start_module

SECONDS = 120.0

Points = Mapping[str, tuple[Any, str, int, bool]]
"""By the name of a point: what is wrapped, at which call, and whether it dies after it."""


async def run_killed(module: str, task: Mapping[str, Any], *, seconds: float = SECONDS) -> None:
    """Run ``tests.support.<module>`` with a task on its standard input, and expect it to kill itself."""
    child = await start_module(f"tests.support.{module}", cwd=ROOT, env=environment())
    try:
        child.stdin.write(json.dumps(task).encode())
        child.stdin.close()
        async with asyncio.timeout(seconds):
            assert await child.wait() == -signal.SIGKILL, task["at"]
    finally:
        child.kill()
        await child.wait()


def run_until_killed(main: Callable[[dict[str, Any]], Coroutine[Any, Any, None]], points: Points) -> None:
    """Be such a program: read the task, and kill this process at the point ``task["at"]`` of ``main``."""
    task: dict[str, Any] = json.load(sys.stdin)
    owner, name, which, after = points[task["at"]]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, after=after, which=which)
        asyncio.run(main(task))


def kill_at(patch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool, which: int = 1) -> None:
    """Have this process end as by the kernel's out-of-memory killer, at a call of a coroutine function.

    Args:
        patch: Puts another function in its place.
        owner: The module or class that has it.
        name: Its name.
        after: Whether the process ends once the call has returned, instead of before it.
        which: Which call, counted from one.
    """
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)
    calls = 0

    async def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        number = calls  # others may begin before this one has returned
        result = await original(*args, **options) if after else None
        if number == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else await original(*args, **options)

    patch.setattr(owner, name, wrapped)
