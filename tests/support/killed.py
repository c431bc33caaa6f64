"""Programs of tests that kill themselves at a point of their work."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


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
