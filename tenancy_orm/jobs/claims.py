"""Claims: this process does a piece of work now, and others may do it once it has not renewed its claim in time.

A claim is a row of the control database with ``claim`` (who), and ``claimed_until`` by that database's clock. A process
sets both in one statement, which skips locked rows; what it writes about the work later names its ``claim``, so that
nothing is written about work that another process has taken over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from sqlalchemy.exc import SQLAlchemyError

from ..deadlines import clock
from ..errors import ControlUnavailableError, JobLostError
from ..postgres.failures import SERVER_FAILURES

logger = logging.getLogger("tenancy_orm.jobs")

CLAIM_SECONDS = 30.0
"""How long a claim holds unless it is renewed: after that long, others take over what a killed process did."""

_RENEW_SECONDS = CLAIM_SECONDS / 6
_ATTEMPT_SECONDS = CLAIM_SECONDS / 6  # how long the control database may take


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims: one for each process, or for each of its tasks that works by itself."""

    id: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


@asynccontextmanager
async def keep_claims(renew: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Renew claims while the body runs, and end the body before others may take over its work.

    Args:
        renew: Extends the claims by ``CLAIM_SECONDS`` in the control database; False if others have them by now.

    Raises:
        JobLostError: the claims could not be renewed in time, or others have them; the body was cancelled.
    """
    body = asyncio.current_task()
    assert body is not None  # noqa: S101 - for the type checker: a coroutine runs in a task
    cancellations = body.cancelling()
    lost = False

    async def keep() -> None:
        nonlocal lost
        await _renew_until_lost(renew)
        lost = True
        body.cancel()

    keeper = asyncio.get_running_loop().create_task(keep())
    try:
        try:
            yield
        finally:
            keeper.cancel()
            # a cancellation that came with the end of the body is raised here
            await asyncio.wait([keeper])
    except asyncio.CancelledError:
        if lost and body.uncancel() <= cancellations:
            raise JobLostError from None
        raise
    except BaseException:
        if lost:
            body.uncancel()
        raise


async def _renew_until_lost(renew: Callable[[], Awaitable[bool]]) -> None:
    renewed = clock()
    # a renewal after that would come too late
    while clock() - renewed < CLAIM_SECONDS - _RENEW_SECONDS - _ATTEMPT_SECONDS:
        await asyncio.sleep(_RENEW_SECONDS)
        began = clock()
        try:
            async with asyncio.timeout(_ATTEMPT_SECONDS):
                if not await renew():
                    return
            renewed = began
        except (ControlUnavailableError, SQLAlchemyError, *SERVER_FAILURES) as exc:
            logger.warning("claims cannot be renewed now: %s", type(exc).__name__)


__all__ = ["CLAIM_SECONDS", "Claimant", "keep_claims"]
