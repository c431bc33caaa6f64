"""A bounded dictionary without bookkeeping on a hit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)

_CHANCES = 32  # entries checked for an unused one before the next is dropped regardless


class Entry(Protocol):
    """Attributes of a cache entry; times are in seconds of any one clock."""

    used: float
    placed_at: float


E = TypeVar("E", bound=Entry)
V = TypeVar("V")


def put_bounded(entries: OrderedDict[K, V], key: K, value: V, capacity: int) -> None:
    """Put ``value`` last; beyond ``capacity`` the oldest entries are removed."""
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > capacity:
        entries.popitem(last=False)


class SecondChance(Generic[K, E]):
    """A cache of up to ``capacity`` entries that drops those first that were not used since they were placed.

    A hit is ``entries.get`` and setting ``entry.used``; an LRU would move the entry on every hit.

    Args:
        capacity: How many entries.
        dropped: Called with each entry that is dropped to make room.
    """

    __slots__ = ("_capacity", "_dropped", "entries")

    def __init__(self, capacity: int, dropped: Callable[[K, E], None]) -> None:
        self._capacity = capacity
        self._dropped = dropped
        # ordered: popping the first key of a plain dict takes time in proportion to the keys popped before
        self.entries: OrderedDict[K, E] = OrderedDict()

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self.entries)

    def put(self, key: K, entry: E) -> None:
        """Add or replace an entry."""
        self.entries.pop(key, None)
        while len(self.entries) >= self._capacity:
            self._drop_one()
        entry.placed_at = entry.used
        self.entries[key] = entry

    def _drop_one(self) -> None:
        for chance in range(_CHANCES):
            key, entry = self.entries.popitem(last=False)
            if entry.used <= entry.placed_at or chance == _CHANCES - 1:
                self._dropped(key, entry)
                return
            entry.placed_at = entry.used
            self.entries[key] = entry
