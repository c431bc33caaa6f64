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
        so is removed first. Its name says how much it needs, so that others on this machine do not count on that.

        Args:
            needed_bytes: What it is known to need.

        Raises:
            BackupError: there is not enough room.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self.sweep()
            self.check(needed_bytes)
            made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{needed_bytes}-", dir=self._root))
            held = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise BackupError(f"no temporary directory can be made in {self._root}: {exc.strerror}") from exc
        try:
            # another process may look at it in this moment
            fcntl.flock(held, fcntl.LOCK_EX)
            # again: of two that begin at once, one at least sees the other
            self.check(needed_bytes, but=made)
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            os.close(held)

    def check(self, needed_bytes: int, *, but: Path | None = None) -> None:
        """Refuse what does not fit beside what others that run now have not used yet.

        Args:
            needed_bytes: What is needed.
            but: The directory that it is needed for, where there is one already.

        Raises:
            BackupError: it is more than one may use, or more than is free.
        """
        if needed_bytes > self.max_bytes:
            raise BackupError(
                f"{needed_bytes:,} bytes of temporary space are needed, and backup.max_temporary_bytes is "
                f"{self.max_bytes:,}; raise it"
            )
        free, promised = shutil.disk_usage(self._root).free, self._promised(but)
        if needed_bytes + promised + _KEPT_FREE_BYTES > free:
            others = f", of which others that run now need {promised:,}" if promised else ""
            raise BackupError(
                f"{needed_bytes:,} bytes of temporary space are needed, and {free:,} are free in {self._root}{others}; "
                "make room, or name another directory in backup.directory"
            )

    def _promised(self, but: Path | None) -> int:
        """Return how much the others still need, as far as it is known."""
        total = 0
        for made in self._root.glob(f"{_PREFIX}*"):
            needed = made.name.removeprefix(_PREFIX).partition("-")[0]
            if made != but and needed.isdecimal() and _is_held(made):
                # a dump has a directory of its own in it
                total += max(0, int(needed) - used_bytes(made) - used_bytes(made / "dump"))
        return total

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
    return sum(_sizes(directory))


def largest_bytes(directory: Path) -> int:
    """Return how much the largest file of a directory takes."""
    return max(_sizes(directory), default=0)


def _is_held(directory: Path) -> bool:
    """Whether a process of this user uses a directory."""
    with suppress(OSError):
        opened = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(opened)
    return False


def _sizes(directory: Path) -> Iterator[int]:
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        for entry in found:
            with suppress(FileNotFoundError):
                if not entry.is_dir(follow_symlinks=False):
                    yield entry.stat(follow_symlinks=False).st_size


__all__ = ["Spool", "largest_bytes", "used_bytes"]
