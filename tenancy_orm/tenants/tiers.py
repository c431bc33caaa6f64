"""The tiers in force: those of the registry, which the database and every process use.

They come from the configuration, but not simply from the process that started last: a command that runs in another
directory, or an old process that restarts during a deployment, must not change customers' limits. A command of its own
(``tenancy init``, ``tenancy tiers apply``) applies them, and is audited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit.actor import SYSTEM, Actor
from ..audit.log import AuditLog
from ..config import Tier
from ..context import refuse_while_bound
from ..control.database import ControlDatabase
from ..control.models import tenants, tiers


@dataclass(frozen=True, slots=True)
class TierChanges:
    """Names of tiers that were added, changed and removed. ``kept`` ones are not configured, but tenants have them."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether anything was changed."""
        return bool(self.added or self.changed or self.removed)


class TierRegistry:
    """Reads and applies the tiers in force; ``tenancy.tiers``."""

    def __init__(self, control: ControlDatabase, audit: AuditLog) -> None:
        self._control = control
        self._audit = audit

    async def in_force(self) -> dict[str, dict[str, Any]]:
        """Return the limits of each tier, as JSON values, in ascending order of the tiers."""
        return (await self.limits_and_weights())[0]

    async def weights(self) -> dict[str, float]:
        """Return the weight of each tier, by which its tenants share connections."""
        return (await self.limits_and_weights())[1]

    async def limits_and_weights(self) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
        """Return both, as ``in_force`` and ``weights``, by one query."""
        async with self._control.connect() as connection:
            return await _read(connection)

    async def apply(self, configured: Mapping[str, Tier], *, actor: Actor = SYSTEM) -> TierChanges:
        """Put the configured tiers in force, in every process at once.

        A tier that is no longer configured is removed, unless tenants have it: change their tier first.

        Args:
            configured: Tiers, in ascending order.
            actor: Who does this, for the audit log.
        """
        refuse_while_bound("changing the tiers in force")
        async with self._control.transaction() as connection:
            # one call at a time: two configurations must not be mixed
            await connection.execute(select(tiers.c.name).order_by(tiers.c.name).with_for_update())
            before, weights = await _read(connection)
            await write_tiers(connection, configured)
            changes = await _drop_others(connection, before, configured, weights)
            if changes:
                after = await _read(connection)
                await self._audit.append(
                    connection,
                    action="tiers.apply",
                    actor=actor,
                    before=_with_weights(before, weights),
                    after=_with_weights(*after),
                )
        return changes


def differing(
    in_force: Mapping[str, Mapping[str, Any]],
    configured: Mapping[str, Tier],
    weights: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Return the names of configured tiers that differ from those in force, in limits or in their ``weights``."""
    return tuple(
        name
        for name, tier in configured.items()
        if in_force.get(name) != limits_of(tier) or (weights is not None and weights.get(name) != tier.weight)
    )


def limits_of(tier: Tier) -> dict[str, Any]:
    """Return a tier's limits as the registry stores them."""
    return {
        name: {"amount": limit.amount, "period": limit.period, "soft": list(limit.soft)}
        for name, limit in tier.limits.items()
    }


async def write_tiers(connection: AsyncConnection, configured: Mapping[str, Tier]) -> None:
    """Insert or update the tiers that differ from the configuration."""
    for rank, tier in enumerate(configured.values()):
        statement = insert(tiers).values(name=tier.name, rank=rank, limits=limits_of(tier), weight=tier.weight)
        changes = {name: getattr(statement.excluded, name) for name in ("rank", "limits", "weight")}
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["name"],
                set_=changes,
                where=or_(*(tiers.c[name] != value for name, value in changes.items())),
            )
        )


async def _read(connection: AsyncConnection) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the limits and the weights of the tiers, in ascending order."""
    query = select(tiers.c.name, tiers.c.limits, tiers.c.weight).order_by(tiers.c.rank, tiers.c.name)
    rows = (await connection.execute(query)).all()
    return {row.name: dict(row.limits) for row in rows}, {row.name: row.weight for row in rows}


def _with_weights(limits: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    # no resource has a name with a space
    return {name: {**found, "connection weight": weights[name]} for name, found in limits.items()}


async def _drop_others(
    connection: AsyncConnection,
    before: Mapping[str, Any],
    configured: Mapping[str, Tier],
    weights: Mapping[str, float],
) -> TierChanges:
    unused = ~select(tenants.c.id).where(tenants.c.tier == tiers.c.name).exists()
    gone = delete(tiers).where(tiers.c.name.not_in(configured), unused).returning(tiers.c.name)
    removed = set(await connection.scalars(gone))
    kept = [name for name in before if name not in configured and name not in removed]
    for position, name in enumerate(kept):
        # after the configured ones, in their previous order
        rank = len(configured) + position
        await connection.execute(update(tiers).where(tiers.c.name == name, tiers.c.rank != rank).values(rank=rank))
    return TierChanges(
        added=tuple(name for name in configured if name not in before),
        changed=tuple(name for name in differing(before, configured, weights) if name in before),
        removed=tuple(sorted(removed)),
        kept=tuple(kept),
    )
