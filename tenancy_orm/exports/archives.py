"""Archives: where the files of an export go, one after the other, and none of them whole in memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..cancellation import run_to_completion
from ..errors import ExportError

Write = Callable[[bytes], Awaitable[None]]

_CHUNK = 262_144  # bytes that are compressed or written at once, in a thread
_LEVEL = 6
_MODE = 0o600  # a customer's data is for nobody else on this machine
_LARGEST_PLAIN = 1 << 30  # bytes up to which a file needs no ZIP64 header, which some readers do not know


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: its size in bytes, its SHA-256, and what its archive needs to go on after it."""

    size: int
    sha256: str
    at: Mapping[str, Any]


class Archive(Protocol):
    """Takes files, one after the other. What it does itself blocks, so that it is called in threads."""

    def begin(self, path: str, size: int | None) -> None:
        """Begin a file; ``size`` where it is known."""

    def write(self, data: bytes) -> bytes:
        """Add to the file; return what is to be sent on, where the archive is a stream."""

    def end(self) -> tuple[Mapping[str, Any], bytes]:
        """End the file; return what is needed to go on after it, and what is to be sent on."""

    def clear(self, path: str) -> None:
        """Remove the files of a folder, which a run that was interrupted has left."""

    def sync(self) -> None:
        """Have the disk keep what was written."""

    def finish(self) -> bytes:
        """Complete the archive; return what is to be sent on."""

    def abandon(self) -> None:
        """Close without completing."""


class FileWriter:
    """Writes one file of an archive, from any number of pieces.

    Args:
        archive: The archive.
        send: Sends on what the archive returns; None where that is nothing.
    """

    def __init__(self, archive: Archive, send: Write | None) -> None:
        self._archive = archive
        self._send = send
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._digest = hashlib.sha256()
        self._size = 0

    async def begin(self, path: str, *, size: int | None = None) -> None:
        """Begin it."""
        await _blocking(self._archive.begin, path, size)

    async def write(self, data: bytes) -> None:
        """Add to it."""
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting >= _CHUNK:
            await self._flush()

    async def end(self) -> Written:
        """End it."""
        await self._flush()
        at, data = await _blocking(self._archive.end)
        await self._pass_on(data)
        return Written(self._size, self._digest.hexdigest(), at)

    async def _flush(self) -> None:
        if not self._waiting:
            return
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._waiting = 0
        await self._pass_on(await _blocking(self._consume, data))

    def _consume(self, data: bytes) -> bytes:
        self._digest.update(data)
        self._size += len(data)
        return self._archive.write(data)

    async def _pass_on(self, data: bytes) -> None:
        if data and self._send is not None:
            await self._send(data)


async def _blocking(function: Callable[..., Any], *arguments: Any) -> Any:
    # a thread that goes on after a cancellation would write into what is being closed
    return await run_to_completion(asyncio.to_thread(function, *arguments))


class DirectoryArchive:
    """A directory of plain files.

    Args:
        directory: It exists.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._target = directory
        self._changed: set[Path] = set()  # directories with names that the disk may not have

    def begin(self, path: str, size: int | None) -> None:
        """Begin a file, beside its name until it is whole."""
        self._target = self._directory / path
        self._target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = _open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(self, data: bytes) -> bytes:
        """Add to it."""
        assert self._file is not None  # noqa: S101 - for the type checker
        self._file.write(data)
        return b""

    def end(self) -> tuple[Mapping[str, Any], bytes]:
        """End it."""
        assert self._file is not None  # noqa: S101 - for the type checker
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self._target)
        # with those above it, which may be new
        above = self._target.relative_to(self._directory).parents
        self._changed.update(self._directory / one for one in above)
        return {}, b""

    def clear(self, path: str) -> None:
        """Remove the files of a folder."""
        shutil.rmtree(self._directory / path, ignore_errors=True)

    def sync(self) -> None:
        """Have the disk keep the names: each file was synchronised by itself."""
        while self._changed:
            _sync_directory(self._changed.pop())

    def finish(self) -> bytes:
        """Have the disk keep the names of the last files as well."""
        self.sync()
        return b""

    def abandon(self) -> None:
        """Close the file that is being written, and remove it."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with suppress(OSError):
                self._partial.unlink()

    @property
    def _partial(self) -> Path:
        return self._target.with_name(self._target.name + ".partial")


class _Outlet:
    """A file object that keeps what is written until it is taken; it cannot seek, as a socket."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class ZipArchive:
    """A ZIP archive, in a file or as a stream. Large files and many files are ZIP64.

    Args:
        file: A file, positioned where the archive goes on; None for a stream.
        entries: What ``end`` returned of the files before that position.
        moment: The time of its files.
    """

    def __init__(
        self, file: BinaryIO | None = None, entries: tuple[Mapping[str, Any], ...] = (), *, moment: datetime
    ) -> None:
        self._file = file
        self._outlet = _Outlet()
        self._date = moment.astimezone(UTC).timetuple()[:6]
        target: Any = self._outlet if file is None else file
        self._zip = zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, allowZip64=True, compresslevel=_LEVEL)
        for entry in entries:
            info = _info(entry["name"], tuple(entry["date"]))
            info.header_offset, info.CRC = entry["offset"], entry["crc"]
            info.compress_size, info.file_size = entry["compressed"], entry["size"]
            info.flag_bits = entry["flags"]
            self._zip.filelist.append(info)
            self._zip.NameToInfo[info.filename] = info
        self._entry: Any = None
        self._info: zipfile.ZipInfo | None = None

    def begin(self, path: str, size: int | None) -> None:
        """Begin a file."""
        self._info = _info(path, self._date)
        if size is not None:
            self._info.file_size = size
        self._entry = self._zip.open(self._info, "w", force_zip64=size is None or size > _LARGEST_PLAIN)

    def write(self, data: bytes) -> bytes:
        """Add to it."""
        self._entry.write(data)
        return self._outlet.take()

    def end(self) -> tuple[Mapping[str, Any], bytes]:
        """End it."""
        entry, self._entry = self._entry, None
        entry.close()
        info = self._info
        assert info is not None  # noqa: S101 - for the type checker
        at = {
            "name": info.filename,
            "date": list(info.date_time),
            "offset": info.header_offset,
            "crc": info.CRC,
            "compressed": info.compress_size,
            "size": info.file_size,
            "flags": info.flag_bits,
            "end": self._zip.start_dir,
        }
        return at, self._outlet.take()

    def clear(self, path: str) -> None:
        """Do nothing: the file was cut off after what is complete."""

    def sync(self) -> None:
        """Have the disk keep what was written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> bytes:
        """Write the directory at the end; without it nothing opens the archive."""
        self._zip.close()
        if self._file is not None:
            self.sync()
            self._file.close()
        return self._outlet.take()

    def abandon(self) -> None:
        """Close without writing the directory."""
        if self._file is not None:
            self._file.close()
        # closing would write one
        self._zip._didModify = False  # type: ignore[attr-defined]
        self._zip._writing = False  # type: ignore[attr-defined]
        with suppress(ValueError, OSError):
            self._zip.close()


def _info(name: str, date: tuple[int, ...]) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date)  # type: ignore[arg-type]
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = _MODE << 16
    return info


def _open(path: Path, flags: int) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, flags, _MODE), "r+b" if flags & os.O_RDWR else "wb")
    except OSError as exc:
        raise ExportError(f"{str(path)!r} cannot be written: {exc.strerror}") from exc


def open_file(path: Path, *, at: int | None = None) -> BinaryIO:
    """Open a new file, or one to go on with at a position; what is after it is cut off.

    Raises:
        ExportError: it cannot be written; or there is one already, where none is to go on with.
    """
    if at is None:
        return _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    file = _open(path, os.O_RDWR | os.O_CREAT)
    file.truncate(at)
    file.seek(at)
    return file


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(partial: Path, target: Path) -> None:
    """Give a complete file its name; where there is one of that name by now, refuse.

    Raises:
        ExportError: there is.
    """
    try:
        os.link(partial, target)
    except FileExistsError as exc:
        raise ExportError(
            f"{str(target)!r} was created while the export ran; the archive was saved as {str(partial)!r}"
        ) from exc
    except OSError as exc:  # a file system without links
        if target.exists():
            raise ExportError(
                f"{str(target)!r} was created while the export ran; the archive was saved as {str(partial)!r}"
            ) from exc
        partial.replace(target)
    else:
        partial.unlink()
    _sync_directory(target.parent)


__all__ = ["Archive", "DirectoryArchive", "FileWriter", "Write", "Written", "ZipArchive", "complete", "open_file"]
