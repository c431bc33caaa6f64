"""Work that a cancellation must not cut in half."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("tenancy_orm.cancellation")

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, and raise a cancellation of the caller only then, however often it is cancelled.

    So a caller that handles the cancellation knows that the work has succeeded or failed, and is not still under way:
    a COMMIT that was sent cannot be taken back, and what follows it must not be left out. The work must have a deadline
    of its own.

    Raises:
        asyncio.CancelledError: the caller was cancelled; an error of the work is then logged.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as exc:
            cancellation = exc
    if cancellation is None:
        return task.result()
    if not task.cancelled() and (error := task.exception()) is not None:
        name = getattr(work, "__qualname__", "work")
        logger.error("%s failed after its caller was cancelled: %s: %s", name, type(error).__name__, error)
    raise cancellation
