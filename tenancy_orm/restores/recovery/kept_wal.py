"""``KeptWal``: the files of WAL that a directory has of one cluster, and the timelines that they are of.

One directory may have the WAL of two clusters, one after the other: a server that was lost, and that its databases were
brought back to by dumps, is another cluster under the same name. Its WAL begins again with low numbers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .timelines import Branch, WalRange, branches
from .wal_files import Segment, list_histories, list_segments, place_of, scan_segments, segment_number, system_of

_MANIFEST_END_BYTES = 65_536
_RANGES = re.compile(r'"WAL-Ranges":\s*\[(.*?)\]', re.DOTALL)
_RANGE = re.compile(r'"Timeline":\s*(\d+),\s*"Start-LSN":\s*"([0-9A-F/]+)",\s*"End-LSN":\s*"([0-9A-F/]+)"')


@dataclass(frozen=True, slots=True)
class KeptWal:
    """The WAL of one cluster.

    Attributes:
        segments: The files, in order; a number has several where several timelines have it.
        histories: The files that say where timelines begin, by the timeline.
        branches: The timelines, in their order.
    """

    segments: Sequence[Segment]
    histories: Mapping[int, Path]
    branches: Sequence[Branch]


def read_wal(directories: Sequence[Path], segment_bytes: int, *, system: int | None) -> KeptWal:
    """Return the WAL of a cluster in these directories.

    Args:
        directories: The directories, the oldest first.
        segment_bytes: The size of a segment.
        system: The cluster's system identifier; None where it is not known: all that there is.
    """
    segments = list_segments(directories, segment_bytes, system=system)
    own = {segment.path.parent for segment in segments}
    histories = list_histories(path for path in directories if path in own)
    return KeptWal(segments, histories, branches({segment.timeline for segment in segments}, histories))


def system_identifier(data: Path) -> int | None:
    """Return the system identifier of a base backup's files; None where they are not there."""
    try:
        with (data / "global" / "pg_control").open("rb") as file:
            return int(struct.unpack("=Q", file.read(8))[0])
    except (FileNotFoundError, struct.error):
        return None


def needed_ranges(data: Path) -> list[WalRange]:
    """Return the WAL that a base backup needs to be consistent, as its manifest says at its end; none without one."""
    try:
        with (data / "backup_manifest").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _MANIFEST_END_BYTES))
            end = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    listed = _RANGES.findall(end)
    return [
        WalRange(int(timeline), place_of(begin), place_of(last))
        for timeline, begin, last in _RANGE.findall(listed[-1] if listed else "")
    ]


def directory_system(directory: Path) -> int | None:
    """Return the system identifier of the cluster that the WAL in a directory is of; None where there is none."""
    found = (system_of(segment) for segment in scan_segments([directory], 1))
    return next((system for system in found if system is not None), None)


def prune_wal(directories: Iterable[Path], needed: Mapping[int, tuple[int, int]]) -> None:
    """Delete the segments that no base backup needs.

    What a cluster has written that has no base backup yet is kept, unless it is older than what has one.

    Args:
        directories: The directories, the oldest first.
        needed: By the cluster's system identifier, the number of the first segment that is needed, and their size.
    """
    begun = False
    for directory in directories:
        found = [(segment, system_of(segment)) for segment in scan_segments([directory], 1)]
        begun = begun or any(system in needed for _, system in found)
        for segment, system in found:
            if system is not None and system in needed:
                first, segment_bytes = needed[system]
                if segment_number(segment.name, segment_bytes) < first:
                    segment.path.unlink(missing_ok=True)
            elif system is not None and not begun:
                segment.path.unlink(missing_ok=True)


__all__ = ["KeptWal", "directory_system", "needed_ranges", "prune_wal", "read_wal", "system_identifier"]
