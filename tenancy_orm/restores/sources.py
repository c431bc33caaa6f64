"""Where a restore takes a tenant's contents from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from ..errors import OperationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive of ``pg_dump`` that is open for a restore.

    Attributes:
        path: The directory (``pg_dump -Fd``) or the file.
        revision: The revision of its schema; None where that is not known before it is restored.
        rows: Rows by table, as ``schema.table``; empty where nobody has counted them.
        server_version: The major version of the server that it was made on; None where that is not known.
    """

    path: Path
    revision: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    server_version: int | None = None


class RestoreSource(Protocol):
    """What a restore takes a tenant's contents from: a backup, or a recovered server."""

    @property
    def tenant_id(self) -> UUID | None:
        """The tenant that the contents are of; None where the source does not say it."""

    def describe(self) -> Mapping[str, Any]:
        """Return what the operation's row and the audit log say of it: JSON values, no secrets."""

    def open(self) -> AbstractAsyncContextManager[Archive]:
        """Open it, with its signature and checksums verified.

        Raises:
            OperationError: it cannot be read, or is not what was written.
        """


@dataclass(frozen=True, slots=True)
class DumpSource:
    """A directory or a file that ``pg_dump`` has written on this machine. Nothing vouches for it but its owner.

    Args:
        path: Where it is.
        tenant_id: The tenant that it is of; None where the caller vouches for that.
        revision: The revision of its schema, where that is known.
    """

    path: Path
    tenant_id: UUID | None = None
    revision: str | None = None

    def describe(self) -> Mapping[str, Any]:
        """Return its path."""
        return {"kind": "dump", "path": str(self.path)}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Archive]:
        """Yield it.

        Raises:
            OperationError: there is nothing.
        """
        if not self.path.exists():
            raise OperationError(f"there is no dump in {self.path}")
        yield Archive(path=self.path, revision=self.revision)


__all__ = ["Archive", "DumpSource", "RestoreSource"]
