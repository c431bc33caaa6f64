"""Rows of invitations as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Row

InvitationState = Literal["pending", "accepted", "expired", "withdrawn"]


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation. Times are aware datetimes in UTC.

    ``text`` is what its bearer presents, available where it was made only; else None. ``email`` is for people to read
    in a list: whoever has the text may accept it.
    """

    id: UUID
    tenant_id: UUID
    roles: frozenset[str]
    created_at: datetime
    expires_at: datetime
    email: str | None = None
    accepted_at: datetime | None = None
    accepted_by: str | None = None
    withdrawn_at: datetime | None = None
    text: str | None = field(default=None, repr=False)

    @property
    def state(self) -> InvitationState:
        """Its state now."""
        if self.accepted_at is not None:
            return "accepted"
        if self.withdrawn_at is not None:
            return "withdrawn"
        return "expired" if self.expires_at <= datetime.now(UTC) else "pending"


def invitation_from_row(row: Row[*tuple[Any, ...]], *, text: str | None = None) -> Invitation:
    """Build the value object from a row of the table, with or without its digest."""
    return Invitation(
        id=row.id,
        tenant_id=row.tenant_id,
        roles=frozenset(row.roles),
        created_at=row.created_at,
        expires_at=row.expires_at,
        email=row.email,
        accepted_at=row.accepted_at,
        accepted_by=row.accepted_by,
        withdrawn_at=row.withdrawn_at,
        text=text,
    )


def invitation_snapshot(invitation: Invitation) -> dict[str, Any]:
    """Return an invitation's fields for the audit log: neither its secret nor the address of a person."""
    return {
        "invitation_id": str(invitation.id),
        "roles": sorted(invitation.roles),
        "expires_at": invitation.expires_at,
    }
