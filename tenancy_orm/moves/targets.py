"""The server that a tenant is moved to."""

from __future__ import annotations

from ..config.placement import PlacementRequest
from ..errors import PlacementError
from ..servers import Servers
from ..servers.placement import Placer
from ..tenant import Placement, Tenant


async def choose_target(placer: Placer, servers: Servers, tenant: Tenant, place: Placement, to: str | None) -> str:
    """Return the name of a server that takes the tenant.

    Args:
        placer: Knows what the servers take.
        servers: The servers.
        tenant: The tenant.
        place: Where it is.
        to: The one that was asked for; None: the one that the placement policy prefers.

    Raises:
        PlacementError: none takes it, or not the one that was asked for.
        UnknownServerError: there is no such server.
    """
    if to == place.server:
        raise PlacementError(f"tenant {tenant.slug!r} is on server {to!r} already", {to: "is where it is"})
    request = PlacementRequest(tier=tenant.tier, region=tenant.region, metadata=tenant.metadata)
    if to is not None:
        # a name that nobody knows is another error
        servers[to]
    explained = await placer.explain(request, server=to)
    takers = [one for one in explained.servers if one.refused is None and one.server != place.server]
    if takers:
        return min(takers, key=lambda one: (one.score or (0.0,), one.server)).server
    reasons = {one.server: one.refused or "is where it is" for one in explained.servers}
    listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items() if to is None or name == to)
    remedy = "" if to is not None else "; name its server: --to"
    raise PlacementError(f"tenant {tenant.slug!r} cannot be moved: {listed}{remedy}", reasons)


__all__ = ["choose_target"]
