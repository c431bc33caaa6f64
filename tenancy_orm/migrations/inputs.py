"""The files that a schema is built from, by digest, so that a template of other files is not used.

Every file in the migration directory counts. What a build uses beyond it is recorded during the build: modules of the
application that env.py and the revisions import, in turn with what those import; installed packages that all these
import; files that they read; directories that they list. Names are relative to the project, or to the directory in
``sys.path`` that a module came from: so the digests are the same on every machine.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import secrets
import stat
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .packages import PackageDigests, distributions
from .recording import Recording, normal

_LIBRARIES = ("site-packages", "dist-packages")
_CACHES = ("__pycache__", "node_modules", *_LIBRARIES)
_COMPILED = (".pyc", ".pyo")
# their versions are part of the fingerprint; this package can be an editable installation
_PACKAGES = ("alembic", "sqlalchemy", "tenancy_orm")
_PACKAGE = "package://"  # of names; no path of a file has it
# imports of modules by names that are made at run time: any module of the package may be one
_DYNAMIC = frozenset({"__import__", "entry_points", "import_module", "iter_modules", "walk_packages"})
_MAY_BE_PATH = re.compile(r"(?=.*\w)[\w./-]{1,200}")
# what machines have differently, and secrets
_SYSTEM = tuple(
    Path(place)
    for place in (
        *("/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr/bin", "/usr/lib"),
        *("/usr/lib64", "/usr/local/lib", "/usr/share", "/var/cache", "/var/lib", "/var/log", "/var/run"),
        *(os.environ.get("TMPDIR") or "/tmp", "/var/tmp", sys.prefix, sys.base_prefix),  # noqa: S108 - not written to
    )
)
# Python, and this package, which need not be among the installed ones
_NOT_OF_APPLICATION = (
    *(normal(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")),
    normal(Path(__file__).parents[1]),
)

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
        self._packages = PackageDigests()
        self._paths: dict[str, Path] = {}

    def digests(self, recording: Recording) -> dict[str, str]:
        """Return the digests of what was recorded, by name.

        A file that was written after the build may have read it, or after this process imported it, need not be what
        the template was made of. Its digest is valid in this process alone: others build a template of their own.
        """
        found: dict[str, str] = {}
        modules, packages = self._modules(recording)
        for distribution in sorted(packages):
            if (package := self._packages.of(distribution)) is not None:
                record, digest = package
                found[_PACKAGE + distribution] = digest + self._doubt(record, _STARTED)
        for path in sorted(recording.paths | modules.keys()):
            doubt = self._doubt(path, modules.get(path, recording.began))
            name = self._name(path, within=bool(doubt))
            if name is not None and (content := self._digests.of(path)) is not None:
                found[name] = content + doubt
        return found

    def changed(self, inputs: Mapping[str, str]) -> str | None:
        """Return the name of an input that is missing, or has another content than then; None if all are the same."""
        for name, digest in inputs.items():
            if name.startswith(_PACKAGE):
                package = self._packages.of(name.removeprefix(_PACKAGE))
                if package is None or not _is_same(package[1], digest):
                    return name
                continue
            path = self._paths.get(name)
            if path is not None and _is_same(self._digests.of(path), digest):
                continue
            path = self._find(name)
            if path is None or not _is_same(self._digests.of(path), digest):
                return name
            self._paths[name] = path
        return None

    @staticmethod
    def _doubt(path: Path, when: int) -> str:
        """What makes a digest this process's own, if the file was changed or replaced after ``when``.

        The time of its content can be that of an archive, so it does not say.
        """
        try:
            found = path.stat()
        except OSError:
            return ""
        # the listing of a directory does not count caches, which change its time
        return "" if stat.S_ISDIR(found.st_mode) or found.st_ctime_ns <= when else _of_this_process()

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
                name = path.relative_to(root).as_posix()
                if not all(map(_is_named, path.relative_to(root).parts)):
                    return None
                # another file of that name, which would be found first, would never have this content
                if self._find(name) == path:
                    return name
        return self._name_outside(path)

    def _name_outside(self, path: Path) -> str | None:
        """The name of a file that is not below the project: beside it in a repository of several, for example."""
        if any(path.is_relative_to(place) and not self._directory.is_relative_to(place) for place in _SYSTEM):
            return None
        name = Path(os.path.relpath(path, self._directory.parent))
        return name.as_posix() if all(_is_named(part) for part in name.parts if part != "..") else None

    def _find(self, name: str) -> Path | None:
        return next((path for root in self._roots() if (path := normal(root / name)).exists()), None)

    def _roots(self) -> Iterator[Path]:
        yield self._directory.parent
        yield from dict.fromkeys(normal(entry) for entry in sys.path)
        yield Path.cwd()

    def _modules(self, recording: Recording) -> tuple[dict[Path, int], set[str]]:
        """The files of the modules that the build imported, and of those that these import, and installed packages.

        Each file with the time after which it was imported.
        """
        pending = [(path, "") for _, path in files_below(self._directory) if path.suffix == ".py"]
        pending += [(path, name) for name in recording.new_modules if (path := self._source(name)) is not None]
        found = {path: recording.began for path, name in pending if name}
        packages: set[tuple[str, Path]] = set()
        while pending:
            path, module = pending.pop()
            module_source = _read_source(path, module)
            if module_source.is_dynamic and path.stem == "__init__":
                found[path.parent] = _STARTED  # it may import each module in it
            for file in _named_files(path, module_source.texts) if module else ():
                # the module may have read it when it was imported
                found.setdefault(file, recording.began if file in recording.paths else _STARTED)
            for name in module_source.imports:
                source = self._source(name)
                if source is not None and source not in found:
                    found[source] = _STARTED
                    pending.append((source, name))
                elif source is None and (package := _installed_module(name)) is not None:
                    packages.add(package)
        return found, {name for package in packages for name in distributions(*package)}

    def _source(self, name: str) -> Path | None:
        """The file of a module of the application; None for others."""
        file = _file_of(name)
        if file is None or name.partition(".")[0] in _PACKAGES:
            return None
        path = normal(file)
        # one in an archive
        path = next((place for place in (path, *path.parents) if place.exists()), path)
        return path if self._is_of_application(path) else None

    def _is_of_application(self, path: Path) -> bool:
        """Whether a file is no part of Python or of an installed package, except the one that has the migrations."""
        if self._installed_package is not None and path.is_relative_to(self._installed_package):
            return True
        is_installed = not set(path.parts).isdisjoint(_LIBRARIES)
        return not is_installed and not any(path.is_relative_to(place) for place in _NOT_OF_APPLICATION)


def _is_same(found: str | None, digest: str) -> bool:
    return found is not None and digest in (found, found + _of_this_process())


def _of_this_process() -> str:
    return f" {_PROCESS}-{os.getpid()}"  # a forked process may have imported other files


def _installed_package(directory: Path) -> Path | None:
    """The installed package that a migration directory is in; None if it is in none."""
    return next((parent for parent in (directory, *directory.parents) if parent.parent.name in _LIBRARIES), None)


def _is_named(part: str) -> bool:
    """Whether a part of a path that was read counts. A compiled file that is no cache is a module without a source."""
    return _counts(part) or part.endswith(_COMPILED)


def _file_of(module: str) -> str | None:
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None) if isinstance(found, ModuleType) else None
    return file if isinstance(file, str) else None


def _installed_module(name: str) -> tuple[str, Path] | None:
    """The top-level module of a module that is installed, and where it is installed."""
    file, top = _file_of(name), name.partition(".")[0]
    if file is None or top in _PACKAGES:
        return None
    path = normal(file)
    site = next((parent for parent in path.parents if parent.name in _LIBRARIES), None)
    return None if site is None else (top, site)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a module's source says.

    ``imports`` are names of modules, and of what is in them. ``is_dynamic`` is whether it imports by made-up names.
    """

    imports: set[str]
    is_dynamic: bool
    texts: set[str]


def _read_source(path: Path, module: str) -> _Source:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        # compiled, or an archive: any module of the package
        return _Source(set(_loaded({module.partition(".")[0]})) if module else set(), True, set())
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    nodes = list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        names.update(_named(node, package))
    is_dynamic = any(_DYNAMIC.intersection(_identifiers(node)) for node in nodes)
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    if is_dynamic:
        names.update(_loaded({text.partition(".")[0] for text in (*texts, module)}))
    return _Source(names, is_dynamic, texts)


def _named_files(path: Path, texts: Iterable[str]) -> Iterator[Path]:
    """The SQL scripts that a module names, and those in directories that it names: beside it or where it runs.

    Of other files it is not known whether they are input; a log is not.
    """
    for text in texts:
        if not _MAY_BE_PATH.fullmatch(text):
            continue
        for place in dict.fromkeys((path.parent, path.parent.parent, Path.cwd())):
            named = normal(place / text)
            if named.suffix == ".sql" and named.is_file():
                yield named
            elif named.is_dir() and (scripts := sorted(named.glob("*.sql"))):
                yield from (named, *scripts)


def _named(node: ast.AST, package: list[str]) -> Iterator[str]:
    """The names in one import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _with_packages(alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        if node.level and not base:
            return  # a revision is in no package
        name = ".".join([*base, *([node.module] if node.module else [])])
        yield from _with_packages(name)
        yield from (f"{name}.{alias.name}" for alias in node.names)


def _identifiers(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return tuple(alias.name for alias in node.names)
    if isinstance(node, ast.Attribute):
        return (node.attr,)
    return (node.id,) if isinstance(node, ast.Name) else ()


def _loaded(packages: set[str]) -> Iterator[str]:
    """The modules of these top-level packages that are imported by now."""
    return (name for name in list(sys.modules) if name.partition(".")[0] in packages)


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))
