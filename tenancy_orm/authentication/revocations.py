"""Revocations of what the application does not store: tokens of an identity provider, and sessions in cookies."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import ColumnElement, Row, case, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor, clean_text
from ..audit.log import AuditLog
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import revocations
from ..errors import ConfigurationError
from ..events import CredentialRevoked, EventBus
from .lookups import REVOCATION_MARGIN
from .member_rows import check_subject

if TYPE_CHECKING:
    from .directory import Directory

RevocationKind = Literal["subject", "token"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """A revocation. Times are aware datetimes in UTC.

    Of the kind "subject" it refuses what was issued to the subject ``value`` before ``revoked_at``; of the kind
    "token", the one token or session with the id ``value``. It is forgotten ten minutes after ``expires_at``; never
    where None.
    """

    kind: RevocationKind
    value: str
    revoked_at: datetime
    expires_at: datetime | None = None
    reason: str | None = None


class RevocationManager:
    """Revokes tokens and sessions before they expire, for all tenants; ``tenancy.revocations``.

    Every change is audited in the same transaction, under ``actor``, and reaches every process through PostgreSQL's
    NOTIFY. It reaches all tenants, so it is refused while one is bound: call it where no tenant is, on an exempt path
    for logging out for example.
    """

    def __init__(self, control: ControlDatabase, directory: Directory, audit: AuditLog, events: EventBus) -> None:
        self._control = control
        self._directory = directory
        self._audit = audit
        self._events = events

    async def add(
        self,
        *,
        subject: str | None = None,
        token_id: str | None = None,
        expires_at: datetime | None = None,
        reason: str | None = None,
        actor: Actor = SYSTEM,
    ) -> Revocation:
        """Refuse what was issued to ``subject`` until now (log out everywhere), or the one token or session.

        Revoking again moves the time to now. Where one of the two is kept longer, so is the result.

        Args:
            subject: The ``subject`` of the credentials.
            token_id: The ``id`` of the credential: a token's ``jti``, a session's id.
            expires_at: When all that it refuses has expired by itself, an aware datetime. It refuses for ten minutes
                more, since tokens have a leeway and clocks differ, and then housekeeping removes it. It is kept until
                it is removed where None.
            reason: Why, for operators; the first 256 characters are kept.
            actor: Who does this, for the audit log.

        Raises:
            ConfigurationError: not exactly one of ``subject`` and ``token_id`` is given, or a time is malformed.
            InvalidSubjectError: it is empty, too long, or has characters that cannot be printed.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("revoking credentials")
        kind, value = _target(subject, token_id)
        _check_expiry(expires_at)
        statement = insert(revocations).values(kind=kind, value=value, expires_at=expires_at, reason=clean_text(reason))
        new, old = statement.excluded, revocations.c
        statement = statement.on_conflict_do_update(
            index_elements=["kind", "value"],
            set_={
                "revoked_at": func.greatest(old.revoked_at, new.revoked_at),
                "expires_at": case(
                    (or_(old.expires_at.is_(None), new.expires_at.is_(None)), None),
                    else_=func.greatest(old.expires_at, new.expires_at),
                ),
                "reason": new.reason,
            },
        )
        async with self._control.transaction() as connection:
            row = (await connection.execute(statement.returning(revocations))).one()
            added = _from_row(row)
            await self._write_audit(connection, "credential.revoke", actor, after=_snapshot(added))
        self._directory.invalidate_subject(subject, token_id)
        self._events.emit(CredentialRevoked(subject=subject, credential_id=token_id))
        return added

    async def remove(self, *, subject: str | None = None, token_id: str | None = None, actor: Actor = SYSTEM) -> bool:
        """Take a revocation back: what it refused is valid again. Returns whether there was one.

        Raises:
            ConfigurationError: not exactly one of ``subject`` and ``token_id`` is given.
            InvalidSubjectError: it is empty, too long, or has characters that cannot be printed.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("taking a revocation back")
        kind, value = _target(subject, token_id)
        found = (revocations.c.kind == kind) & (revocations.c.value == value)
        async with self._control.transaction() as connection:
            row = (await connection.execute(delete(revocations).where(found).returning(revocations))).one_or_none()
            if row is None:
                return False
            await self._write_audit(connection, "credential.restore", actor, before=_snapshot(_from_row(row)))
        self._directory.invalidate_subject(subject, token_id)
        return True

    async def list(self, *, limit: int = 1_000) -> list[Revocation]:
        """Return the revocations in force, the newest first, ``limit`` at most.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("listing revocations")
        query = (
            select(revocations)
            .where(~_has_expired())
            .order_by(revocations.c.revoked_at.desc(), revocations.c.kind, revocations.c.value)
            .limit(limit)
        )
        async with self._control.connect() as connection:
            return [_from_row(row) for row in await connection.execute(query)]

    async def prune(self) -> int:
        """Remove the revocations that have expired, and return how many; for housekeeping.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("pruning revocations")
        async with self._control.transaction() as connection:
            return (await connection.execute(delete(revocations).where(_has_expired()))).rowcount

    async def _write_audit(
        self,
        connection: AsyncConnection,
        action: str,
        actor: Actor,
        *,
        before: dict[str, Any] | None = None,
        after: dict[str, Any] | None = None,
    ) -> None:
        await self._audit.append(connection, action=action, actor=actor, before=before, after=after)


def _has_expired() -> ColumnElement[bool]:
    return func.coalesce(revocations.c.expires_at <= func.now() - REVOCATION_MARGIN, False)


def _target(subject: str | None, token_id: str | None) -> tuple[RevocationKind, str]:
    if (subject is None) == (token_id is None):
        raise ConfigurationError("give either subject or token_id")
    if subject is not None:
        return "subject", check_subject(subject)
    return "token", check_subject(token_id, "a token_id")  # type: ignore[arg-type]  # the other one is None


def _check_expiry(moment: datetime | None) -> None:
    if moment is not None and moment.tzinfo is None:
        raise ConfigurationError("expires_at must be an aware datetime, such as datetime.now(UTC)")
    if moment is not None and moment <= datetime.now(UTC):
        raise ConfigurationError("expires_at is in the past")


def _from_row(row: Row[*tuple[Any, ...]]) -> Revocation:
    return Revocation(row.kind, row.value, row.revoked_at, row.expires_at, row.reason)


def _snapshot(revocation: Revocation) -> dict[str, Any]:
    return {
        revocation.kind: revocation.value,
        "revoked_at": revocation.revoked_at,
        "expires_at": revocation.expires_at,
        "reason": revocation.reason,
    }
