"""Files of WAL in directories: which there are, what is missing between them, and the times that they have.

``pg_receivewal`` writes them. Each directory is one unbroken stretch: after a gap the receiver begins another one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import struct
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...cancellation import run_to_completion
from ...errors import RecoveryError
from ...postgres.programs import Programs

_NAME = re.compile(r"[0-9A-F]{24}")
_HISTORY = re.compile(r"[0-9A-F]{8}\.history")
_PARTIAL = ".partial"
# magic, flags, timeline, address, rest of a record, system identifier, sizes of a segment and of a page
_LONG_HEADER = struct.Struct("=HHIQI4xQII")
_LONG_FLAG = 0x0002
_TABLESPACE = re.compile(
    rb"^rmgr: Tablespace .*? lsn: ([0-9A-F]+/[0-9A-F]+), .*? desc: CREATE \d+ \"(.+)", re.MULTILINE
)
_LSN = re.compile(rb" lsn: ([0-9A-F]+/[0-9A-F]+), ")
_TIME = re.compile(rb"(?:COMMIT|ABORT)(?:_PREPARED)? .*?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC")


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One file of WAL.

    Attributes:
        number: Its place among all segments, on whichever timeline.
        timeline: Its timeline.
        path: The file. One that is still written ends in ``.partial``.
    """

    number: int
    timeline: int
    path: Path

    @property
    def name(self) -> str:
        """The name that PostgreSQL asks for it by."""
        return self.path.name.removesuffix(_PARTIAL)

    @property
    def is_partial(self) -> bool:
        """Whether it is still written."""
        return self.path.name.endswith(_PARTIAL)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What the first page of a segment says."""

    system: int
    segment_bytes: int


def read_header(path: Path) -> SegmentHeader | None:
    """Read the cluster and the size of segments; None where the file has no such page yet."""
    with path.open("rb") as file:
        page = file.read(_LONG_HEADER.size)
    if len(page) < _LONG_HEADER.size:
        return None
    _, flags, _, _, _, system, segment_bytes, _ = _LONG_HEADER.unpack(page)
    return SegmentHeader(system, segment_bytes) if flags & _LONG_FLAG and segment_bytes else None


def segment_number(name: str, segment_bytes: int) -> int:
    """Return the place of a segment among all, from its name: timeline, high and low part, eight digits each."""
    return int(name[8:16], 16) * (2**32 // segment_bytes) + int(name[16:24], 16)


def scan_segments(directories: Iterable[Path], segment_bytes: int) -> Iterator[Segment]:
    """Yield the files of segments in directories, one directory after the other."""
    for directory in directories:
        for path in directory.iterdir() if directory.is_dir() else ():
            name = path.name.removesuffix(_PARTIAL)
            if _NAME.fullmatch(name):
                yield Segment(segment_number(name, segment_bytes), int(name[:8], 16), path)


def list_segments(directories: Iterable[Path], segment_bytes: int, *, system: int | None = None) -> list[Segment]:
    """Return the segments in order; of one that is there whole and partial, the whole one.

    Args:
        directories: Where they are.
        segment_bytes: The size of each.
        system: Those of this cluster alone, by its system identifier. Another one may have files of the same names.
    """
    found: dict[str, Segment] = {}
    for segment in scan_segments(directories, segment_bytes):
        if system is not None and system_of(segment) != system:
            continue
        known = found.get(segment.name)
        # of two partial ones, the receiver that came later has more
        if known is None or known.is_partial or not segment.is_partial:
            found[segment.name] = segment
    return sorted(found.values())


def system_of(segment: Segment) -> int | None:
    """Return the system identifier of the cluster that has written a segment; None where nothing is in it yet."""
    # it may be whole by now, and named so
    for path in (segment.path, segment.path.with_name(segment.name)):
        with suppress(FileNotFoundError):
            header = read_header(path)
            return None if header is None else header.system
    return None


def copy_partial(segment: Segment, to: Path) -> None:
    """Copy a segment that was still written when it was listed; it may be whole by now, and named so."""
    try:
        shutil.copyfile(segment.path, to)
    except FileNotFoundError:
        shutil.copyfile(segment.path.with_name(segment.name), to)


def list_histories(directories: Iterable[Path]) -> dict[int, Path]:
    """Return the files that say where timelines begin, by the timeline."""
    return {
        int(entry.name[:8], 16): Path(entry.path)
        for directory in directories
        if directory.is_dir()
        for entry in os.scandir(directory)
        if _HISTORY.fullmatch(entry.name)
    }


def stretches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Divide segments where one is missing; a number that two timelines have is there."""
    found: list[list[Segment]] = []
    for segment in segments:
        if found and segment.number - found[-1][-1].number <= 1:
            found[-1].append(segment)
        else:
            found.append([segment])
    return found


@asynccontextmanager
async def _readable(segment: Segment) -> AsyncIterator[Path]:
    """Yield a path by which ``pg_waldump`` can read a segment: its own name alone."""
    if not segment.is_partial:
        yield segment.path
        return
    with tempfile.TemporaryDirectory(prefix="tenancy-wal-") as directory:
        path = Path(directory) / segment.name
        await asyncio.to_thread(copy_partial, segment, path)
        yield path


async def times_in(programs: Programs, segment: Segment) -> tuple[datetime, datetime] | None:
    """Return the times of the first and the last transaction that ended in a segment; None where none did."""
    first = last = None
    async with _readable(segment) as path:
        async for line in _records(programs, "--rmgr=Transaction", str(path)):
            if match := _TIME.search(line):
                last = match[1]
                first = first or last
    return None if first is None or last is None else (_time(first), _time(last))


async def find_new_tablespace(programs: Programs, directory: Path, target: datetime) -> str | None:
    """Return the location of a tablespace that a recovery of these files at a time would make; None without any."""
    timelines: dict[str, list[str]] = {}
    for name in sorted(entry.name for entry in os.scandir(directory) if _NAME.fullmatch(entry.name)):
        timelines.setdefault(name[:8], []).append(name)
    for names in timelines.values():
        # together, since a record may begin in one file and end in the next
        files = (f"--path={directory}", names[0], names[-1])
        tablespaces = _records(programs, "--rmgr=Tablespace", *files)
        made = [match async for line in tablespaces if (match := _TABLESPACE.search(line))]
        if made and not await _ends_before(programs, files, place_of(made[0][1].decode()), target):
            return str(made[0][2].decode(errors="replace")).strip().removesuffix('"')
    return None


async def _ends_before(programs: Programs, files: Sequence[str], place: int, target: datetime) -> bool:
    """Whether a recovery at a time ends before a place in the WAL: at the first transaction that ended later."""
    async with aclosing(_records(programs, "--rmgr=Transaction", *files)) as lines:
        async for line in lines:
            if (lsn := _LSN.search(line)) and place_of(lsn[1].decode()) > place:
                return False
            if (match := _TIME.search(line)) and _time(match[1]) > target:
                return True
    return False


def place_of(lsn: str) -> int:
    """Return a place in the WAL, ``16/B374D848`` for example, as a number of bytes."""
    high, _, low = lsn.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


async def _records(programs: Programs, *arguments: str) -> AsyncGenerator[bytes]:
    """Yield the lines that ``pg_waldump`` prints."""
    process = await asyncio.create_subprocess_exec(
        programs.path("pg_waldump"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"TZ": "UTC", "LC_ALL": "C"},
    )
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        async for line in process.stdout:
            yield line
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    finally:
        # where the last file is not full, it ends with an error
        await run_to_completion(process.wait())
    if process.returncode is not None and process.returncode < 0:
        raise RecoveryError(f"the WAL cannot be read: pg_waldump was ended by signal {-process.returncode}")


def _time(text: bytes) -> datetime:
    return datetime.fromisoformat(text.decode()).replace(tzinfo=UTC)


async def first_time(programs: Programs, segments: Sequence[Segment], begin: int) -> datetime | None:
    """Return the time of the first transaction that ended in these segments at a place or later; None without one."""
    for segment in segments:
        async with _readable(segment) as path, aclosing(_records(programs, "--rmgr=Transaction", str(path))) as lines:
            async for line in lines:
                if (lsn := _LSN.search(line)) and place_of(lsn[1].decode()) >= begin and (match := _TIME.search(line)):
                    return _time(match[1])
    return None


async def last_time(programs: Programs, segments: Sequence[Segment]) -> datetime | None:
    """Return the time of the last transaction that ended in these segments; None where none did."""
    for segment in reversed(segments):
        if (found := await times_in(programs, segment)) is not None:
            return found[1]
    return None


__all__ = [
    "Segment",
    "SegmentHeader",
    "copy_partial",
    "find_new_tablespace",
    "first_time",
    "last_time",
    "list_histories",
    "list_segments",
    "place_of",
    "read_header",
    "scan_segments",
    "segment_number",
    "stretches",
    "system_of",
    "times_in",
]
