"""Temporary directories of a bounded size, and what a killed process has left of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import BackupError

_PREFIX = "tenancy-backup-"
_KEPT_FREE_BYTES = 64 * 1024**2  # of the file system, for everybody else


class Spool:
    """Makes temporary directories, which only this process's user can read.

    Args:
        directory: Where; the system's temporary directory where None.
        max_bytes: How large each may become.
    """

    def __init__(self, directory: str | Path | None, max_bytes: int) -> None:
        self._root = Path(directory or tempfile.gettempdir())
        self.max_bytes = max_bytes

    @contextmanager
    def open(self, needed_bytes: int = 0) -> Iterator[Path]:
        """Make a directory for the body.

        While it is in use the process holds a lock on it, which the kernel releases if the process dies. What was left
        so is removed first.

        Args:
            needed_bytes: What it is known to need.

        Raises:
            BackupError: there is not enough room.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self.sweep()
            self.check(needed_bytes)
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._root))
            held = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise BackupError(f"no temporary directory can be made in {self._root}: {exc.strerror}") from exc
        try:
            # another process may look at it in this moment
            fcntl.flock(held, fcntl.LOCK_EX)
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            os.close(held)

    def check(self, needed_bytes: int) -> None:
        """Refuse what does not fit.

        Raises:
            BackupError: it is more than one may use, or more than is free.
        """
        if needed_bytes > self.max_bytes:
            raise BackupError(
                f"{needed_bytes:,} bytes of temporary space are needed, and backup.max_temporary_bytes is "
                f"{self.max_bytes:,}; raise it"
            )
        free = shutil.disk_usage(self._root).free
        if needed_bytes + _KEPT_FREE_BYTES > free:
            raise BackupError(
                f"{needed_bytes:,} bytes of temporary space are needed, and {free:,} are free in {self._root}; make "
                "room, or name another directory in backup.directory"
            )

    def sweep(self) -> None:
        """Remove the directories of this user that no process holds: they may have tenants' rows."""
        for left in self._root.glob(f"{_PREFIX}*"):
            with suppress(OSError):
                if left.is_symlink() or left.stat().st_uid != os.getuid():
                    continue
                held = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where it is in use
                    # made in this moment, and not yet locked: those are empty
                    if any(left.iterdir()):
                        shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(held)


def used_bytes(directory: Path) -> int:
    """Return how much the files of a directory take."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


__all__ = ["Spool", "used_bytes"]
