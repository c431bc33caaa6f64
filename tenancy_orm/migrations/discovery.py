"""Finds the Alembic project that is there: its ini file or pyproject.toml, and its directory of migrations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from configparser import Error as IniError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.util.exc import CommandError

from ..config import project
from ..errors import ConfigurationError

_DEPTH = 3  # src/myapp/migrations
_SKIPPED = frozenset({"node_modules", "site-packages", "build", "dist", "docs", "examples", "tests"})


@dataclass(frozen=True, slots=True)
class AlembicProject:
    """A directory of migrations, and the file that names it; None if no file does."""

    migrations: Path
    config_file: Path | None = None

    @property
    def has_env(self) -> bool:
        """Whether the directory has an env.py."""
        return (self.migrations / "env.py").is_file()

    def __str__(self) -> str:
        """Return both, for messages."""
        named = f" ({project.shown(self.config_file)})" if self.config_file else ""
        return project.shown(self.migrations) + named


def find(directory: Path, *, above: bool = True) -> AlembicProject | None:
    """Return the Alembic project of ``directory``: of a file there or above, or of an env.py below it.

    Args:
        directory: Where the search begins.
        above: Whether files in the directories above count.

    Raises:
        ConfigurationError: a file cannot be read, or several directories below have an env.py.
    """
    directory = directory.absolute()
    for place in project.upward(directory) if above else (directory,):
        if (found := read(place)) is not None:
            return found
    below = sorted(_directories(directory, _DEPTH))
    if len(below) > 1:
        names = ", ".join(map(project.shown, below))
        raise ConfigurationError(f"several directories have an env.py: {names}; name one with --migrations")
    return AlembicProject(below[0]) if below else None


def read(place: Path) -> AlembicProject | None:
    """Return the Alembic project that ``alembic.ini`` or ``pyproject.toml`` in ``place`` configures.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    config = config_in(place)
    location = None if config is None else location_of(config, place)
    if config is None or location is None:
        return None
    in_ini = config.config_file_name is not None and config.file_config.has_option("alembic", "script_location")
    return AlembicProject(location, place / ("alembic.ini" if in_ini else "pyproject.toml"))


def config_in(place: Path) -> Config | None:
    """Return the configuration that the files in ``place`` make, or None if there is no such file."""
    ini, toml = place / "alembic.ini", place / "pyproject.toml"
    if not ini.is_file() and not toml.is_file():
        return None
    return Config(ini if ini.is_file() else None, toml_file=toml if toml.is_file() else None)


def location_of(config: Config, place: Path) -> Path | None:
    """Return the directory of migrations that ``config``, read in ``place``, names.

    A relative one is relative to ``place``. Alembic takes the working directory, which is the same where users run it.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    try:
        location: Any = config.get_alembic_option("script_location")
    except (IniError, CommandError, OSError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        raise ConfigurationError(f"Alembic's configuration in {project.shown(place)} cannot be read: {reason}") from exc
    if not isinstance(location, str) or not location:
        return None
    package, colon, path = location.partition(":")
    if colon and not Path(location).is_absolute():
        # a directory of a package, which may not be importable from here
        location = str(Path(*package.split("."), path))
    return Path(os.path.normpath(place / location))


def rooted(config: Config, place: Path) -> Config:
    """Make relative paths in ``config`` absolute, those in ``place``, where it was read; and return it."""
    with warnings.catch_warnings():
        # of old ini files; Alembic says it again when it uses them
        warnings.simplefilter("ignore", DeprecationWarning)
        named = {
            "prepend_sys_path": config.get_prepend_sys_paths_list(),
            "version_locations": config.get_version_locations_list(),
        }
    location = location_of(config, place)
    if location is None or (place == Path.cwd() and ":" not in str(config.get_alembic_option("script_location"))):
        return config
    config.set_main_option("script_location", _escaped(location))
    for option, paths in named.items():
        if paths:
            absolute = (str(place / path) if ":" not in path else path for path in paths)
            config.set_main_option(option, _escaped(os.pathsep.join(absolute)))
    config.set_main_option("path_separator", "os")
    return config


def _escaped(value: object) -> str:
    return str(value).replace("%", "%%")


def _directories(directory: Path, depth: int) -> Iterator[Path]:
    """Directories of migrations below ``directory``."""
    try:
        entries = [entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in _SKIPPED or (entry / "pyvenv.cfg").exists():
            continue
        if (entry / "env.py").is_file() and ((entry / "script.py.mako").is_file() or (entry / "versions").is_dir()):
            yield entry
        elif depth > 1:
            yield from _directories(entry, depth - 1)
