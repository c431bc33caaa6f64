"""Slowing down whoever presents invalid keys, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _Record:
    failures: int
    since: float
    blocked_until: float = 0.0
    locked: bool = False


class Throttle:
    """Counts failures per subject (a source, a key id) and spaces them out once they are too many.

    The ``limit``-th failure within ``window`` seconds of the first begins a pause of a second, and every further one
    doubles it, up to ``window``. It is all forgotten when a window has passed since the last pause ended.

    State without I/O or clock: every method takes the time, in seconds.

    Args:
        limit: Failures that bring a pause; 0 switches counting off.
        window: Seconds.
        capacity: How many subjects are remembered; beyond, the one whose last failure is longest ago is forgotten.
    """

    def __init__(self, *, limit: int, window: float, capacity: int = 10_000) -> None:
        self._limit = limit
        self._window = window
        self._capacity = capacity
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def __len__(self) -> int:
        """How many subjects are remembered."""
        return len(self._records)

    def pause(self, subject: str, now: float) -> float:
        """Seconds until ``subject`` may try again; 0 where it may now."""
        record = self._records.get(subject)
        return max(0.0, record.blocked_until - now) if record else 0.0

    def fail(self, subject: str, now: float) -> int | None:
        """Count a failure. Returns the number of failures where this one is the first to bring a pause, else None."""
        if not self._limit:
            return None
        record = self._records.get(subject)
        if record is None or now >= max(record.since, record.blocked_until) + self._window:
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
