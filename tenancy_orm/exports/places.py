"""Where an operator's export is written: a ZIP file or a directory, and how one that was interrupted goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, ExportError
from .archives import Archive, DirectoryArchive, ZipArchive, complete, open_file
from .journal import Journal

_OTHER_ARCHIVES = (".gz", ".tgz", ".tar", ".xz", ".zst", ".bz2", ".7z", ".rar")


class Place:
    """A ZIP file where the name ends in ``.zip``, else a directory.

    Args:
        path: Its name.
        resume: Whether to go on with an export to that place that was interrupted.

    Raises:
        ConfigurationError: it has the name of another kind of archive.
        ExportError: there is something of that name already, or nothing to resume.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        if path.suffix.lower() in _OTHER_ARCHIVES:
            raise ConfigurationError(
                f"{str(path)!r} is neither a .zip file nor a directory; write the export to one of these"
            )
        self.path = path
        self._resume = resume
        self.is_zip = path.suffix.lower() == ".zip"
        self._partial = path.with_name(f"{path.name}.partial")
        self._progress = path.with_name(f"{path.name}.progress") if self.is_zip else path / ".progress"
        self._archive: Archive | None = None
        self._journal: Journal | None = None
        self._check()

    def _check(self) -> None:
        if not self.path.parent.is_dir():
            raise ExportError(f"the directory {str(self.path.parent)!r} does not exist")
        if self._resume:
            if not self._progress.is_file():
                raise ExportError(f"there is nothing to resume: {str(self._progress)!r} does not exist")
            if self.is_zip and self.path.exists():
                # killed as it was given its name: what is written on may be the same file
                raise ExportError(
                    f"{str(self.path)!r} exists: if the export was interrupted at its very end, it is complete; remove "
                    f"{str(self._progress)!r} and {str(self._partial)!r}, or the files that they describe"
                )
            return
        if self._progress.exists():
            raise ExportError(
                f"an export to {str(self.path)!r} was interrupted, or is under way; continue with --resume, or "
                f"remove {str(self._progress)!r} and what it wrote"
            )
        if self.is_zip and os.path.lexists(self._partial):
            raise ExportError(f"{str(self._partial)!r} exists, and nothing is overwritten: remove it")
        if self.path.exists() and (self.is_zip or not self.path.is_dir() or any(self.path.iterdir())):
            raise ExportError(f"{str(self.path)!r} exists; nothing is overwritten: give another name, or remove it")

    def open(self, header: Mapping[str, Any], moment: datetime) -> tuple[Archive, Journal]:
        """Open the archive and its journal.

        Args:
            header: What the export is of.
            moment: The time of the files of a ZIP archive.

        Raises:
            ExportError: it cannot be written; or what was written cannot be resumed.
        """
        header = {**header, "archive": "zip" if self.is_zip else "directory"}
        if not self.is_zip:
            try:
                self.path.mkdir(mode=0o700, exist_ok=True)
            except OSError as exc:
                raise ExportError(f"{str(self.path)!r} cannot be made: {exc.strerror}") from exc
        opened = Journal.resume if self._resume else Journal.create
        self._journal = journal = opened(self._progress, header)
        self._archive = archive = self._open_archive(journal, moment)
        return archive, journal

    def _open_archive(self, journal: Journal, moment: datetime) -> Archive:
        if not self.is_zip:
            for entry in journal.files():
                found = self.path / entry["path"]
                if not found.is_file() or found.stat().st_size != entry["bytes"]:
                    raise self._changed(found)
            return DirectoryArchive(self.path)
        entries = tuple(entry["at"] for entry in journal.files())
        end = entries[-1]["end"] if entries else 0
        if end and (not self._partial.is_file() or self._partial.stat().st_size < end):
            raise self._changed(self._partial)
        return ZipArchive(open_file(self._partial, at=end if self._resume else None), entries, moment=moment)

    @staticmethod
    def _changed(path: Path) -> ExportError:
        return ExportError(f"{str(path)!r} changed after the export was interrupted; delete all of it, and start again")

    def complete(self) -> None:
        """Give the complete archive its name, and remove the journal.

        Raises:
            ExportError: something has that name by now.
        """
        if self.is_zip:
            complete(self._partial, self.path)
        self._progress.unlink(missing_ok=True)

    def close(self) -> None:
        """Close what is open. What was written stays, so that it can be resumed."""
        if self._archive is not None:
            self._archive.abandon()
        if self._journal is not None:
            self._journal.close()


__all__ = ["Place"]
