"""Where backups are kept: a directory, or an object store by obstore.

All methods with a stream block, and are called in threads of their own. Paths have ``/`` between their parts, as in
``installation/tenant/backup/dump.tar.age``; what is written at a path is there as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..config import BackupConfig
from ..context import refuse_while_bound
from ..errors import BackupError, BackupNotFoundError, ConfigurationError, MissingExtraError

CHUNK_BYTES = 1024 * 1024
"""How much is read and written at once."""

_PART_BYTES = 16 * 1024**2  # an object of S3 has at most 10,000 parts
_SMALL_BYTES = 16 * 1024**2
MANIFEST_BYTES = 128 * 1024**2
"""How large a manifest may be: it has a line for each table and each large object."""

_USING = "using a store of backups"
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a store: its path, its size in bytes, and when it was written."""

    path: str
    size: int
    modified_at: datetime


class Store(ABC):
    """A place for backups: of all tenants, so that nothing in it can be used while a tenant is bound.

    Attributes:
        url: Where it is, without credentials.
    """

    url: str

    def __repr__(self) -> str:
        """Tell where it is."""
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
        """Write an object, whole or not at all; an error of ``chunks`` discards what was written.

        Args:
            path: Where.
            chunks: Its contents.
            size: About how many bytes that are, where it is known.

        Raises:
            BackupError: the store refuses, or does not answer.
        """

    @abstractmethod
    def read(self, path: str) -> Iterator[bytes]:
        """Read an object in parts.

        Raises:
            BackupNotFoundError: there is none.
            BackupError: the store refuses, or does not answer.
        """

    @abstractmethod
    def find(self, prefix: str) -> Iterator[StoredObject]:
        """Return the objects below a path, in no order; all where it is empty.

        Raises:
            BackupError: the store refuses, or does not answer.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Delete an object; nothing happens where there is none.

        Raises:
            BackupError: the store refuses, or does not answer.
        """

    async def put(self, path: str, data: bytes) -> None:
        """Write a small object."""
        await asyncio.to_thread(self.write, path, [data], size=len(data))

    async def get(self, path: str, *, at_most: int = _SMALL_BYTES) -> bytes:
        """Read a small object.

        Raises:
            BackupNotFoundError: there is none.
            BackupError: it has more bytes than ``at_most``, or the store does not answer.
        """
        return await asyncio.to_thread(self._read_small, path, at_most)

    async def list(self, prefix: str) -> list[StoredObject]:
        """Return the objects below a path, by path."""
        return await asyncio.to_thread(lambda: sorted(self.find(prefix), key=lambda found: found.path))

    async def delete(self, *paths: str) -> None:
        """Delete objects, in this order."""
        for path in paths:
            await asyncio.to_thread(self.remove, path)

    def _read_small(self, path: str, at_most: int) -> bytes:
        found = bytearray()
        for chunk in self.read(path):
            found += chunk
            if len(found) > at_most:
                raise BackupError(f"{path} in {self.url} is larger than any valid file of this kind")
        return bytes(found)


def open_store(url: str, options: Mapping[str, str]) -> Store:
    """Return the store that ``backup.store`` names.

    Raises:
        ConfigurationError: the options are not ones of the store.
        MissingExtraError: obstore is not installed.
    """
    if url.startswith("file:"):
        if options:
            raise ConfigurationError("backup.store_options are for object stores; a directory has none")
        return DirectoryStore(Path("/" + url.removeprefix("file:").lstrip("/")))
    return ObjectStore(url, options)


class Stores:
    """Opens stores: that of new backups, and those of older ones.

    Args:
        config: ``store`` and ``store_options`` are read from it.
    """

    def __init__(self, config: BackupConfig) -> None:
        self._config = config
        self._opened: dict[str, Store] = {}

    @property
    def is_configured(self) -> bool:
        """Whether ``backup.store`` is set."""
        return self._config.store is not None

    @property
    def current(self) -> Store:
        """The store of new backups.

        Raises:
            ConfigurationError: ``backup.store`` is not set.
        """
        if self._config.store is None:
            raise ConfigurationError(
                "backup.store is not set: name a directory, as file:/var/backups/tenancy, or a bucket, as s3://bucket"
            )
        return self.at(self._config.store)

    def at(self, url: str) -> Store:
        """Return the store at a URL, with the configured options where it is of the same kind."""
        if url not in self._opened:
            own = url.partition(":")[0] == (self._config.store or "").partition(":")[0]
            self._opened[url] = open_store(url, self._config.store_options if own else {})
        return self._opened[url]


class DirectoryStore(Store):
    """A directory, which only this process's user can read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.url = f"file:{directory}"

    def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
        """Write a file beside its place, and move it there once it is on the disk."""
        refuse_while_bound(_USING)
        target = self._path(path)
        with self._failures(path):
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            # with parents=True, each directory but the last would get the mode of the umask
            for directory in reversed([target.parent, *target.parent.parents]):
                if directory.is_relative_to(self._directory):
                    directory.mkdir(exist_ok=True, mode=0o700)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        try:
            with self._failures(path):
                file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for chunk in chunks:
                    with self._failures(path):
                        _write_all(file, chunk)
                with self._failures(path):
                    os.fsync(file)
            finally:
                os.close(file)
            with self._failures(path):
                beside.replace(target)
                _sync_directory(target.parent)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise

    def read(self, path: str) -> Iterator[bytes]:
        """Read a file."""
        refuse_while_bound(_USING)
        with self._failures(path), self._path(path).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def find(self, prefix: str) -> Iterator[StoredObject]:
        """Return the files below a directory."""
        refuse_while_bound(_USING)
        root = self._path(prefix) if prefix else self._directory
        for directory, _, names in os.walk(root, onerror=partial(self._fail, prefix)):
            for name in names:
                file = Path(directory, name)
                with suppress(FileNotFoundError):
                    found = file.stat()
                    modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
                    yield StoredObject(file.relative_to(self._directory).as_posix(), found.st_size, modified_at)

    def _fail(self, prefix: str, error: OSError) -> None:
        """Raise what ``os.walk`` passes over: a directory that cannot be read is not an empty one."""
        if not isinstance(error, FileNotFoundError):
            with self._failures(prefix):
                raise error

    def remove(self, path: str) -> None:
        """Delete a file, and the directories that are empty then."""
        refuse_while_bound(_USING)
        file = self._path(path)
        with self._failures(path):
            file.unlink(missing_ok=True)
        for parent in file.parents:
            if parent == self._directory:
                return
            try:
                parent.rmdir()
            except OSError:
                return  # there is something else in it

    def _path(self, path: str) -> Path:
        # a part of one that is not whole begins with a point
        if not _PATH.fullmatch(path.replace("/.", "/")):
            raise BackupError(f"{path!r} is not a path in a store")
        return self._directory / path

    def _failures(self, path: str) -> _Failures:
        return _Failures(self, path, OSError, missing=FileNotFoundError)


class ObjectStore(Store):
    """An object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.
        options: obstore's configuration.
    """

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as exc:
            raise MissingExtraError("obstore", "backup") from exc
        self.url = url
        self._obstore: Any = obstore
        self._error = exceptions.BaseError
        self._missing: Any = (exceptions.NotFoundError, FileNotFoundError)
        given: dict[str, Any] = dict(options)
        make: Any = from_url
        client = {"allow_http": True} if given.get("endpoint", "").startswith("http://") else {}
        try:
            self._store: Any = make(url, config=given, client_options=client)
        except (exceptions.BaseError, ValueError) as exc:
            # it may quote a value
            raise ConfigurationError(
                f"the store {url} cannot be opened with the names in backup.store_options: {', '.join(given) or 'none'}"
            ) from (exc if not given else None)

    def write(self, path: str, chunks: Iterable[bytes], *, size: int | None = None) -> None:
        """Write an object, in parts where it is large."""
        refuse_while_bound(_USING)
        part = max(_PART_BYTES, (size or 0) // 5_000)
        given = _Remembering(chunks)
        try:
            with self._failures(path):
                self._obstore.put(self._store, path, given, chunk_size=part, max_concurrency=2)
        except BackupError:
            if given.error is not None:
                raise given.error from None
            raise

    def read(self, path: str) -> Iterator[bytes]:
        """Read an object."""
        refuse_while_bound(_USING)
        with self._failures(path):
            for chunk in self._obstore.get(self._store, path).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def find(self, prefix: str) -> Iterator[StoredObject]:
        """Return the objects below a prefix."""
        refuse_while_bound(_USING)
        with self._failures(prefix):
            for chunk in self._obstore.list(self._store, prefix or None):
                for meta in chunk:
                    yield StoredObject(meta["path"], meta["size"], meta["last_modified"])

    def remove(self, path: str) -> None:
        """Delete an object."""
        refuse_while_bound(_USING)
        try:
            with self._failures(path):
                self._obstore.delete(self._store, path)
        except BackupNotFoundError:
            return

    def _failures(self, path: str) -> _Failures:
        return _Failures(self, path, (self._error, OSError, ValueError), missing=self._missing)


class _Remembering:
    """An iterator that remembers its own error, of which obstore makes another one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except BaseException as exc:
            self.error = exc
            raise


class _Failures:
    """Turns a store's errors into this package's; what a consumer or a producer raises passes."""

    def __init__(self, store: Store, path: str, kinds: Any, *, missing: Any) -> None:
        self._store = store
        self._path = path
        self._kinds = kinds
        self._missing = missing

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raise this package's error."""
        if error is None or isinstance(error, BackupError):
            return
        if isinstance(error, self._missing):
            raise BackupNotFoundError(f"there is no {self._path} in {self._store.url}") from error
        if isinstance(error, self._kinds):
            reason = " ".join(str(error).split())[:300]
            raise BackupError(f"{self._path} in {self._store.url}: {reason}") from error


def _write_all(file: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


__all__ = [
    "CHUNK_BYTES",
    "MANIFEST_BYTES",
    "DirectoryStore",
    "ObjectStore",
    "Store",
    "StoredObject",
    "Stores",
    "open_store",
]
