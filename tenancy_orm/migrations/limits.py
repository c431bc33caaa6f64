"""Time limits of a migration, and how often one is tried."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ..postgres.errors import sqlstate_of
from .data_batches import DataLimits
from .failures import TRANSIENT, describe
from .logs import logger

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of a migration, in seconds, and how many attempts it has if it cannot get a lock.

    ``connect`` bounds opening a connection and reading the revision, ``wait`` waiting for another run, ``total`` the
    whole migration of one database but for its data migrations, which have the limits ``data``, and ``preflight`` each
    check of a revision. ``notice`` is the time between the announcement of a change and the change. ``pause`` is the
    first one between two attempts; each further one is twice as long, up to ``longest_pause``. ``statement`` is
    PostgreSQL's statement_timeout.
    """

    connect: float = 10.0
    wait: float = 300.0
    total: float = 3600.0
    attempts: int = 5
    notice: float = 0.25
    preflight: float = 60.0
    pause: float = 0.2
    longest_pause: float = 2.0
    statement: float = 0.0
    data: DataLimits = field(default_factory=DataLimits)


async def try_repeatedly(
    attempt: Callable[[], Awaitable[T]], limits: Limits, *, may_repeat: Callable[[], bool] = lambda: True
) -> T:
    """Call ``attempt`` until it succeeds, at most ``limits.attempts`` times, after errors that may pass by themselves.

    After an error, ``may_repeat`` says whether another attempt is safe.

    The pauses grow, and each is a random part of its length: sessions that blocked each other do not meet again.

    Raises:
        Exception: the last error.
    """
    for number in range(1, limits.attempts + 1):
        try:
            return await attempt()
        except Exception as exc:
            if number == limits.attempts or sqlstate_of(exc) not in TRANSIENT or not may_repeat():
                raise
            logger.info("attempt %d of %d: %s", number, limits.attempts, describe(exc))
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(limits.longest_pause, limits.pause * 2 ** (number - 1)))
    raise AssertionError("there is at least one attempt")
