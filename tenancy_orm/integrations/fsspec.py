"""fsspec: a file system that knows the bound tenant's files alone (extra ``fsspec``).

```python
files = TenantFileSystem(fsspec.filesystem("file", auto_mkdir=True), "/srv/files")
with files.open("reports/2026.csv", "w") as file:  # /srv/files/t/<id>/reports/2026.csv
    ...
```
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

from ..errors import ConfigurationError, InvalidNameError, MissingExtraError
from ..prefixes import check_prefix, checked_path, tenant_prefix, without_prefix
from ..tenant import Tenant

try:
    from fsspec.spec import AbstractFileSystem
except ImportError as exc:
    raise MissingExtraError("fsspec", "fsspec") from exc

_PATTERN = "*?["


class TenantFileSystem:
    """A file system for the files of the tenant that is bound. Paths are relative, and so are those in results.

    The methods are fsspec's own, with its arguments. It is no ``AbstractFileSystem`` itself: what this class does not
    have is not there, so that neither a method that was overlooked nor a later one reaches other tenants' files.

    Args:
        fs: A file system of fsspec's, which nothing else should use from now on. ``DirFileSystem`` protects against
            ``..`` on local files alone; it is not needed here.
        root: The directory, or bucket, with all tenants' files in it.

    Raises:
        ConfigurationError: it is none, it is an asynchronous one, or ``root`` is a pattern.
        NoTenantError: (at each method) no tenant is bound.
        InvalidNameError: (at each method) the path is absolute, has a part ``..``, or might lead elsewhere.
    """

    def __init__(self, fs: AbstractFileSystem, root: str = "") -> None:
        given: object = fs
        if not isinstance(given, AbstractFileSystem):
            raise ConfigurationError(f"TenantFileSystem takes a file system of fsspec's, not {type(given).__name__}")
        if getattr(given, "asynchronous", False):
            raise ConfigurationError("TenantFileSystem takes a file system that was made without asynchronous=True")
        if any(character in root for character in _PATTERN):
            raise ConfigurationError(f"root is a directory, and {root!r} is a pattern")
        self._raw: Any = fs
        stripped = str(self._raw._strip_protocol(root))
        # "/" stays: without it a local path would be below the working directory
        self._root = f"{stripped.rstrip('/')}/" if stripped else ""

    def __repr__(self) -> str:
        """Tell what it wraps, without an address or a credential."""
        return f"<TenantFileSystem of {type(self._raw).__name__}>"

    # --- reading and writing ----------------------------------------------------------------------------------------

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Open a file. What is open stays its tenant's: close it before the binding ends."""
        return self._raw.open(self._path(path), mode, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the content of a file, or a part of it."""
        return bytes(self._raw.cat_file(self._path(path), start=start, end=end))

    def pipe_file(self, path: str, value: bytes) -> None:
        """Write a file."""
        self._raw.pipe_file(self._path(path), value)

    read_bytes = cat_file
    write_bytes = pipe_file

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """Return the content of a file as text."""
        return self.cat_file(path).decode(encoding)

    def write_text(self, path: str, value: str, encoding: str = "utf-8") -> None:
        """Write a text into a file."""
        self.pipe_file(path, value.encode(encoding))

    def get_file(self, rpath: str, lpath: str) -> None:
        """Copy a file of the tenant's to a local path of the application's."""
        self._raw.get_file(self._path(rpath), lpath)

    def put_file(self, lpath: str, rpath: str) -> None:
        """Copy a local file of the application's to a file of the tenant's."""
        self._raw.put_file(lpath, self._path(rpath))

    def touch(self, path: str) -> None:
        """Make an empty file."""
        self._raw.touch(self._path(path))

    def cp_file(self, path1: str, path2: str) -> None:
        """Copy a file to another path of the tenant's."""
        self._raw.cp_file(self._path(path1), self._path(path2))

    def mv(self, path1: str, path2: str) -> None:
        """Move a file to another path of the tenant's."""
        self._raw.cp_file(self._path(path1), self._path(path2))
        self._raw.rm_file(self._path(path1))

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        self._raw.rm_file(self._path(path))

    def rm(self, path: str, recursive: bool = False) -> None:
        """Delete a file, or with ``recursive`` a directory."""
        full = self._path(path)
        if any(character in path for character in _PATTERN):
            raise InvalidNameError(path, "is a pattern; delete what glob returns")
        self._raw.rm(full, recursive=recursive)

    def sign(self, path: str, expiration: int = 100) -> str:
        """Return a URL with which anyone may read one file for ``expiration`` seconds."""
        return str(self._raw.sign(self._path(path), expiration=expiration))

    # --- directories ------------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        return bool(self._raw.exists(self._path(path)))

    def isfile(self, path: str) -> bool:
        """Whether there is such a file."""
        return bool(self._raw.isfile(self._path(path)))

    def isdir(self, path: str) -> bool:
        """Whether there is such a directory."""
        return bool(self._raw.isdir(self._directory(path)))

    def info(self, path: str) -> dict[str, Any]:
        """Return what is known of a file or directory."""
        return dict(self._own(self._raw.info(self._path(path))))

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes."""
        return self._raw.size(self._path(path))  # type: ignore[no-any-return]

    def ls(self, path: str = "", detail: bool = True) -> list[Any]:
        """List a directory: dictionaries, or paths without ``detail``. A tenant without files has an empty one."""
        try:
            listed = self._raw.ls(self._directory(path), detail=detail)
        except FileNotFoundError:
            if path:
                raise
            return []
        return [self._own(found) for found in listed]

    def find(self, path: str = "", maxdepth: int | None = None) -> list[str]:
        """List all files below a directory."""
        return [self._name(found) for found in self._raw.find(self._directory(path), maxdepth=maxdepth)]

    def glob(self, pattern: str) -> list[str]:
        """List the files and directories that match."""
        return [self._name(found) for found in self._raw.glob(self._path(pattern))]

    def walk(self, path: str = "") -> Iterator[tuple[str, list[str], list[str]]]:
        """Iterate over directories: the path, and the names of directories and files in it.

        Each step needs the tenant to be bound.
        """
        below = self._directory(path)
        own = tenant_prefix()
        return self._walk(self._raw.walk(below), own)

    def _walk(self, found: Any, own: str) -> Iterator[tuple[str, list[str], list[str]]]:
        for directory, inner, files in found:
            check_prefix(own, "a walk of a TenantFileSystem")
            yield self._name(f"{directory}/", own).rstrip("/"), inner, files

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory, and those that it is in."""
        self._raw.makedirs(self._path(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Delete an empty directory."""
        self._raw.rmdir(self._path(path))

    # --- a tenant's end ---------------------------------------------------------------------------------------------

    def delete_all(self, tenant: Tenant | UUID | str) -> None:
        """Delete every file of a tenant: for when it is purged.

        Args:
            tenant: A ``Tenant`` or an id; a purged tenant has no slug any more.

        Raises:
            CrossTenantError: another tenant is bound. Operators call this with none bound.
        """
        directory = f"{self._root}{tenant_prefix(tenant)}".rstrip("/")
        self._raw.invalidate_cache(directory)
        if self._raw.exists(directory):
            self._raw.rm(directory, recursive=True)

    # --- paths ------------------------------------------------------------------------------------------------------

    def _path(self, path: str) -> str:
        return f"{self._root}{tenant_prefix()}{checked_path(path)}"

    def _directory(self, path: str) -> str:
        return f"{self._root}{tenant_prefix()}{checked_path(path, directory=True)}".rstrip("/")

    def _name(self, name: str, own: str | None = None) -> str:
        # some file systems answer with a leading slash that they were not given
        name, prefix = name.lstrip("/"), self._root.lstrip("/") + (own or tenant_prefix())
        return "" if f"{name}/" == prefix else without_prefix(name, prefix)

    def _own(self, found: Any) -> Any:
        return self._name(found) if isinstance(found, str) else {**found, "name": self._name(found["name"])}


__all__ = ["TenantFileSystem"]
