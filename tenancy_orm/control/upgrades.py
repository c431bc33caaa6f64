"""Rules that propose, or apply, a higher tier to tenants that have been near a limit for some time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

from sqlalchemy import text

from ..config import TenancyConfig, UpgradePolicy
from ..errors import TenancyError
from ..events import EventBus, TierUpgradeProposed
from .audit import SYSTEM, Actor, AuditLog
from .database import ControlDatabase

logger = logging.getLogger("tenancy_orm.upgrades")

ChangeTier = Callable[[UUID, str, Actor], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class UpgradeProposal:
    """A tenant that a policy found; ``applied`` tells whether its tier was changed."""

    tenant_id: UUID
    slug: str
    tier: str
    proposed: str
    resource: str
    used: int
    limit: int
    since: datetime
    applied: bool


class Upgrades:
    """Evaluates ``TenancyConfig.upgrade_policies``; ``tenancy.upgrades``. ``run_maintenance`` does it too.

    Safe to run from many processes at once: each proposal is made by one of them.

    Args:
        control: The control database.
        config: For the policies, and the order of the tiers.
        events: Where proposals are announced.
        audit: Where they are written down.
        change_tier: Changes a tenant's tier, as ``TenantManager.update`` does.
    """

    def __init__(
        self,
        control: ControlDatabase,
        config: TenancyConfig,
        events: EventBus,
        audit: AuditLog,
        change_tier: ChangeTier,
    ) -> None:
        self._ladder = dict(pairwise(config.tiers))
        self._control = control
        self._events = events
        self._audit = audit
        self._policies = config.upgrade_policies
        self._change_tier = change_tier

    async def evaluate(self, *, at: datetime | None = None) -> list[UpgradeProposal]:
        """Look once; returns the proposals made now. A tenant is proposed once for as long as it stays near the limit.

        Args:
            at: The time to judge by; the database's clock where None.
        """
        proposals: list[UpgradeProposal] = []
        for policy in self._policies:
            async with self._control.transaction() as conn:
                parameters = {
                    "resource": policy.resource,
                    "fraction": policy.fraction,
                    "seconds": policy.sustained.total_seconds(),
                    "at": at,
                }
                rows = (await conn.execute(_NOTE, parameters)).all()
            for row in rows:
                target = policy.next_tier.get(row.tier) or (None if policy.next_tier else self._ladder.get(row.tier))
                if target is not None and (found := await self._propose(policy, row, target)):
                    proposals.append(found)
        return proposals

    async def _propose(self, policy: UpgradePolicy, row: Any, target: str) -> UpgradeProposal | None:
        claim = {"tenant_id": row.tenant_id, "resource": policy.resource, "fraction": policy.fraction}
        async with self._control.transaction() as conn:
            if await conn.scalar(_CLAIM, claim) is None:
                return None  # another process has just made it
            await self._audit.append(
                conn,
                action="tier.propose",
                tenant_id=row.tenant_id,
                slug=row.slug,
                before={"tier": row.tier},
                after={"tier": target},
                detail={"resource": policy.resource, "used": row.used, "limit": row.amount_limit, "since": row.since},
            )
        applied = policy.apply and await self._apply(row, target, claim)
        self._events.emit(
            TierUpgradeProposed(
                tenant_id=row.tenant_id,
                slug=row.slug,
                resource=policy.resource,
                tier=row.tier,
                proposed=target,
                applied=applied,
            )
        )
        return UpgradeProposal(
            row.tenant_id, row.slug, row.tier, target, policy.resource, row.used, row.amount_limit, row.since, applied
        )

    async def _apply(self, row: Any, target: str, claim: Mapping[str, Any]) -> bool:
        try:
            await self._change_tier(row.tenant_id, target, SYSTEM)
        except TenancyError as exc:
            # the next evaluation tries again
            logger.error("tenant %s could not be moved to tier %s: %s", row.slug, target, exc)
            async with self._control.transaction() as conn:
                await conn.execute(_UNCLAIM, claim)
            return False
        return True


_NOTE = text(
    "SELECT * FROM tenancy.quota_note_pressure(:resource, CAST(:fraction AS double precision), "
    "CAST(:seconds AS double precision), CAST(:at AS timestamptz))"
)
_CLAIM = text(
    "UPDATE tenancy.quota_pressure SET proposed_at = now() WHERE tenant_id = :tenant_id AND resource = :resource "
    "AND fraction = CAST(:fraction AS double precision) AND proposed_at IS NULL RETURNING true"
)
_UNCLAIM = text(
    "UPDATE tenancy.quota_pressure SET proposed_at = NULL WHERE tenant_id = :tenant_id AND resource = :resource "
    "AND fraction = CAST(:fraction AS double precision)"
)
