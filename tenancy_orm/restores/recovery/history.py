"""Which database a tenant had at a point in time, as the audit log says: a restore or a move has changed it since."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text

from ...control.database import ControlDatabase
from ...errors import RecoveryTargetError
from ...tenant import Tenant, placement_of

# what a tenant has left at its first switch after that time
_NEXT_SWITCH = text(
    "SELECT before->>'server' AS server, before->>'database' AS name FROM tenancy.audit_log "
    "WHERE tenant_id = :tenant AND occurred_at > :target AND before->>'database' IS NOT NULL "
    "AND after->>'database' IS NOT NULL ORDER BY occurred_at, sequence LIMIT 1"
)


def check_target(text: str | datetime) -> datetime:
    """Read the time that a tenant is brought back to.

    Args:
        text: ISO 8601 with its offset from UTC, ``2026-11-28 14:03+00`` or ``2026-11-28T15:03:20+01:00``; or an aware
            datetime.

    Raises:
        RecoveryTargetError: it is no time, has no offset, or is in the future.
    """
    if isinstance(text, str):
        try:
            target = datetime.fromisoformat(text.strip())
        except ValueError:
            raise RecoveryTargetError(
                f"{text!r} is not a time: write it with its offset from UTC, such as '2026-11-28 14:03+00'"
            ) from None
    else:
        target = text
    if target.utcoffset() is None:
        raise RecoveryTargetError(
            f"{str(text)!r} does not say in which time zone: write its offset from UTC, such as "
            f"'{target.isoformat(sep=' ')}+00'"
        )
    if target >= datetime.now(UTC):
        raise RecoveryTargetError(f"{target.isoformat()} is in the future")
    return target.astimezone(UTC)


async def database_at(control: ControlDatabase, tenant: Tenant, target: datetime) -> tuple[str, str]:
    """Return the server and the name of the database that a tenant had at a time.

    Where the entries of that time were removed from the audit log, it is the present one, which may not be the
    tenant's at that time: the marker of what is recovered says.

    Raises:
        RecoveryTargetError: the tenant was not made yet.
        TenantNotFoundError: it has been purged.
    """
    place = placement_of(tenant)
    if tenant.created_at is not None and target < tenant.created_at:
        raise RecoveryTargetError(
            f"tenant {tenant.slug!r} was created at {tenant.created_at.isoformat()}, after {target.isoformat()}"
        )
    async with control.connect() as connection:
        row = (await connection.execute(_NEXT_SWITCH, {"tenant": tenant.id, "target": target})).one_or_none()
    return (place.server, place.database) if row is None else (row.server, row.name)


__all__ = ["check_target", "database_at"]
