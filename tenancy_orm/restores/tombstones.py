"""Tombstones in the backups' store: a purged tenant stays purged, also after the control database was restored.

The control database has a tombstone for each purged tenant. An older backup of it does not: there the tenant is still
alive. Housekeeping therefore writes another one beside the tenant's backups, where the restore looks. It has no more
than the tenant's id and a time, and is signed as the backups are: whoever can write to the store alone makes none.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from ..audit.checkpoints import SignedStatement, Signer, Verifier
from ..audit.log import AuditLog
from ..backups import BackupManager
from ..config import TenancyConfig
from ..control.database import ControlDatabase
from ..errors import AuditError, BackupDamagedError, BackupNotFoundError, OperationError

FORMAT = "tenancy-tombstone-1"

# Also those with no backup that can be read: base backups of a server have their rows for longer. Not older ones: each
# is written by the first housekeeping after its purge.
_PURGED = text("""
SELECT id, updated_at FROM tenancy.tenants
 WHERE status = 'purged' AND updated_at > now() - make_interval(days => 90) ORDER BY id
""")


class Tombstones:
    """Writes tombstones of tenants that were purged within 90 days to the store, and refuses tenants that have one.

    Args:
        config: ``backup.store``: without one there are no backups, and no tombstones.
        control: Knows who was purged.
        audit: Knows the public keys.
        signer: Signs.
        backups: Has the store.
    """

    def __init__(
        self, config: TenancyConfig, control: ControlDatabase, audit: AuditLog, signer: Signer, backups: BackupManager
    ) -> None:
        self._config = config
        self._control = control
        self._audit = audit
        self._signer = signer
        self._backups = backups
        self._signed: set[UUID] = set()  # tenants with a tombstone that was found to be signed

    async def write(self) -> int:
        """Write those that are missing, or not signed; returns how many that were.

        Raises:
            BackupError: the store refuses, or does not answer.
        """
        if self._config.backup.store is None:
            return 0
        async with self._control.connect() as connection:
            purged = (await connection.execute(_PURGED)).all()
        if not purged:
            return 0
        store, installation, written = self._backups.store, self._control.installation, 0
        present = {found.path for found in await store.list(self._directory)}
        verifier = await self._audit.verifier()
        for row in purged:
            if self._path(row.id) in present and await self._is_signed(row.id, verifier):
                continue
            fields = {
                "installation": str(installation),
                "tenant_id": str(row.id),
                "purged_at": row.updated_at.isoformat(),
            }
            await store.put(self._path(row.id), self._signer.sign_statement(FORMAT, fields).to_bytes())
            written += 1
        return written

    async def _is_signed(self, tenant_id: UUID, verifier: Verifier) -> bool:
        """Whether a tenant's tombstone counts: earlier versions have not signed them. It is read once."""
        if tenant_id not in self._signed:
            try:
                await self._read(tenant_id, self._control.installation, verifier)
            except (BackupNotFoundError, BackupDamagedError):
                return False
            self._signed.add(tenant_id)
        return True

    async def _read(self, tenant_id: UUID, installation: UUID, verifier: Verifier) -> datetime:
        """Return when a tenant was purged, as its tombstone says.

        Raises:
            BackupNotFoundError: it has none.
            BackupDamagedError: the tombstone is malformed, not signed, or another one's.
            BackupError: the store does not answer.
        """
        store, path = self._backups.store, self._path(tenant_id, installation)
        data = await store.get(path)
        try:
            statement = SignedStatement.from_bytes(data, kind=FORMAT)
            verifier.verify_statement(statement)
            named = statement.fields
            if (named["installation"], named["tenant_id"]) != (str(installation), str(tenant_id)):
                raise ValueError("it is another tenant's")
            return datetime.fromisoformat(named["purged_at"])
        except (AuditError, ValueError, KeyError, TypeError) as exc:
            raise BackupDamagedError(
                f"{path} in {store.url} is not a tombstone that this installation has signed ({exc}). Where tenant "
                f"{tenant_id} was purged, it remains purged: earlier versions signed none. Where it was not, as the "
                "audit log says, find out who can write to the store, and delete the object"
            ) from exc

    async def refuse(self, tenant_id: UUID, slug: str) -> None:
        """Refuse a tenant that has been purged, whatever the control database says.

        Raises:
            OperationError: it has.
            BackupDamagedError: its tombstone is malformed, or not signed.
            BackupError: the store does not answer.
        """
        if (purged_at := await self.purged_at(tenant_id)) is not None:
            raise OperationError(
                f"tenant {slug!r} was purged ({purged_at}), as the store of backups says, and remains purged; "
                "the control database is older than that"
            )

    async def purged_at(self, tenant_id: UUID, installation: UUID | None = None) -> str | None:
        """Return when a tenant was purged, as the store says; None where it has no tombstone, or there is no store.

        Args:
            tenant_id: The tenant.
            installation: The installation that it is of; that of the control database where None.

        Raises:
            BackupDamagedError: the tombstone is malformed, or not signed.
            BackupError: the store does not answer.
        """
        if self._config.backup.store is None:
            return None
        try:
            of = installation or self._control.installation
            return (await self._read(tenant_id, of, await self._audit.verifier())).isoformat()
        except BackupNotFoundError:
            return None

    @property
    def _directory(self) -> str:
        return self._directory_of(self._control.installation)

    @staticmethod
    def _directory_of(installation: UUID) -> str:
        return f"{installation}/tombstones"

    def _path(self, tenant_id: UUID, installation: UUID | None = None) -> str:
        return f"{self._directory_of(installation or self._control.installation)}/{tenant_id}.json"


__all__ = ["Tombstones"]
