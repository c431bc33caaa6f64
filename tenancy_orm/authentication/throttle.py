"""Throttling of sources that present invalid keys, in bounded memory."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ..errors import TooManyAttemptsError


@dataclass(slots=True)
class _Record:
    failures: int
    since: float
    blocked_until: float = 0.0
    locked: bool = False


class Throttle:
    """Counts failures per subject (a source, a key id), and makes a subject wait once it has too many.

    The ``limit``-th failure within ``window`` seconds of the first starts a pause of one second. Each further failure
    doubles the pause, up to ``window``. The count starts again when a window has passed since the last pause ended.

    State without I/O or clock: every method takes the time, in seconds.

    Args:
        limit: Failures that start a pause; 0 switches counting off.
        window: Seconds.
        capacity: How many subjects are counted; beyond, the one with the oldest last failure is dropped.
    """

    def __init__(self, *, limit: int, window: float, capacity: int = 10_000) -> None:
        self._limit = limit
        self._window = window
        self._capacity = capacity
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def __len__(self) -> int:
        """How many subjects are counted."""
        return len(self._records)

    def pause(self, subject: str, now: float) -> float:
        """Seconds until ``subject`` may try again; 0 where it may now."""
        record = self._records.get(subject)
        return max(0.0, record.blocked_until - now) if record else 0.0

    def failures_left(self, subject: str, now: float) -> int | None:
        """How many failures ``subject`` has left before the next pause; None where there is no limit."""
        if not self._limit:
            return None
        record = self._current_record(subject, now)
        return max(0, self._limit - record.failures) if record else self._limit

    def fail(self, subject: str, now: float) -> int | None:
        """Count a failure. Returns the number of failures where this one is the first to start a pause, else None."""
        if not self._limit:
            return None
        record = self._current_record(subject, now)
        if record is None:
            record = self._records[subject] = _Record(0, now)
        record.failures += 1
        self._records.move_to_end(subject)
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)
        excess = record.failures - self._limit
        if excess < 0:
            return None
        record.blocked_until = now + min(self._window, 2.0 ** min(excess, 30))
        if record.locked:
            return None
        record.locked = True
        return record.failures

    def _current_record(self, subject: str, now: float) -> _Record | None:
        record = self._records.get(subject)
        if record is None or now >= max(record.since, record.blocked_until) + self._window:
            return None
        return record


@dataclass(slots=True)
class _InProgress:
    attempts: Counter[Hashable] = field(default_factory=Counter)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    waiters: int = 0


class Attempts:
    """Limits a subject's concurrent attempts to the failures that it has left; further attempts wait.

    Without it a thousand guesses made at once would all be in progress before the first has failed.

    Args:
        throttle: Counts the failures. The caller calls ``fail`` without awaiting after ``end``.
        timeout: How many seconds an attempt may wait.
        clock: Seconds, as the throttle's.
    """

    def __init__(self, throttle: Throttle, *, timeout: float, clock: Callable[[], float]) -> None:
        self._throttle = throttle
        self._timeout = timeout
        self._clock = clock
        self._subjects: dict[str, _InProgress] = {}

    def __len__(self) -> int:
        """How many subjects have attempts in progress."""
        return len(self._subjects)

    async def begin(self, subject: str, what: Hashable) -> None:
        """Wait until ``subject`` may try ``what``; call ``end`` afterwards. Trying the same thing twice is one attempt.

        Raises:
            TooManyAttemptsError: it has failed too often, or waited too long.
        """
        in_progress = self._subjects.setdefault(subject, _InProgress())
        in_progress.waiters += 1
        try:
            async with asyncio.timeout(self._timeout):
                while not self._may_begin(subject, in_progress, what):
                    await in_progress.ended.wait()
        except BaseException as exc:
            self._leave(subject, in_progress)
            if isinstance(exc, TimeoutError):
                raise TooManyAttemptsError(self._timeout) from None
            raise
        in_progress.attempts[what] += 1

    def end(self, subject: str, what: Hashable) -> None:
        """End an attempt. Waiting attempts continue once the caller awaits something."""
        in_progress = self._subjects[subject]
        in_progress.attempts[what] -= 1
        if not in_progress.attempts[what]:
            del in_progress.attempts[what]
            in_progress.ended.set()
            in_progress.ended = asyncio.Event()
        self._leave(subject, in_progress)

    def _may_begin(self, subject: str, in_progress: _InProgress, what: Hashable) -> bool:
        now = self._clock()
        if pause := self._throttle.pause(subject, now):
            raise TooManyAttemptsError(pause)
        left = self._throttle.failures_left(subject, now)
        # one at a time after a pause: the next failure starts another
        return left is None or what in in_progress.attempts or len(in_progress.attempts) < max(1, left)

    def _leave(self, subject: str, in_progress: _InProgress) -> None:
        in_progress.waiters -= 1
        if not in_progress.waiters:
            del self._subjects[subject]
