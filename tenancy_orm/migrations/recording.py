"""What the build of a template reads: the paths that Python opens and lists, recorded by an audit hook."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from .logs import logger


class Recording:
    """What a build has used so far.

    Attributes:
        began (int): When it began, in nanoseconds since the epoch.
        paths (set[Path]): The files that it opened for reading, and the directories that it listed.
    """

    def __init__(self) -> None:
        self.began = time.time_ns()
        self.paths: set[Path] = set()
        self._modules = set(sys.modules)

    @property
    def new_modules(self) -> list[str]:
        """The modules that were imported since the recording began."""
        return [name for name in list(sys.modules) if name not in self._modules]

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        """Take an audit event of Python: ``open`` with a path, mode and flags, or the listing of a directory."""
        path = arguments[0] if arguments else None
        if not isinstance(path, (str, os.PathLike)):  # a descriptor, or bytes
            return
        if event != "open" or not _writes(arguments):
            self.paths.add(normal(path))


def normal(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without ``..``. Symbolic links stay: where they lead is the machine's own affair."""
    return Path(os.path.normpath(Path(path).absolute()))


def _writes(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = (*arguments, None, None)[:3]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


_recording: ContextVar[Recording | None] = ContextVar("tenancy_orm.migrations.recording", default=None)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record what the body uses, in this task and in those, and threads, that inherit its context."""
    _listen()
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


@functools.cache
def _listen() -> None:
    """Add the hook, once. It cannot be removed: so a process has it only after it has built a template."""
    sys.addaudithook(_record)


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    recording = _recording.get()
    if recording is not None:
        if event != "open" and sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
            return  # Python's import lists directories too, and keeps what it found
        try:
            recording.note(event, arguments)
        except (OSError, ValueError, TypeError) as exc:
            # an error here would be that of the code which opens the file
            logger.debug("not recorded: %s", exc)
