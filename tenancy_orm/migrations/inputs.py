"""The files that a schema is built from, by digest, so that a template of other files is not used.

Every file in the migration directory counts. What a build uses beyond it is recorded during the build: modules of the
application that env.py and the revisions import, in turn with what those import; files that they read; directories
that they list. Names are relative to the project, or to the directory in ``sys.path`` that a module came from: so the
digests are the same on every machine.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import secrets
import stat
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from .recording import Recording, normal

_LIBRARIES = ("site-packages", "dist-packages")
_CACHES = ("__pycache__", "node_modules", *_LIBRARIES)
_COMPILED = (".pyc", ".pyo")
# their versions are part of the fingerprint; this package can be an editable installation
_PACKAGES = ("alembic", "sqlalchemy", "tenancy_orm")
_PYTHON = tuple(normal(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib"))

# Modules of the application are imported about now. One that has been written since may be another than the imported.
_STARTED = time.time_ns()
_PROCESS = secrets.token_hex(8)


class FileDigests:
    """Digests of files and directories, computed again when a file's time or size has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int, int], str]] = {}

    def of(self, path: Path) -> str | None:
        """Return the digest of a file's content, or of a directory's names; None if there is neither."""
        try:
            found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for every file and creation
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            known = self._known.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            content = _listing(path) if stat.S_ISDIR(found.st_mode) else path.read_bytes()
        except OSError:
            return None
        digest = hashlib.sha256(content).hexdigest()
        self._known[path] = stamp, digest
        return digest


def _listing(path: Path) -> bytes:
    return "\0".join(sorted(entry.name for entry in path.iterdir() if _counts(entry.name))).encode()


def _counts(name: str) -> bool:
    """Whether a file or directory of this name can matter: caches and hidden files do not."""
    return not name.startswith(".") and name not in _CACHES and not name.endswith((*_COMPILED, "~"))


def stamps_below(directory: Path, *, compiled: bool = False) -> dict[str, tuple[int, int]]:
    """Return time and size of the files in a directory and below it, by relative name, without caches and hidden ones.

    Args:
        directory: Where to look.
        compiled: Whether compiled files count as well (Alembic's ``sourceless``).
    """
    found: dict[str, tuple[int, int]] = {}
    pending = [(os.fspath(directory), "")]
    followed: set[tuple[int, int]] = set()
    while pending:
        place, prefix = pending.pop()
        for entry in _entries(place):
            name = entry.name
            if not _counts(name) and not (compiled and name.endswith(_COMPILED)):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed since, or a link to nothing
                if not entry.is_dir():
                    status = entry.stat()
                    found[prefix + name] = status.st_mtime_ns, status.st_size
                elif not entry.is_symlink() or _is_new(entry.stat(), followed):
                    pending.append((entry.path, f"{prefix}{name}/"))
    return found


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _is_new(status: os.stat_result, followed: set[tuple[int, int]]) -> bool:
    """Whether a link leads to a directory that no other link led to: links can go in circles."""
    key = status.st_dev, status.st_ino
    is_new = key not in followed
    followed.add(key)
    return is_new


def files_below(directory: Path, *, compiled: bool = False) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of those files, in order."""
    yield from ((name, directory / name) for name in sorted(stamps_below(directory, compiled=compiled)))


def digest_of(parts: Iterable[tuple[str, bytes]]) -> str:
    """Return one digest of names and contents."""
    digest = hashlib.sha256()
    for name, content in parts:
        for data in (name.encode("utf-8", "surrogateescape"), content):
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class Inputs:
    """The files outside a migration directory that a build of it uses.

    Args:
        directory: The directory with env.py.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = normal(directory)
        self._installed_package = _installed_package(self._directory)
        self._digests = FileDigests()
        self._paths: dict[str, Path] = {}

    def digests(self, recording: Recording) -> dict[str, str]:
        """Return the digests of what was recorded, by name.

        A file that was written after the build may have read it, or after this process imported it, need not be what
        the template was made of. Its digest is valid in this process alone: others build a template of their own.
        """
        found: dict[str, str] = {}
        modules = self._modules(recording)
        for path in sorted(recording.paths | modules.keys()):
            is_doubtful = _is_written_since(path, modules.get(path, recording.began))
            name = self._name(path, within=is_doubtful)
            if name is not None and (digest := self._digests.of(path)) is not None:
                found[name] = digest + _of_this_process() if is_doubtful else digest
        return found

    def changed(self, inputs: Mapping[str, str]) -> str | None:
        """Return the name of an input that is missing, or has another content than then; None if all are the same."""
        for name, digest in inputs.items():
            path = self._paths.get(name)
            if path is not None and self._has(path, digest):
                continue
            path = self._find(name)
            if path is None or not self._has(path, digest):
                return name
            self._paths[name] = path
        return None

    def _has(self, path: Path, digest: str) -> bool:
        found = self._digests.of(path)
        return found is not None and digest in (found, found + _of_this_process())

    def _name(self, path: Path, *, within: bool) -> str | None:
        """The name of a file of the application; None for others, and for those that the fingerprint has.

        Args:
            path: The file.
            within: Whether a file in the migration directory has a name as well.
        """
        if (path.is_relative_to(self._directory) and not within) or not self._is_of_application(path):
            return None
        for root in self._roots():
            if path != root and path.is_relative_to(root):
                name = path.relative_to(root)
                # another file of that name, which would be found first, would never have this content
                return name.as_posix() if all(map(_counts, name.parts)) and self._find(str(name)) == path else None
        return None

    def _find(self, name: str) -> Path | None:
        return next((path for root in self._roots() if (path := root / name).exists()), None)

    def _roots(self) -> Iterator[Path]:
        yield self._directory.parent
        yield from dict.fromkeys(normal(entry) for entry in sys.path)
        yield Path.cwd()

    def _modules(self, recording: Recording) -> dict[Path, int]:
        """The files of the modules that the build imported, and of those that these import.

        Each with the time after which it was imported.
        """
        pending = [(path, "") for _, path in files_below(self._directory) if path.suffix == ".py"]
        pending += [(path, name) for name in recording.new_modules if (path := self._source(name)) is not None]
        found = {path: recording.began for path, name in pending if name}
        while pending:
            for name in _imported(*pending.pop()):
                source = self._source(name)
                if source is not None and source not in found:
                    found[source] = _STARTED
                    pending.append((source, name))
        return found

    def _source(self, name: str) -> Path | None:
        """The file of a module of the application; None for others."""
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None) if isinstance(module, ModuleType) else None
        if file is None or name.partition(".")[0] in _PACKAGES or not file.endswith(".py"):
            return None
        path = normal(file)
        return path if self._is_of_application(path) else None

    def _is_of_application(self, path: Path) -> bool:
        """Whether a file is no part of Python or of an installed package, except the one that has the migrations."""
        if self._installed_package is not None and path.is_relative_to(self._installed_package):
            return True
        return not set(_LIBRARIES) & set(path.parts) and not any(path.is_relative_to(place) for place in _PYTHON)


def _is_written_since(path: Path, when: int) -> bool:
    """Whether a file was changed or replaced after ``when``. The time of its content can be that of an archive."""
    try:
        found = path.stat()
    except OSError:
        return False
    # the listing of a directory does not count caches, which change its time
    return not stat.S_ISDIR(found.st_mode) and found.st_ctime_ns > when


def _of_this_process() -> str:
    return f" {_PROCESS}-{os.getpid()}"  # a forked process may have imported other files


def _installed_package(directory: Path) -> Path | None:
    """The installed package that a migration directory is in; None if it is in none."""
    return next((parent for parent in (directory, *directory.parents) if parent.parent.name in _LIBRARIES), None)


def _imported(path: Path, module: str) -> Iterator[str]:
    """The names of modules in the import statements of a file; some are names in modules."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            if node.level and not base:
                continue  # a revision is in no package
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from _with_packages(name)
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))
