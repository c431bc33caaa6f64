"""``Journal``: what an export has written so far, so that a manifest can list it, and another process can go on.

It is a file of JSON lines. A part, such as a table with its large values, counts once its line says that it is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from ..errors import ExportError

_VERSION = 1


class Journal:
    """Reads and writes the journal of one export.

    Args:
        file: Where it is.
        header: What the export is of.
        snapshots: The snapshots that its parts are of.
        parts: The parts that are done.
    """

    def __init__(
        self, file: BinaryIO, header: Mapping[str, Any], snapshots: tuple[Mapping[str, Any], ...], parts: frozenset[str]
    ) -> None:
        self._file = file
        self.header = header
        self._snapshots = list(snapshots)
        self.parts = set(parts)

    @property
    def snapshots(self) -> tuple[Mapping[str, Any], ...]:
        """The snapshots that its parts are of, in order; a second one where the export was resumed."""
        return tuple(self._snapshots)

    @classmethod
    def temporary(cls, header: Mapping[str, Any]) -> Self:
        """Make one that ends with this process."""
        return cls._new(cast("BinaryIO", tempfile.TemporaryFile()), header)

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Make one in a file.

        Raises:
            ExportError: there is one, or it cannot be written.
        """
        return cls._new(_open(path, os.O_CREAT | os.O_EXCL), header)

    @classmethod
    def _new(cls, file: BinaryIO, header: Mapping[str, Any]) -> Self:
        journal = cls(file, header, (), frozenset())
        journal._write({"line": "header", "version": _VERSION, **header})
        return journal

    @classmethod
    def resume(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Go on with one; what is after its last part that is done is cut off.

        Raises:
            ExportError: it is of another export, or another process uses it.
        """
        file = _open(path, 0)
        try:
            journal = cls._read(file, path)
            for name, value in header.items():
                if journal.header.get(name) != value:
                    raise ExportError(
                        f"{str(path)!r} belongs to an export with another {name.replace('_', ' ')}, so it cannot be "
                        "resumed; delete it and what was written, and export again"
                    )
        except BaseException:
            file.close()
            raise
        return journal

    @classmethod
    def _read(cls, file: BinaryIO, path: Path) -> Self:
        header: Mapping[str, Any] | None = None
        # by number: those of parts that are not done are forgotten
        snapshots: dict[int, Mapping[str, Any]] = {}
        parts: set[str] = set()
        end = 0
        while (line := file.readline()).endswith(b"\n"):
            try:
                found = json.loads(line)
                kind = found.pop("line")
            except (ValueError, KeyError, AttributeError):
                break
            if kind == "header" and found.pop("version", None) == _VERSION:
                header, end = found, file.tell()
            elif kind == "snapshot":
                snapshots[found["number"]] = found
            elif kind == "part":
                parts.add(found["name"])
                end = file.tell()
        if header is None:
            raise ExportError(f"{str(path)!r} is not the record of an export that was interrupted")
        file.seek(end)
        file.truncate()
        journal = cls(file, header, (), frozenset(parts))
        used = {entry["snapshot"] for entry in journal.files()}
        journal._snapshots = [snapshots[number] for number in sorted(used)]
        return journal

    def add_snapshot(self, **values: Any) -> int:
        """Record the snapshot that what follows is of; return its number."""
        number = max((int(one["number"]) for one in self._snapshots), default=0) + 1
        self._snapshots.append({"number": number, **values})
        self._write({"line": "snapshot", "number": number, **values})
        return number

    def add_file(self, entry: Mapping[str, Any]) -> None:
        """Record a file."""
        self._write({"line": "file", **entry})

    def end_part(self, name: str) -> None:
        """Record that a part is done: its files are on the disk."""
        self.parts.add(name)
        self._write({"line": "part", "name": name})
        self._file.flush()
        os.fsync(self._file.fileno())

    def files(self) -> Iterator[dict[str, Any]]:
        """Yield the files, in the order in which they were written."""
        self._file.flush()
        position = self._file.tell()
        try:
            self._file.seek(0)
            # not by iteration, which forbids ``tell``
            while line := self._file.readline():
                found = json.loads(line)
                if found.pop("line") == "file":
                    yield found
        finally:
            self._file.seek(position)

    def close(self) -> None:
        """Close it; the file stays."""
        with suppress(OSError):
            self._file.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")


def _open(path: Path, flags: int) -> BinaryIO:
    """Open the file of a journal, for this process alone.

    Raises:
        ExportError: there is one, there is none, or another process uses it.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | flags, 0o600), "r+b")
    except FileExistsError as exc:
        raise ExportError(
            f"an export to that place was interrupted; continue with --resume, or remove "
            f"{str(path)!r} and what it wrote"
        ) from exc
    except FileNotFoundError as exc:
        raise ExportError(f"there is nothing to resume: {str(path)!r} does not exist") from exc
    except OSError as exc:
        raise ExportError(f"{str(path)!r} cannot be written: {exc.strerror}") from exc
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.close()
        raise ExportError(f"another process writes this export now: it uses {str(path)!r}") from exc
    return file


__all__ = ["Journal"]
