"""Work that a cancellation must not cut in half."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("tenancy_orm.provisioning")

T = TypeVar("T")


async def settled(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even if the caller is cancelled, once or repeatedly; then be cancelled.

    Whoever handles the cancellation can so be sure that the work has happened or has failed, and is not still about
    to happen: a COMMIT that was sent cannot be called back. The work itself must have a deadline.

    Raises:
        asyncio.CancelledError: the caller was cancelled; an error of the work is logged then.
    """
    task = asyncio.ensure_future(work)
    interrupted: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as exc:
            interrupted = exc
    if interrupted is None:
        return task.result()
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("work that outlived a cancellation failed: %s: %s", type(error).__name__, error)
    raise interrupted
