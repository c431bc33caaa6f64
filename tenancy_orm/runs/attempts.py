"""``UpgradeAttempts``: upgrades of single tenants before their use, each by one process; a failed one waits longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import text

from ..context import refuse_other_tenant, refuse_while_bound
from ..control.database import ControlDatabase
from ..jobs import CLAIM_SECONDS, Claimant

FIRST_PAUSE_SECONDS: Final = 60.0
"""How long a tenant is left alone after its upgrade has failed once; twice as long after each further failure."""

LAST_PAUSE_SECONDS: Final = 3_600.0

_CLAIM = text(
    "INSERT INTO tenancy.tenant_upgrades AS u (tenant_id, target, claim, host, claimed_until) "
    "VALUES (:tenant, :target, :claim, :host, clock_timestamp() + make_interval(secs => :seconds)) "
    "ON CONFLICT (tenant_id) DO UPDATE SET claim = excluded.claim, host = excluded.host, "
    "claimed_until = excluded.claimed_until, target = excluded.target, "
    # other revisions: what has failed says nothing about them
    "failures = CASE WHEN u.target = excluded.target THEN u.failures ELSE 0 END "
    "WHERE coalesce(u.claimed_until < clock_timestamp(), true) "
    "AND (u.target <> excluded.target OR coalesce(u.next_at <= clock_timestamp(), true)) RETURNING true"
)
_STATE = text(
    "SELECT coalesce(claimed_until >= clock_timestamp(), false) AS claimed, "
    "extract(epoch FROM next_at - clock_timestamp())::float8 AS pause "
    "FROM tenancy.tenant_upgrades WHERE tenant_id = :tenant"
)
_RENEW = text(
    "UPDATE tenancy.tenant_upgrades SET claimed_until = clock_timestamp() + make_interval(secs => :seconds) "
    "WHERE tenant_id = :tenant AND claim = :claim RETURNING true"
)
_FAIL = text(
    "UPDATE tenancy.tenant_upgrades SET claim = NULL, claimed_until = NULL, failures = failures + 1, "
    "error = :error, sqlstate = :sqlstate, failed_at = clock_timestamp(), next_at = clock_timestamp() + "
    "make_interval(secs => least(:last, :first * power(2, least(failures, 20)))) "
    "WHERE tenant_id = :tenant AND claim = :claim "
    "RETURNING extract(epoch FROM next_at - clock_timestamp())::float8"
)
_NOTE = text(
    "INSERT INTO tenancy.tenant_upgrades AS u (tenant_id, target, failures, error, sqlstate, failed_at, next_at) "
    "VALUES (:tenant, :target, 1, :error, :sqlstate, clock_timestamp(), "
    "clock_timestamp() + make_interval(secs => :first)) "
    "ON CONFLICT (tenant_id) DO UPDATE SET target = excluded.target, error = excluded.error, "
    "sqlstate = excluded.sqlstate, failed_at = excluded.failed_at, "
    "failures = CASE WHEN u.target = excluded.target THEN u.failures + 1 ELSE 1 END, "
    "next_at = clock_timestamp() + make_interval(secs => CASE WHEN u.target = excluded.target "
    "THEN least(:last, :first * power(2, least(u.failures, 20))) ELSE :first END) "
    "WHERE coalesce(u.claimed_until < clock_timestamp(), true)"
)
_WAITING = text(
    "SELECT tenant_id FROM tenancy.tenant_upgrades "
    "WHERE next_at > clock_timestamp() OR claimed_until >= clock_timestamp()"
)
_END = text("DELETE FROM tenancy.tenant_upgrades WHERE tenant_id = :tenant AND claim = :claim")
_RELEASE = text(
    "UPDATE tenancy.tenant_upgrades SET claim = NULL, claimed_until = NULL WHERE tenant_id = :tenant AND claim = :claim"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to ``claim``: granted; or how many seconds no process tries; or neither, while another one does it."""

    granted: bool
    pause: float | None = None


class UpgradeAttempts:
    """Claims the upgrades of single tenants, in the control database.

    Args:
        control: The control database.
        claimant: This process.
    """

    def __init__(self, control: ControlDatabase, claimant: Claimant) -> None:
        self._control = control
        self._claimant = claimant

    async def claim(self, tenant_id: UUID, target: str) -> Claim:
        """Claim the upgrade of a tenant to a revision, unless another process has it, or it has failed just now.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_other_tenant(tenant_id)
        values = {"tenant": tenant_id, "target": target, "claim": self._claimant.id, "host": self._claimant.host}
        async with self._control.connect() as connection:
            if await connection.scalar(_CLAIM, {**values, "seconds": CLAIM_SECONDS}):
                return Claim(granted=True)
            row = (await connection.execute(_STATE, {"tenant": tenant_id})).one_or_none()
        # without a row, or with one that has waited long enough by now, the next attempt to claim it will tell
        waits = row is not None and not row.claimed and row.pause is not None and row.pause > 0
        return Claim(granted=False, pause=row.pause if waits else None)  # type: ignore[union-attr]

    async def renew(self, tenant_id: UUID) -> bool:
        """Extend the claim; False if another process has it."""
        refuse_other_tenant(tenant_id)
        async with self._control.connect() as connection:
            return bool(await connection.scalar(_RENEW, {**self._mine(tenant_id), "seconds": CLAIM_SECONDS}))

    async def fail(self, tenant_id: UUID, error: str, sqlstate: str | None) -> float:
        """Record a failure, and return for how many seconds no process tries again."""
        refuse_other_tenant(tenant_id)
        values = {"error": error, "sqlstate": sqlstate, "first": FIRST_PAUSE_SECONDS, "last": LAST_PAUSE_SECONDS}
        async with self._control.connect() as connection:
            pause = await connection.scalar(_FAIL, {**self._mine(tenant_id), **values})
        return FIRST_PAUSE_SECONDS if pause is None else float(pause)

    async def note_failure(self, tenant_id: UUID, target: str, error: str, sqlstate: str | None) -> None:
        """Record the failure of an upgrade that was not claimed here, but in a run."""
        refuse_other_tenant(tenant_id)
        values = {"tenant": tenant_id, "target": target, "error": error, "sqlstate": sqlstate}
        async with self._control.connect() as connection:
            await connection.execute(_NOTE, {**values, "first": FIRST_PAUSE_SECONDS, "last": LAST_PAUSE_SECONDS})

    async def waiting(self) -> set[UUID]:
        """Return the tenants that are upgraded now, or left alone after a failure."""
        refuse_while_bound("listing the upgrades that have failed")
        async with self._control.connect() as connection:
            return set((await connection.scalars(_WAITING)).all())

    async def end(self, tenant_id: UUID) -> None:
        """Record that it is done: nothing of it remains."""
        refuse_other_tenant(tenant_id)
        async with self._control.connect() as connection:
            await connection.execute(_END, self._mine(tenant_id))

    async def release(self, tenant_id: UUID) -> None:
        """Let another process do it: this one was interrupted."""
        refuse_other_tenant(tenant_id)
        async with self._control.connect() as connection:
            await connection.execute(_RELEASE, self._mine(tenant_id))

    def _mine(self, tenant_id: UUID) -> dict[str, UUID]:
        return {"tenant": tenant_id, "claim": self._claimant.id}


__all__ = ["Claim", "UpgradeAttempts"]
