"""Where a restore takes a tenant's contents from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from ..backups import Backup, BackupManager
from ..errors import OperationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive of ``pg_dump`` that is open for a restore.

    Attributes:
        path: The directory (``pg_dump -Fd``) or the file.
        revision: The revision of its schema; None where that is not known before it is restored.
        tenant_owned: What the tenant's role owned ("table sandbox.drafts"), by a signed manifest or a recovered server;
            None where nobody vouches for it.
        rows: Rows by table, as its quoted name with the schema; empty where nobody has counted them.
        server_version: The major version of the server that it was made on; None where that is not known.
        extensions: The names of the extensions that the database had, by the same; None where nobody vouches for them.
    """

    path: Path
    revision: str | None = None
    tenant_owned: tuple[str, ...] | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    server_version: int | None = None
    extensions: frozenset[str] | None = None


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


class BackupSource:
    """A backup of a tenant, from ``tenancy.backups``.

    Args:
        backups: Opens it.
        backup: Its row.

    Raises:
        OperationError: it is no complete backup of a tenant.
    """

    def __init__(self, backups: BackupManager, backup: Backup) -> None:
        if backup.tenant_id is None:
            raise OperationError(f"backup {backup.id} is one of the control database, and no tenant's")
        if backup.state != "done":
            raise OperationError(f"backup {backup.id} cannot be restored: it is {backup.state}")
        self._backups = backups
        self.backup = backup

    @property
    def tenant_id(self) -> UUID | None:
        """The tenant, by the row; the signed manifest must say the same."""
        return self.backup.tenant_id

    def describe(self) -> Mapping[str, Any]:
        """Return its id, and when it was made."""
        return {"kind": "backup", "backup": str(self.backup.id), "started_at": self.backup.started_at.isoformat()}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Archive]:
        """Decrypt it into temporary space.

        Raises:
            BackupNotFoundError: the store does not have it any more.
            BackupDamagedError: it is not what was written.
            BackupKeyDestroyedError: its key was destroyed.
            BackupError: the store does not answer, or there is not enough temporary space.
        """
        async with self._backups.open(self.backup) as opened:
            manifest = opened.manifest
            yield Archive(
                path=opened.directory,
                revision=manifest.revision,
                tenant_owned=manifest.tenant_owned,
                rows=manifest.tables,
                server_version=int(manifest.server_version.split(".")[0]),
                extensions=frozenset(one.name for one in manifest.extensions),
            )


__all__ = ["Archive", "BackupSource", "DumpSource", "RestoreSource"]
