"""obstore: an object store that knows the bound tenant's objects alone (extra ``obstore``).

```python
files = TenantStore.from_url("s3://bucket/files")
await files.put_async("invoices/7.pdf", data)  # the object is files/t/<id>/invoices/7.pdf
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from ..errors import ConfigurationError, MissingExtraError
from ..prefixes import check_prefix, checked_path, tenant_prefix, without_prefix
from ..tenant import Tenant

try:
    import obstore
    from obstore.store import ObjectStoreMethods, from_url
except ImportError as exc:
    raise MissingExtraError("obstore", "obstore") from exc

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

_BATCH = 1_000  # what S3 deletes at once


class TenantStore:
    """An object store for the objects of the tenant that is bound. Paths are relative, and so are those in results.

    The methods are obstore's own, with its arguments. The functions of ``obstore`` take no ``TenantStore``, so none of
    them can be called without a prefix. What this class does not have is not there: a later obstore adds nothing.

    Args:
        store: A store of ``obstore.store``, which nothing else should use from now on.

    Raises:
        ConfigurationError: it is none.
        NoTenantError: (at each method) no tenant is bound.
        InvalidNameError: (at each method) the path is absolute, has a part ``..``, or might lead elsewhere.
    """

    def __init__(self, store: ObjectStore) -> None:
        given: object = store
        if not isinstance(given, ObjectStoreMethods):
            raise ConfigurationError(f"TenantStore takes a store of obstore.store, not {type(given).__name__}")
        self._raw: Any = store

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Make a store of its own, which nothing else has: ``obstore.store.from_url``."""
        return cls(from_url(url, **options))

    def __repr__(self) -> str:
        """Tell what it wraps, without an address or a credential."""
        return f"<TenantStore of {type(self._raw).__name__}>"

    # --- single objects ---------------------------------------------------------------------------------------------

    def put(self, path: str, file: Any, **options: Any) -> Any:
        """Write an object."""
        return self._raw.put(_path(path), file, **options)

    async def put_async(self, path: str, file: Any, **options: Any) -> Any:
        """Write an object."""
        return await self._raw.put_async(_path(path), file, **options)

    def get(self, path: str, **options: Any) -> TenantObject:
        """Read an object: ``.bytes()``, ``.stream()``, ``.meta``."""
        prefix = tenant_prefix()
        return TenantObject(self._raw.get(_path(path), **options), prefix)

    async def get_async(self, path: str, **options: Any) -> TenantObject:
        """Read an object: ``await .bytes_async()``, ``.stream()``, ``.meta``."""
        prefix = tenant_prefix()
        return TenantObject(await self._raw.get_async(_path(path), **options), prefix)

    def get_range(self, path: str, **options: Any) -> Any:
        """Read a part of an object."""
        return self._raw.get_range(_path(path), **options)

    async def get_range_async(self, path: str, **options: Any) -> Any:
        """Read a part of an object."""
        return await self._raw.get_range_async(_path(path), **options)

    def get_ranges(self, path: str, **options: Any) -> Any:
        """Read parts of an object."""
        return self._raw.get_ranges(_path(path), **options)

    async def get_ranges_async(self, path: str, **options: Any) -> Any:
        """Read parts of an object."""
        return await self._raw.get_ranges_async(_path(path), **options)

    def head(self, path: str) -> ObjectMeta:
        """Return what is known of an object."""
        return _own(self._raw.head(_path(path)), tenant_prefix())

    async def head_async(self, path: str) -> ObjectMeta:
        """Return what is known of an object."""
        prefix = tenant_prefix()
        return _own(await self._raw.head_async(_path(path)), prefix)

    def delete(self, paths: str | Sequence[str]) -> None:
        """Delete one object, or several."""
        self._raw.delete(_paths(paths))

    async def delete_async(self, paths: str | Sequence[str]) -> None:
        """Delete one object, or several."""
        await self._raw.delete_async(_paths(paths))

    def copy(self, from_: str, to: str, *, overwrite: bool = True) -> None:
        """Copy an object to another path of the tenant's."""
        self._raw.copy(_path(from_), _path(to), overwrite=overwrite)

    async def copy_async(self, from_: str, to: str, *, overwrite: bool = True) -> None:
        """Copy an object to another path of the tenant's."""
        await self._raw.copy_async(_path(from_), _path(to), overwrite=overwrite)

    def rename(self, from_: str, to: str, *, overwrite: bool = True) -> None:
        """Move an object to another path of the tenant's."""
        self._raw.rename(_path(from_), _path(to), overwrite=overwrite)

    async def rename_async(self, from_: str, to: str, *, overwrite: bool = True) -> None:
        """Move an object to another path of the tenant's."""
        await self._raw.rename_async(_path(from_), _path(to), overwrite=overwrite)

    def sign(self, method: str, paths: str | Sequence[str], expires_in: timedelta) -> Any:
        """Return a URL with which anyone may use one object for a time; one for each of several."""
        signing: Callable[..., Any] = obstore.sign
        return signing(self._raw, method, _paths(paths), expires_in)

    async def sign_async(self, method: str, paths: str | Sequence[str], expires_in: timedelta) -> Any:
        """Return a URL with which anyone may use one object for a time; one for each of several."""
        signing: Callable[..., Any] = obstore.sign_async
        return await signing(self._raw, method, _paths(paths), expires_in)

    # --- listings ---------------------------------------------------------------------------------------------------

    def list(self, prefix: str | None = None, *, offset: str | None = None, chunk_size: int = 50) -> TenantListing:
        """List the tenant's objects below a directory, in lists of ``chunk_size``."""
        own, below = _directory(prefix)
        after = None if offset is None else own + checked_path(offset)
        return TenantListing(self._raw.list(below, offset=after, chunk_size=chunk_size), own)

    def list_async(
        self, prefix: str | None = None, *, offset: str | None = None, chunk_size: int = 50
    ) -> TenantListing:
        """List the tenant's objects below a directory: ``async for objects in store.list_async()``."""
        return self.list(prefix, offset=offset, chunk_size=chunk_size)

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Any]:
        """List a directory: its ``objects``, and the directories in it as ``common_prefixes``."""
        own, below = _directory(prefix)
        return _own_listing(self._raw.list_with_delimiter(below), own)

    async def list_with_delimiter_async(self, prefix: str | None = None) -> dict[str, Any]:
        """List a directory: its ``objects``, and the directories in it as ``common_prefixes``."""
        own, below = _directory(prefix)
        return _own_listing(await self._raw.list_with_delimiter_async(below), own)

    # --- a tenant's end ---------------------------------------------------------------------------------------------

    def delete_all(self, tenant: Tenant | UUID | str) -> int:
        """Delete every object of a tenant, and return how many there were: for when it is purged.

        Args:
            tenant: A ``Tenant`` or an id; a purged tenant has no slug any more.

        Raises:
            CrossTenantError: another tenant is bound. Operators call this with none bound.
        """
        deleted = 0
        for chunk in self._raw.list(tenant_prefix(tenant), chunk_size=_BATCH):
            self._raw.delete([meta["path"] for meta in chunk])
            deleted += len(chunk)
        return deleted

    async def delete_all_async(self, tenant: Tenant | UUID | str) -> int:
        """Delete every object of a tenant, as ``delete_all``."""
        deleted = 0
        async for chunk in self._raw.list_async(tenant_prefix(tenant), chunk_size=_BATCH):
            await self._raw.delete_async([meta["path"] for meta in chunk])
            deleted += len(chunk)
        return deleted


class TenantObject:
    """An object that was read: obstore's ``GetResult``, with the tenant's own path in ``meta``.

    Each use needs the tenant to be bound, so that one that was kept gives nothing to another tenant.
    """

    def __init__(self, raw: Any, prefix: str) -> None:
        self._raw = raw
        self._prefix = prefix

    @property
    def meta(self) -> ObjectMeta:
        """What is known of the object."""
        self._check()
        return _own(self._raw.meta, self._prefix)

    def __getattr__(self, name: str) -> Any:
        """Return what a ``GetResult`` has: it leads to this object alone."""
        if name.startswith("_"):
            raise AttributeError(name)
        self._check()
        return getattr(self._raw, name)

    def stream(self, *args: Any, **options: Any) -> TenantStream:
        """Read it in parts, of at least ``min_chunk_size`` bytes."""
        self._check()
        return TenantStream(self._raw.stream(*args, **options), self._prefix)

    def __iter__(self) -> Iterator[Any]:
        """Read it in parts."""
        return iter(self.stream())

    def __aiter__(self) -> AsyncIterator[Any]:
        """Read it in parts."""
        return aiter(self.stream())

    def _check(self) -> None:
        check_prefix(self._prefix, "a TenantObject")


class TenantStream:
    """The parts of an object that is read, one after the other."""

    def __init__(self, raw: Any, prefix: str) -> None:
        self._raw = raw
        self._prefix = prefix

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the parts."""
        for part in self._raw:
            check_prefix(self._prefix, "a TenantStream")
            yield part

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Iterate over the parts."""
        async for part in self._raw:
            check_prefix(self._prefix, "a TenantStream")
            yield part


class TenantListing:
    """Lists of objects with the tenant's own paths, one after the other; ``collect`` returns them all in one.

    Each step needs the tenant to be bound.
    """

    def __init__(self, raw: Any, prefix: str) -> None:
        self._raw = raw
        self._prefix = prefix

    def __iter__(self) -> Iterator[list[ObjectMeta]]:
        """Iterate over the lists."""
        return (self._own(chunk) for chunk in self._raw)

    async def __aiter__(self) -> AsyncIterator[list[ObjectMeta]]:
        """Iterate over the lists."""
        async for chunk in self._raw:
            yield self._own(chunk)

    def collect(self) -> list[ObjectMeta]:
        """Return all objects."""
        return self._own(self._raw.collect())

    async def collect_async(self) -> list[ObjectMeta]:
        """Return all objects."""
        return self._own(await self._raw.collect_async())

    def _own(self, chunk: Sequence[ObjectMeta]) -> list[ObjectMeta]:
        check_prefix(self._prefix, "a TenantListing")
        return [_own(meta, self._prefix) for meta in chunk]


def _path(path: str) -> str:
    return tenant_prefix() + checked_path(path)


def _paths(paths: str | Sequence[str]) -> str | list[str]:
    return _path(paths) if isinstance(paths, str) else [_path(path) for path in paths]


def _directory(path: str | None) -> tuple[str, str]:
    """The tenant's prefix, and what to list."""
    own = tenant_prefix()
    return own, own + checked_path(path or "", directory=True)


def _own(meta: ObjectMeta, prefix: str) -> ObjectMeta:
    return {**meta, "path": without_prefix(meta["path"], prefix)}


def _own_listing(found: Any, prefix: str) -> dict[str, Any]:
    return {
        "common_prefixes": [without_prefix(path, prefix) for path in found["common_prefixes"]],
        "objects": [_own(meta, prefix) for meta in found["objects"]],
    }


__all__ = ["TenantListing", "TenantObject", "TenantStore", "TenantStream"]
