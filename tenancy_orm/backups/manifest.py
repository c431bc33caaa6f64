"""``Manifest``: what a backup has, signed as the audit log's checkpoints are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from ..audit.checkpoints import SignedStatement, Signer, Verifier
from ..errors import AuditError, BackupDamagedError

FORMAT = "tenancy-backup-1"
_LATER = ("sequences",)  # fields that older versions of the package did not write


@dataclass(frozen=True, slots=True)
class BackupFile:
    """A file of a dump: its name, its size in bytes and its SHA-256 in hexadecimal digits, before the encryption."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BackupExtension:
    """An extension of the database, with its schema and version."""

    name: str
    schema: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a backup has.

    Attributes:
        id: The backup's id.
        installation: The installation's id.
        tenant_id: The tenant; None: it is the control database.
        slug: The tenant's slug then; so are the next two.
        tier: Its tier.
        region: Its region.
        server: The name of its server.
        database: The name of the database.
        role: The tenant's role.
        owner: The role that owns tenants' databases.
        key_id: The key that it is encrypted with.
        package_version: The version of this package.
        server_version: PostgreSQL's version, as ``SHOW server_version``.
        dump_version: The major version of ``pg_dump``.
        revision: The revision of the schema; None where there is none.
        fingerprint: The fingerprint of the schema, with owners and privileges, as drift's.
        structure: The fingerprint of the schema without owners, privileges and what only an administrator can make.
        lsn: The position in the write-ahead log when the snapshot was taken.
        snapshot_at: When the snapshot was taken, by the server's clock.
        database_bytes: The size of the database.
        locale: ``encoding``, ``collate``, ``ctype``, ``provider`` and ``locale`` of the database.
        tables: How many rows each table had in the snapshot, by its quoted name with the schema.
        sequences: The last value of each sequence that was used, by its quoted name with the schema, as far as it did
            not change during the dump. Backups of before have none.
        large_objects: How many there were.
        extensions: The extensions.
        tenant_owned: What the tenant's role owned: "table public.notes". The rest was the owner's.
        files: The files of the dump, in their order in the archive.
        archive_bytes: The size of the encrypted archive.
        archive_sha256: Its SHA-256 in hexadecimal digits.
        created_at: When the backup was complete.
    """

    id: UUID
    installation: UUID
    tenant_id: UUID | None
    slug: str | None
    tier: str | None
    region: str | None
    server: str | None
    database: str
    role: str | None
    owner: str | None
    key_id: str
    package_version: str
    server_version: str
    dump_version: int
    revision: str | None
    fingerprint: str | None
    structure: str | None
    lsn: str
    snapshot_at: datetime
    database_bytes: int
    locale: Mapping[str, str | None]
    tables: Mapping[str, int]
    sequences: Mapping[str, int] = field(default_factory=dict)
    large_objects: int = 0
    extensions: tuple[BackupExtension, ...] = ()
    tenant_owned: tuple[str, ...] = ()
    files: tuple[BackupFile, ...] = field(default=(), repr=False)
    archive_bytes: int
    archive_sha256: str
    created_at: datetime

    @property
    def rows(self) -> int:
        """How many rows all tables had together."""
        return sum(self.tables.values())

    @property
    def dump_bytes(self) -> int:
        """The size of the dump's files, which ``OpenBackup.directory`` needs."""
        return sum(file.bytes for file in self.files)

    def to_fields(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = asdict(self)
        for name in ("id", "installation", "tenant_id"):
            values[name] = None if values[name] is None else str(values[name])
        for name in ("snapshot_at", "created_at"):
            values[name] = values[name].astimezone(UTC).isoformat(timespec="microseconds")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Manifest:
        """Read what ``to_fields`` returned.

        Raises:
            BackupDamagedError: it is no manifest.
        """
        try:
            given = {one.name: values[one.name] for one in fields(cls) if one.name in values or one.name not in _LATER}
            for name in ("id", "installation", "tenant_id"):
                given[name] = None if given[name] is None else UUID(given[name])
            for name in ("snapshot_at", "created_at"):
                given[name] = datetime.fromisoformat(given[name])
            given["extensions"] = tuple(BackupExtension(**one) for one in given["extensions"])
            given["files"] = tuple(BackupFile(**one) for one in given["files"])
            given["tenant_owned"] = tuple(given["tenant_owned"])
            return cls(**given)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BackupDamagedError(f"this is not the manifest of a backup: {type(exc).__name__}: {exc}") from exc

    def sign(self, signer: Signer) -> bytes:
        """Return it as a signed object for a store.

        Raises:
            ConfigurationError: there is no key.
        """
        return signer.sign_statement(FORMAT, self.to_fields()).to_bytes()

    @classmethod
    def read(cls, data: bytes, verifier: Verifier) -> Manifest:
        """Read a signed object, and verify its signature.

        Raises:
            BackupDamagedError: it was changed, or signed by somebody else.
        """
        try:
            statement = SignedStatement.from_bytes(data, kind=FORMAT)
            verifier.verify_statement(statement)
        except AuditError as exc:
            raise BackupDamagedError(f"the manifest: {exc}") from exc
        return cls.from_fields(statement.fields)


__all__ = ["FORMAT", "BackupExtension", "BackupFile", "Manifest"]
