"""``Planner``: proposes which tenants should be on other servers, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text

from ..config import TenancyConfig
from ..config.placement import FewestTenants, PlacementCandidate, PlacementRequest, rate
from ..control.database import ControlDatabase
from ..control.models import tenants
from ..registry.rows import TENANT_COLUMNS, tenant_from_row
from ..servers.placement import Placer
from ..servers.rows import ServerRow, list_servers
from ..tenant import Status, Tenant

_TOLERANCE = 0.1
"""A server that holds so much more than its share is left as it is."""

_SIZES = text(
    "SELECT DISTINCT ON (tenant_id) tenant_id, size_bytes FROM tenancy.tenant_metrics "
    "ORDER BY tenant_id, sampled_at DESC"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMove:
    """One move of a plan.

    Attributes:
        tenant: The tenant.
        moved_from: The server that it is on.
        moved_to: The server that it should be on; None: placement chooses.
        size_bytes: The size of its database when it was last sampled; None where it was not.
        reason: Why.
    """

    tenant: Tenant
    moved_from: str
    moved_to: str | None
    size_bytes: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What a server holds, before and after a plan.

    Attributes:
        server: Its name.
        state: "active" or "drain".
        weight: Its share of the tenants, in proportion to the weights of the others.
        capacity: How many tenants it may hold; None: any number.
        tenants: How many it holds.
        tenants_after: How many it would hold.
        size_bytes: What their databases took when they were last sampled.
        size_bytes_after: What they would take.
    """

    server: str
    state: str
    weight: float
    capacity: int | None
    tenants: int
    tenants_after: int
    size_bytes: int
    size_bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePlan:
    """Which tenants should be on other servers.

    Attributes:
        moves: The moves, the most urgent first.
        servers: The servers, before and after.
        stuck: Tenants that should be moved and that no server takes, by slug, each with the reason.
    """

    moves: tuple[PlannedMove, ...]
    servers: tuple[ServerLoad, ...]
    stuck: dict[str, str]


@dataclass(slots=True)
class _Load:
    row: ServerRow
    tenants: dict[Tenant, int]

    @property
    def size(self) -> int:
        return sum(self.tenants.values())


class Planner:
    """Proposes moves.

    Args:
        control: The control database.
        placer: Knows the servers that this process has the addresses of.
        config: ``placement`` is read from it.
    """

    def __init__(self, control: ControlDatabase, placer: Placer, config: TenancyConfig) -> None:
        self._control = control
        self._policy = config.placement or FewestTenants()
        self._by_size = getattr(self._policy, "needs_sizes", True)

    async def plan(self, *, limit: int) -> MovePlan:
        """Return a plan of at most ``limit`` moves."""
        loads, sizes = await self._read()
        before = {name: (len(load.tenants), load.size) for name, load in loads.items()}
        moves: list[PlannedMove] = []
        stuck: dict[str, str] = {}
        for source, tenant, reason in self._must_move(loads):
            if len(moves) >= limit:
                break
            await self._place(loads, source, tenant, sizes, reason, moves, stuck)
        while len(moves) < limit and (found := await self._uneven(loads, sizes)) is not None:
            moves.append(found)
            self._apply(loads, found)
        return MovePlan(
            moves=tuple(moves),
            servers=tuple(
                ServerLoad(
                    server=name,
                    state=load.row.state,
                    weight=load.row.weight,
                    capacity=load.row.capacity,
                    tenants=before[name][0],
                    tenants_after=len(load.tenants),
                    size_bytes=before[name][1],
                    size_bytes_after=load.size,
                )
                for name, load in loads.items()
            ),
            stuck=stuck,
        )

    async def _read(self) -> tuple[dict[str, _Load], dict[Any, int]]:
        loads = {row.name: _Load(row, {}) for row in await list_servers(self._control)}
        async with self._control.connect() as connection:
            sizes = {row.tenant_id: int(row.size_bytes) for row in await connection.execute(_SIZES)}
            movable = tenants.c.status.not_in((Status.PURGED, Status.PROVISIONING))
            for row in await connection.execute(select(*TENANT_COLUMNS).where(movable).order_by(tenants.c.id)):
                tenant = tenant_from_row(row)
                if tenant.placement is not None and tenant.placement.server in loads:
                    loads[tenant.placement.server].tenants[tenant] = sizes.get(tenant.id, 0)
        return loads, sizes

    def _must_move(self, loads: dict[str, _Load]) -> Iterator[tuple[str, Tenant, str]]:
        """Those of servers in drain or above their capacity; small ones first."""
        for name, load in loads.items():
            if load.row.state == "drain":
                for tenant in sorted(load.tenants, key=lambda one: load.tenants[one]):
                    yield name, tenant, f"{name} is in drain"
        for name, load in loads.items():
            row = load.row
            if row.state == "drain" or row.capacity is None:
                continue
            held = len(load.tenants)
            for tenant in sorted(load.tenants, key=lambda one: load.tenants[one])[: max(held - row.capacity, 0)]:
                yield name, tenant, f"{name} holds {held} tenants, and may hold {row.capacity}"

    async def _place(
        self,
        loads: dict[str, _Load],
        source: str,
        tenant: Tenant,
        sizes: dict[Any, int],
        reason: str,
        moves: list[PlannedMove],
        stuck: dict[str, str],
    ) -> None:
        best, refusals = await self._best(loads, source, tenant)
        if best is None:
            stuck[tenant.slug] = f"{reason}; " + "; ".join(f"{name} {why}" for name, why in refusals.items())
            return
        found = PlannedMove(
            tenant=tenant, moved_from=source, moved_to=best, size_bytes=sizes.get(tenant.id), reason=reason
        )
        moves.append(found)
        self._apply(loads, found)

    async def _best(self, loads: dict[str, _Load], source: str, tenant: Tenant) -> tuple[str | None, dict[str, str]]:
        """Return the server that the policy prefers of those that take the tenant, and why the others do not."""
        request = PlacementRequest(tier=tenant.tier, region=tenant.region, slug=tenant.slug, metadata=tenant.metadata)
        scores: list[tuple[tuple[float, ...], str]] = []
        refusals: dict[str, str] = {}
        for name, load in loads.items():
            if name == source:
                continue
            if (why := _refusal(load, tenant)) is not None:
                refusals[name] = why
                continue
            verdict = await rate(self._policy, _candidate(load), request)
            if isinstance(verdict, str):
                refusals[name] = verdict
            else:
                scores.append((verdict if isinstance(verdict, tuple) else (verdict,), name))
        return (min(scores)[1] if scores else None), refusals

    async def _uneven(self, loads: dict[str, _Load], sizes: dict[Any, int]) -> PlannedMove | None:
        """Return the next move from the server that is most above its share; None where all are near theirs."""
        active = [load for load in loads.values() if load.row.state == "active"]
        total, weights = sum(map(self._amount, active)), sum(load.row.weight for load in active)
        if not total or len(active) < 2:
            return None
        shares = {load.row.name: total * load.row.weight / weights for load in active}
        for load in sorted(active, key=lambda one: self._amount(one) / shares[one.row.name], reverse=True):
            name, share = load.row.name, shares[load.row.name]
            excess = self._amount(load) - share
            if excess <= _TOLERANCE * share:
                return None
            # the one that brings it nearest to its share, and no further
            fitting = [one for one in load.tenants if 0 < self._amount_of(load, one) <= excess]
            for tenant in sorted(fitting, key=lambda one: self._amount_of(load, one), reverse=True):
                best, _ = await self._best(loads, name, tenant)
                if best is None or loads[best].row.name not in shares:
                    continue
                room = shares[best] - self._amount(loads[best])
                if room < self._amount_of(load, tenant) / 2:
                    continue
                what = "of the bytes" if self._by_size else "of the tenants"
                reason = (
                    f"{name} holds {self._amount(load) / total:.0%} {what}, and its weight is "
                    f"{load.row.weight / weights:.0%}; {best} holds {self._amount(loads[best]) / total:.0%}"
                )
                return PlannedMove(
                    tenant=tenant, moved_from=name, moved_to=best, size_bytes=sizes.get(tenant.id), reason=reason
                )
        return None

    def _amount(self, load: _Load) -> float:
        return float(load.size if self._by_size else len(load.tenants))

    def _amount_of(self, load: _Load, tenant: Tenant) -> float:
        return float(load.tenants[tenant] if self._by_size else 1)

    @staticmethod
    def _apply(loads: dict[str, _Load], move: PlannedMove) -> None:
        assert move.moved_to is not None  # noqa: S101 - for the type checker: a plan names every server
        loads[move.moved_to].tenants[move.tenant] = loads[move.moved_from].tenants.pop(move.tenant)


def _refusal(load: _Load, tenant: Tenant) -> str | None:
    row = load.row
    if row.state != "active":
        return "is in drain"
    if tenant.region is not None and row.region != tenant.region:
        return f"is not in region {tenant.region}"
    if row.capacity is not None and len(load.tenants) >= row.capacity:
        return "is full"
    return None


def _candidate(load: _Load) -> PlacementCandidate:
    row = load.row
    return PlacementCandidate(
        name=row.name,
        region=row.region,
        labels=row.labels,
        weight=row.weight,
        capacity=row.capacity,
        tenants=len(load.tenants),
        size_bytes=load.size,
    )


__all__ = ["MovePlan", "PlannedMove", "Planner", "ServerLoad"]
