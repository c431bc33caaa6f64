"""Waiting for a control database that does not answer now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from ..errors import ControlUnavailableError
from ..postgres.errors import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, QUERY_CANCELED, sqlstate_of

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""How long a control database that does not answer is waited for, once nothing is being migrated any more."""

_PAUSE = 0.5
_BUSY: Final = frozenset({DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, QUERY_CANCELED})


def is_temporary(error: BaseException) -> bool:
    """Whether the control database may do later what it has not done now."""
    return isinstance(error, (ControlUnavailableError, TimeoutError)) or sqlstate_of(error) in _BUSY


async def repeat(call: Callable[[], Awaitable[T]]) -> T:
    """Call until the control database answers, for ``PATIENCE_SECONDS`` at most; return the answer.

    Raises:
        Exception: what the last call has raised, or one that later ones would raise as well.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except Exception as exc:
            if not is_temporary(exc) or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_PAUSE)


__all__ = ["PATIENCE_SECONDS", "is_temporary", "repeat"]
