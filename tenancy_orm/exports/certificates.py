"""``ErasureCertificate``: a signed statement of what was erased of a tenant, when, and what remains until which day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from ..audit.checkpoints import SignedStatement, Signer, Verifier
from ..errors import AuditError, ErasureError

FORMAT = "tenancy-erasure-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """What remains of a tenant after its erasure.

    Attributes:
        what: What it is.
        is_readable: Whether whoever has it, and nothing else, can read the tenant's data in it.
        until: Until when at the latest; None where that is not known, or for ever: see ``note``.
        note: What ends it, or why it is kept.
    """

    what: str
    is_readable: bool
    until: datetime | None
    note: str

    def to_fields(self) -> dict[str, Any]:
        """Return it as JSON values."""
        until = None if self.until is None else _time(self.until)
        return {"what": self.what, "is_readable": self.is_readable, "until": until, "note": self.note}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureCertificate:
    """What was erased of a tenant, when, and what remains.

    Attributes:
        installation: The installation.
        tenant_id: The tenant.
        slug: Its slug when it was purged.
        purged_at: When its database, role and secrets were gone.
        issued_at: When the keys of its backups were destroyed as well, and this was signed.
        erased: What was erased.
        backup_keys: The ids of the keys of its backups that were destroyed, and when.
        remains: What remains.
        statement: The signed statement.
    """

    installation: UUID
    tenant_id: UUID
    slug: str
    purged_at: datetime
    issued_at: datetime
    erased: tuple[str, ...]
    backup_keys: Mapping[str, datetime]
    remains: tuple[Remaining, ...]
    statement: SignedStatement

    @classmethod
    def sign(
        cls,
        signer: Signer,
        *,
        installation: UUID,
        tenant_id: UUID,
        slug: str,
        purged_at: datetime,
        erased: tuple[str, ...],
        backup_keys: Mapping[str, datetime],
        remains: tuple[Remaining, ...],
    ) -> ErasureCertificate:
        """Sign one now.

        Raises:
            ConfigurationError: there is no key.
        """
        fields = {
            "installation": str(installation),
            "tenant_id": str(tenant_id),
            "slug": slug,
            "purged_at": _time(purged_at),
            "issued_at": _time(datetime.now(UTC)),
            "erased": list(erased),
            "backup_keys": {key: _time(moment) for key, moment in sorted(backup_keys.items())},
            "remains": [one.to_fields() for one in remains],
        }
        return cls._of(signer.sign_statement(FORMAT, fields))

    @classmethod
    def from_bytes(cls, data: bytes) -> ErasureCertificate:
        """Parse what ``to_bytes`` wrote. The signature is not verified.

        Raises:
            ErasureError: it is not a certificate, or was changed.
        """
        try:
            return cls._of(SignedStatement.from_bytes(data, kind=FORMAT))
        except (AuditError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
            raise ErasureError(f"this is not a certificate of erasure, or it was changed: {exc}") from exc

    @classmethod
    def _of(cls, statement: SignedStatement) -> ErasureCertificate:
        fields = statement.fields
        return cls(
            installation=UUID(fields["installation"]),
            tenant_id=UUID(fields["tenant_id"]),
            slug=str(fields["slug"]),
            purged_at=datetime.fromisoformat(fields["purged_at"]),
            issued_at=datetime.fromisoformat(fields["issued_at"]),
            erased=tuple(map(str, fields["erased"])),
            backup_keys={key: datetime.fromisoformat(moment) for key, moment in fields["backup_keys"].items()},
            remains=tuple(
                Remaining(
                    what=one["what"],
                    is_readable=one["is_readable"],
                    until=None if one["until"] is None else datetime.fromisoformat(one["until"]),
                    note=one["note"],
                )
                for one in fields["remains"]
            ),
            statement=statement,
        )

    def to_bytes(self) -> bytes:
        """Return it as one line of JSON, with its signature."""
        return self.statement.to_bytes()

    def verify(self, verifier: Verifier) -> None:
        """Verify the signature, with public keys alone.

        Raises:
            ErasureError: the key is unknown, or the signature is not valid.
        """
        try:
            verifier.verify_statement(self.statement)
        except AuditError as exc:
            raise ErasureError(f"the certificate of {self.slug!r}: {exc}") from exc

    def text(self) -> str:
        """Return it in words."""
        lines = [
            f"Certificate of erasure: {self.slug} ({self.tenant_id})",
            f"Installation {self.installation}",
            f"Purged at {_day(self.purged_at)}; issued at {_day(self.issued_at)}",
            f"Signed with key {self.statement.key_id!r}",
            "",
            "Erased:",
            *(f"- {one}" for one in self.erased),
            *(f"- the key {key} of its backups, at {_day(moment)}" for key, moment in self.backup_keys.items()),
            "",
            "Remains:",
        ]
        for one in self.remains:
            readable = "readable" if one.is_readable else "not readable alone"
            until = "" if one.until is None else f", until {one.until.astimezone(UTC):%Y-%m-%d}"
            lines.append(f"- {one.what} ({readable}{until}): {one.note}")
        return "\n".join(lines)


def _time(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="microseconds")


def _day(value: datetime) -> str:
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


__all__ = ["FORMAT", "ErasureCertificate", "Remaining"]
