"""Timelines of a server's WAL: which of the files lead on from a base backup.

A server that is recovered to an earlier time, or a standby that is promoted, goes on with a timeline of its own. What
the former one has written after that place is not part of it, though its files have higher numbers. The file
``.history`` of a timeline says which timelines it comes from, and where it has left each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .wal_files import Segment, place_of

_LINE = re.compile(r"^\s*(\d+)\s+([0-9A-F]+/[0-9A-F]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class WalRange:
    """A part of a timeline, in bytes of the WAL.

    Attributes:
        timeline: Its number.
        begin: Where it begins.
        end: Where it ends; None: it goes on.
    """

    timeline: int
    begin: int
    end: int | None


@dataclass(frozen=True, slots=True)
class Branch:
    """A timeline, with those that it comes from.

    Attributes:
        ranges: The parts of these timelines that belong to it, the oldest first. The last one is its own.
        has_history: Whether there is a file that says so; the first timeline has none and needs none.
    """

    ranges: tuple[WalRange, ...]
    has_history: bool

    @property
    def number(self) -> int:
        """The timeline's number."""
        return self.ranges[-1].timeline

    @property
    def begin(self) -> int:
        """Where its own part begins."""
        return self.ranges[-1].begin

    def select(self, segments: Iterable[Segment], segment_bytes: int) -> list[Segment]:
        """Return the segments that belong to it, in order: one of each number."""
        found: dict[int, Segment] = {}
        ranges = {one.timeline: one for one in self.ranges}
        for segment in segments:
            part = ranges.get(segment.timeline)
            # the segment in which a timeline begins has what was before that as well
            if part is None or segment.number < part.begin // segment_bytes:
                continue
            if part.end is not None and segment.number >= part.end // segment_bytes:
                continue
            found[segment.number] = segment
        return [found[number] for number in sorted(found)]

    def own(self, segments: Iterable[Segment], segment_bytes: int) -> list[Segment]:
        """Return the segments of its own part, in order."""
        first = self.begin // segment_bytes
        return sorted(one for one in segments if one.timeline == self.number and one.number >= first)

    def has(self, ranges: Iterable[WalRange]) -> bool:
        """Whether these parts of timelines belong to it: those that a base backup needs, for example."""
        own = {one.timeline: one for one in self.ranges}
        return all(
            (part := own.get(one.timeline)) is not None
            and part.begin <= one.begin
            and (part.end is None or (one.end is not None and one.end <= part.end))
            for one in ranges
        )


def branches(timelines: Iterable[int], histories: Mapping[int, Path]) -> list[Branch]:
    """Return these timelines in their order, each with those that it comes from.

    Args:
        timelines: Their numbers.
        histories: The files that say where they begin.
    """
    return [_branch(number, histories.get(number)) for number in sorted({*timelines, *histories})]


def _branch(number: int, history: Path | None) -> Branch:
    left = _read(history) if history is not None and number > 1 else []
    begin, ranges = 0, list[WalRange]()
    for timeline, end in left:
        ranges.append(WalRange(timeline, begin, end))
        begin = end
    return Branch((*ranges, WalRange(number, begin, None)), has_history=bool(left))


def _read(history: Path) -> Sequence[tuple[int, int]]:
    """Return the timelines of a history, and where each was left."""
    found = _LINE.findall(history.read_text("utf-8", "replace"))
    return [(int(timeline), place_of(lsn)) for timeline, lsn in found]


__all__ = ["Branch", "WalRange", "branches"]
