"""Which directory is the project: where settings files are looked for, and what relative paths are relative to."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

SETTINGS_FILES = ("pyproject.toml", "tenancy.toml")
"""The later one wins."""
TABLES = ("tenancy", "tenancy_orm", "tenancy-orm")
"""Names of the table in ``[tool]``; an error says that only the first is right."""

# also a line that has no =, which reading the file refuses
_VARIABLE = re.compile(r"^\s*(export\s+)?['\"]?TENANCY_", re.IGNORECASE | re.MULTILINE)
_EVERYONE_MAY_WRITE = 0o002

_start: ContextVar[tuple[Path, bool] | None] = ContextVar("tenancy_orm.config.project.start", default=None)


@contextmanager
def looking_from(directory: Path, *, above: bool = True) -> Iterator[None]:
    """Look for settings from ``directory`` upward in the body, and not from the working directory.

    Args:
        directory: Where the search begins.
        above: Whether it goes on above; ``tenancy init`` makes a project in the directory itself.
    """
    token = _start.set((directory.absolute(), above))
    try:
        yield
    finally:
        _start.reset(token)


def start() -> Path:
    """Return the directory that the search begins at."""
    given = _start.get()
    return given[0] if given else Path.cwd()


def find() -> Path | None:
    """Return the nearest directory with settings, from ``start()`` upward, or None.

    Those are a ``tenancy.toml``, a ``[tool.tenancy]`` in ``pyproject.toml``, or a ``TENANCY_`` variable in ``.env``.
    """
    place, above = _start.get() or (Path.cwd(), True)
    return next((directory for directory in (upward(place) if above else (place,)) if has_settings(directory)), None)


def upward(directory: Path) -> Iterator[Path]:
    """Yield ``directory`` and those above it, to the root of the repository, the home directory or the file system.

    A directory above in which everyone may write is none of the project's: anyone can put settings there.
    """
    try:
        home: Path | None = Path.home()
    except RuntimeError:
        home = None  # a uid without a passwd entry
    for place in (directory, *directory.parents):
        if place != directory and (place == Path(place.anchor) or _is_open_to_all(place)):
            return
        yield place
        if place == home or (place / ".git").exists():
            return


def nowhere() -> str:
    """Say where no settings were found, and which were passed over."""
    looked = list(upward(start()))
    text = f"there is no settings file in {start()} nor above it"
    beyond = looked[-1].parent
    if beyond in looked or not _is_open_to_all(beyond) or not has_settings(beyond):
        return text
    return f"{text}; those in {beyond} are not read, since everyone may write there"


def has_settings(directory: Path) -> bool:
    """Whether a directory has a file with settings of this package. An unreadable file counts, so that it is named."""
    return (directory / "tenancy.toml").is_file() or _has_table(directory) or _has_variables(directory / ".env")


def shown(path: Path) -> str:
    """A path for messages: as short as it is unambiguous in the working directory."""
    here = Path.cwd()
    if here.is_relative_to(path.absolute().parent) or path.absolute().is_relative_to(here):
        return os.path.relpath(path.absolute(), here)
    return str(path)


def _has_table(directory: Path) -> bool:
    path = directory / "pyproject.toml"
    try:
        text = path.read_text(encoding="utf-8")
        if "tenancy" not in text:
            return False
        tool = tomllib.loads(text).get("tool")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return path.is_file()
    return isinstance(tool, dict) and any(name in tool for name in TABLES)


def _has_variables(path: Path) -> bool:
    try:
        return path.is_file() and _VARIABLE.search(path.read_text(encoding="utf-8-sig")) is not None
    except (OSError, ValueError):
        return True


def _is_open_to_all(directory: Path) -> bool:
    try:
        return bool(directory.stat().st_mode & _EVERYONE_MAY_WRITE)
    except OSError:
        return True
