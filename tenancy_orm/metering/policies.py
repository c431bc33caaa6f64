"""Tier policies: propose, or apply, a higher tier for tenants that have been near a limit for some time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM
from ..audit.log import AuditLog
from ..config import TenancyConfig, TierPolicy
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..events import EventBus, TierChangeProposed
from ..postgres.errors import without_detail
from ..tenants.manager import TenantManager

logger = logging.getLogger("tenancy_orm.tiers")

# after this time another process may change the tier: far longer than the change can take
_CLAIM_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class TierProposal:
    """A higher tier that a policy proposes for a tenant; ``applied`` tells whether the tier was changed."""

    tenant_id: UUID
    slug: str
    tier: str
    proposed: str
    resource: str
    used: int
    limit: int
    since: datetime
    applied: bool


class TierPolicies:
    """Evaluates the configured tier policies; ``tenancy.internals.tier_policies``.

    ``run_housekeeping`` evaluates them too.

    Safe to run from many processes at once: each proposal is made by one of them. If a process dies while it applies a
    tier, the first evaluation after ten minutes applies it.

    Args:
        control: The control database.
        config: Gives the policies and the order of the tiers.
        events: Emits an event for each proposal.
        audit: Records each proposal.
        tenants: Changes the tiers.
    """

    def __init__(
        self,
        control: ControlDatabase,
        config: TenancyConfig,
        events: EventBus,
        audit: AuditLog,
        tenants: TenantManager,
    ) -> None:
        self._next_tiers = dict(pairwise(config.tiers))
        self._control = control
        self._events = events
        self._audit = audit
        self._policies = config.metering.tier_policies
        self._tenants = tenants

    async def evaluate(self, *, at: datetime | None = None) -> list[TierProposal]:
        """Evaluate all policies once; returns the proposals made now.

        A policy proposes a tier for a tenant once, for as long as the tenant stays in its tier and near the limit. A
        tier that could not be applied is tried again by every evaluation.

        Args:
            at: The time of the evaluation; the database's clock where None.

        Raises:
            ControlUnavailableError: the control database does not answer.
        """
        refuse_while_bound("evaluating tier policies")
        proposals: list[TierProposal] = []
        for policy in self._policies:
            async with self._control.transaction() as connection:
                parameters = {
                    "policy": policy.name,
                    "resource": policy.resource,
                    "fraction": policy.fraction,
                    "seconds": policy.sustained.total_seconds(),
                    "apply": policy.apply,
                    "at": at,
                }
                rows = (await connection.execute(_RECORD_PRESSURE, parameters)).all()
            for row in rows:
                target = policy.next_tier.get(row.tier) or (
                    None if policy.next_tier else self._next_tiers.get(row.tier)
                )
                if target is not None and (found := await self._propose(policy, row, target, at)):
                    proposals.append(found)
        return proposals

    async def _propose(self, policy: TierPolicy, row: Any, target: str, at: datetime | None) -> TierProposal | None:
        claim_key = {"tenant_id": row.tenant_id, "policy": policy.name, "tier": row.tier}
        async with self._control.transaction() as connection:
            claim = {**claim_key, "apply": policy.apply, "at": at, "seconds": _CLAIM_SECONDS}
            claimed = (await connection.execute(_CLAIM, claim)).one_or_none()
            if claimed is None:
                return None  # another process has just made it
            if claimed.first:
                await self._audit_proposal(connection, policy, row, target)
        # success needs no update of the claim: it is removed when the tenant leaves the tier
        applied = policy.apply and await self._apply(row, target, claim_key)
        if claimed.first or applied:
            self._events.emit(
                TierChangeProposed(
                    tenant_id=row.tenant_id,
                    slug=row.slug,
                    resource=policy.resource,
                    tier=row.tier,
                    proposed=target,
                    applied=applied,
                )
            )
        return TierProposal(
            row.tenant_id, row.slug, row.tier, target, policy.resource, row.used, row.amount_limit, row.since, applied
        )

    async def _audit_proposal(self, connection: AsyncConnection, policy: TierPolicy, row: Any, target: str) -> None:
        await self._audit.append(
            connection,
            action="tier.propose",
            tenant_id=row.tenant_id,
            slug=row.slug,
            before={"tier": row.tier},
            after={"tier": target},
            detail={
                "policy": policy.name,
                "resource": policy.resource,
                "used": row.used,
                "limit": row.amount_limit,
                "since": row.since,
            },
        )

    async def _apply(self, row: Any, target: str, claim_key: Mapping[str, Any]) -> bool:
        try:
            await self._tenants.update(row.tenant_id, tier=target, expected_tier=row.tier, actor=SYSTEM)
        except Exception as exc:
            # whatever it is, the other tenants must not be affected; the next evaluation tries again
            logger.error("tenant %s could not be changed to tier %s", row.slug, target, exc_info=without_detail(exc))
            async with self._control.transaction() as connection:
                await connection.execute(_UNCLAIM, claim_key)
            return False
        return True


_RECORD_PRESSURE = text(
    "SELECT * FROM tenancy.quota_update_pressure(:policy, :resource, CAST(:fraction AS double precision), "
    "CAST(:seconds AS double precision), CAST(:apply AS boolean), CAST(:at AS timestamptz))"
)
# found is the row before the update, read after its lock was granted: whether this is the first claim
_CLAIM = text(
    "WITH found AS (SELECT proposed_at FROM tenancy.quota_pressure "
    "WHERE tenant_id = :tenant_id AND policy = :policy AND tier = :tier "
    "AND (CAST(:apply AS boolean) OR proposed_at IS NULL) "
    "AND (claimed_until IS NULL OR claimed_until <= coalesce(CAST(:at AS timestamptz), now())) FOR UPDATE) "
    "UPDATE tenancy.quota_pressure AS p SET proposed_at = coalesce(p.proposed_at, now()), claimed_until = "
    "CASE WHEN :apply THEN coalesce(CAST(:at AS timestamptz), now()) + make_interval(secs => :seconds) END "
    "FROM found WHERE p.tenant_id = :tenant_id AND p.policy = :policy "
    "RETURNING found.proposed_at IS NULL AS first"
)
_UNCLAIM = text(
    "UPDATE tenancy.quota_pressure SET claimed_until = NULL "
    "WHERE tenant_id = :tenant_id AND policy = :policy AND tier = :tier"
)
