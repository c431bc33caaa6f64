"""``Placer``: chooses the server of a new tenant, and explains the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from ..config import TenancyConfig
from ..config.placement import FewestTenants, PlacementCandidate, PlacementRequest, rate
from ..control.database import ControlDatabase
from ..errors import PlacementError
from .live import Servers
from .rows import ServerRow, list_servers

_DEFAULT: Final = "default"
# as the setting has them
_SETTINGS: Final = {
    "FewestTenants": "fewest_tenants",
    "LeastBytes": "least_bytes",
    "ByRegion": "by_region",
    "ByTier": "by_tier",
}
# the newest sample of each tenant
_SIZES = text(
    "SELECT t.server, sum(m.size_bytes)::bigint AS size_bytes FROM tenancy.tenants AS t CROSS JOIN LATERAL ("
    "SELECT size_bytes FROM tenancy.tenant_metrics WHERE tenant_id = t.id ORDER BY sampled_at DESC LIMIT 1) AS m "
    "WHERE t.status <> 'purged' GROUP BY t.server"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerVerdict:
    """What was found of one server.

    Attributes:
        server: Its name.
        region: Where it is.
        tenants: How many tenants it holds; None where that was not counted.
        capacity: How many it may hold; None: any number.
        score: The policy's score, of which the lowest wins; None where it was refused or not rated.
        refused: Why it takes the tenant not; None where it would.
        chosen: Whether it is the one.
    """

    server: str
    region: str | None
    tenants: int | None
    capacity: int | None
    score: tuple[float, ...] | None = None
    refused: str | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementExplanation:
    """Which server a tenant would be placed on now, and why.

    Attributes:
        request: The tenant.
        rule: What decided: an argument, ``default_server``, a policy.
        chosen: The server; None where none takes it.
        current: The server that an existing tenant is on.
        servers: What was found of each server, by name.
    """

    request: PlacementRequest
    rule: str
    chosen: str | None
    current: str | None
    servers: tuple[ServerVerdict, ...]


class Placer:
    """Chooses the server of a new tenant.

    Args:
        config: ``placement`` and ``default_server``.
        control: The control database.
        servers: The servers that this process knows the addresses of.
    """

    def __init__(self, config: TenancyConfig, control: ControlDatabase, servers: Servers) -> None:
        self._control = control
        self._servers = servers
        self._default = config.default_server
        self._policy = config.placement

    @property
    def decides_again(self) -> bool:
        """Whether another server may be chosen where the first has no room any more."""
        return self._policy is not None

    async def choose(self, request: PlacementRequest, *, server: str | None = None) -> str:
        """Return the name of the server for a new tenant. The control database checks it again.

        Args:
            request: The tenant.
            server: The one that was asked for.

        Raises:
            PlacementError: the one that was asked for does not take it, no server does, or nothing says which of
                several.
            UnknownServerError: there is none of this name.
            ControlUnavailableError: the control database does not answer.
        """
        if self._policy is None or server is not None:
            # what this process knows; it costs no query
            rows = [
                found.row or ServerRow(name=name, host=found.host, port=found.port)
                for name, found in self._servers.items()
            ]
            chosen = self._servers[server].name if server is not None else self._by_rule(rows, request)[0]
            row = next((row for row in rows if row.name == chosen), None)
            if row is not None and (refused := _refusal(row, request)) is not None:
                raise self._refused(row, refused, request, asked=server is not None)
            return chosen
        explained = await self.explain(request)
        if explained.chosen is None:
            reasons = {found.server: found.refused or "" for found in explained.servers}
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise PlacementError(
                f"no server takes a tenant {_described(request)} ({listed or 'there is none'})", reasons
            )
        return explained.chosen

    async def explain(
        self, request: PlacementRequest, *, server: str | None = None, current: str | None = None
    ) -> PlacementExplanation:
        """Return what is found of each server, and which would be chosen.

        Args:
            request: The tenant.
            server: The one that is asked for.
            current: The server that an existing tenant is on; it does not count there, since it is counted already.

        Raises:
            ControlUnavailableError: the control database does not answer.
            ConfigurationError: the policy returned what is no verdict.
        """
        rows = await list_servers(self._control)
        rule, only = "", None
        if server is not None:
            rule, only = f"server {server} is asked for", server
        elif self._policy is None:
            try:
                only, rule = self._by_rule([row for row in rows if row.name in self._servers], request)
            except PlacementError as exc:
                rule, only = str(exc), ""
        policy = self._policy or FewestTenants()
        if only is None:
            rule = f"policy {_name_of(policy)}"
        sizes = await self._sizes() if only is None and getattr(policy, "needs_sizes", True) else {}
        verdicts = []
        for row in rows:
            refused = _refusal(row, request, arrives=row.name != current)
            score = None
            if refused is None and row.name not in self._servers:
                refused = "this process does not know its address"
            if refused is None and only is not None and row.name != only:
                refused = f"not chosen: {rule}" if only else "not chosen"
            if refused is None and only is None:
                verdict = await rate(policy, _candidate(row, sizes.get(row.name, 0), row.name == current), request)
                refused = verdict if isinstance(verdict, str) else None
                score = None if isinstance(verdict, str) else verdict if isinstance(verdict, tuple) else (verdict,)
            verdicts.append((row, score, refused))
        takers = [
            (score or (0.0,), (row.tenants or 0) / row.weight, row.name) for row, score, no in verdicts if no is None
        ]
        chosen = min(takers)[2] if takers else None
        if chosen is None and only:
            # the rule has chosen a server that does not take it: that is the reason
            rule = next((f"server {only} {no}" for row, _, no in verdicts if row.name == only), rule)
        return PlacementExplanation(
            request=request,
            rule=rule,
            chosen=chosen,
            current=current,
            servers=tuple(
                ServerVerdict(
                    server=row.name,
                    region=row.region,
                    tenants=row.tenants,
                    capacity=row.capacity,
                    score=score,
                    refused=refused,
                    chosen=row.name == chosen,
                )
                for row, score, refused in verdicts
            ),
        )

    def _by_rule(self, rows: Sequence[ServerRow], request: PlacementRequest) -> tuple[str, str]:
        """Return the server without a policy, and what decides."""
        names = [row.name for row in rows if request.region is None or row.region == request.region]
        if self._default is not None and (request.region is None or self._default in names):
            return self._default, f"default_server is {self._default}"
        where = "" if request.region is None else f" in region {request.region}"
        if len(names) == 1:
            return names[0], f"{names[0]} is the only server{where}"
        if _DEFAULT in names:
            return _DEFAULT, "where default_server is not set, it is the server called default"
        if not names:
            raise PlacementError(f"there is no server{where}; add one: tenancy servers add")
        raise PlacementError(
            f"there are several servers{where}, {', '.join(names)}: set default_server, or placement to a policy, or "
            "name the tenant's server (--server)"
        )

    def _refused(self, row: ServerRow, reason: str, request: PlacementRequest, *, asked: bool) -> PlacementError:
        if asked:
            remedy = "name another one"
        elif request.region is not None and not row.accepts_tenants:
            # default_server leads to no other server of a region that has this one alone
            remedy = f"end it: tenancy servers activate {row.name}; or add a server in region {request.region}"
        else:
            remedy = "set default_server to another one"
        return PlacementError(f"server {row.name!r} {reason}; {remedy}", {row.name: reason})

    async def _sizes(self) -> Mapping[str, int]:
        async with self._control.connect() as connection:
            return {row.server: row.size_bytes for row in await connection.execute(_SIZES)}


def _refusal(row: ServerRow, request: PlacementRequest, *, arrives: bool = True) -> str | None:
    """Why a server does not take a tenant, whatever the policy; None where it may."""
    if request.region is not None and row.region != request.region:
        where = "no region" if row.region is None else f"region {row.region}"
        return f"is in {where}, and the tenant belongs to region {request.region}"
    if not arrives:
        return None
    if not row.accepts_tenants:
        return "accepts no new tenants: it is in drain"
    if row.capacity is not None and row.tenants is not None and row.tenants >= row.capacity:
        return f"is full: it holds {row.tenants} tenants of {row.capacity}"
    return None


def _candidate(row: ServerRow, size_bytes: int, is_current: bool) -> PlacementCandidate:
    return PlacementCandidate(
        name=row.name,
        region=row.region,
        labels=row.labels,
        weight=row.weight,
        capacity=row.capacity,
        tenants=(row.tenants or 0) - is_current,
        size_bytes=size_bytes,
    )


def _described(request: PlacementRequest) -> str:
    return f"of tier {request.tier}" + ("" if request.region is None else f" and region {request.region}")


def _name_of(policy: object) -> str:
    name = getattr(policy, "__qualname__", None) or type(policy).__name__
    return _SETTINGS.get(name, name)


__all__ = ["PlacementExplanation", "Placer", "ServerVerdict"]
