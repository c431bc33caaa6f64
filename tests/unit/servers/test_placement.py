"""Which server a new tenant is placed on: the rule without a policy, the policies, and how one is written."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.config import (
    ByRegion,
    ByTier,
    FewestTenants,
    LeastBytes,
    PlacementCandidate,
    PlacementPolicy,
    PlacementRequest,
)
from tenancy_orm.config.placement import Verdict, rate
from tenancy_orm.errors import ConfigurationError, PlacementError, SettingError, UnknownServerError
from tenancy_orm.servers import Servers
from tenancy_orm.servers.placement import Placer
from tenancy_orm.servers.rows import ServerRow

URL = "postgresql://admin:hunter2@db.example/postgres"
FREE = PlacementRequest(tier="free")


def placer(*, rows: tuple[ServerRow, ...] = (), **settings: Any) -> Placer:
    """A placer that has no control database to ask."""
    config = TenancyConfig(control_url=URL, **settings)
    servers = Servers(config)
    for row in rows:
        servers[row.name].row = row
    return Placer(config, cast("Any", None), servers)


@pytest.mark.parametrize(
    ("servers", "default", "placed"),
    [
        (None, None, "default"),
        ({"eu": URL}, None, "eu"),
        ({"eu": URL, "default": URL}, None, "default"),
        ({"eu": URL, "default": URL}, "eu", "eu"),
        ({"eu": URL, "us": URL}, "us", "us"),
    ],
)
async def test_the_rule_without_a_policy(servers: Any, default: str | None, placed: str) -> None:
    """``default_server``, or the only one, or the one named "default"; a name that was asked for wins."""
    found = placer(servers=servers, default_server=default)
    assert await found.choose(FREE) == placed
    with pytest.raises(UnknownServerError):
        await found.choose(FREE, server="other")


async def test_no_server_is_chosen_in_silence() -> None:
    """Several, none of them the default: the error names the settings. Two settings that decide are refused."""
    with pytest.raises(PlacementError, match="there are several servers, eu, us: set default_server, or placement"):
        await placer(servers={"eu": URL, "us": URL}).choose(FREE)
    with pytest.raises(SettingError, match="default_server: contradicts placement"):
        placer(placement="fewest_tenants", default_server="default")


async def test_the_rule_holds_within_a_region() -> None:
    """A default elsewhere is none there; drain is respected."""
    rows = tuple(ServerRow(name=name, host="h", port=1, region=name[:2]) for name in ("eu1", "us1", "us2"))
    found = placer(rows=rows, servers=dict.fromkeys(("eu1", "us1", "us2"), URL), default_server="us1")
    assert await found.choose(PlacementRequest(tier="free", region="eu")) == "eu1"
    assert await found.choose(PlacementRequest(tier="free", region="us")) == "us1"
    with pytest.raises(PlacementError, match="there is no server in region asia"):
        await found.choose(PlacementRequest(tier="free", region="asia"))
    with pytest.raises(PlacementError, match="server 'us2' is in region us, and the tenant belongs to region eu"):
        await found.choose(PlacementRequest(tier="free", region="eu"), server="us2")
    drained = (ServerRow(name="eu", host="h", port=1, state="drain"),)
    with pytest.raises(PlacementError, match="server 'eu' accepts no new tenants: it is in drain; set default_server"):
        await placer(rows=drained, servers={"eu": URL}).choose(FREE)


def candidate(name: str, **values: Any) -> PlacementCandidate:
    return PlacementCandidate(name=name, **values)


SERVERS = [
    candidate("big", region="eu", labels={"disk": "nvme"}, weight=4, tenants=8, size_bytes=100),
    candidate("small", region="eu", tenants=2, size_bytes=50),
    candidate("far", region="us", tenants=0, size_bytes=0),
]


async def rated(policy: PlacementPolicy, request: PlacementRequest = FREE) -> dict[str, Verdict]:
    return {server.name: await rate(policy, server, request) for server in SERVERS}


async def test_policies_rate_servers() -> None:
    """By tenants, bytes, region and tier, in proportion to their weights; the lowest score wins."""
    assert await rated(FewestTenants()) == {"big": 9 / 4, "small": 3, "far": 1}
    assert await rated(LeastBytes()) == {"big": (25, 9 / 4), "small": (50, 3), "far": (0, 1)}
    assert await rated(ByRegion(("eu",))) == {
        "big": (0, 9 / 4),
        "small": (0, 3),
        "far": "it is in region us, not in eu",
    }
    us_first = await rated(ByRegion(["us", "eu"], then=LeastBytes()))
    assert us_first == {"far": (0, 0, 1), "big": (1, 25, 9 / 4), "small": (1, 50, 3)}
    # a tenant of a region is not a matter of preference
    assert (await rated(ByRegion("eu"), PlacementRequest(tier="free", region="us")))["far"] == 1
    tiers = ByTier({"enterprise": {"disk": "nvme"}, "pro": ["small"]})
    assert await rated(tiers, PlacementRequest(tier="enterprise")) == {
        "big": 9 / 4,
        "small": "it is not among those for tier enterprise",
        "far": "it is not among those for tier enterprise",
    }
    assert await rated(tiers) == {"big": "it is for tier enterprise", "small": "it is for tier pro", "far": 1}
    assert not tiers.needs_sizes and ByTier({"pro": "small"}, then=LeastBytes()).needs_sizes


async def test_a_function_is_a_policy() -> None:
    """Also a coroutine function; what returns neither a score nor text is an error that names it."""

    async def slow(server: PlacementCandidate, request: PlacementRequest) -> Verdict:
        return "no" if server.region == "us" else 1

    assert await rated(slow) == {"big": 1, "small": 1, "far": "no"}
    for verdict in (None, float("nan"), (1, "x")):

        def wrong(server: PlacementCandidate, request: PlacementRequest, verdict: Any = verdict) -> Any:
            return verdict

        with pytest.raises(ConfigurationError, match=r"wrong returned .*, neither a score nor text"):
            await rated(wrong)


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ("fewest_tenants", FewestTenants()),
        ("least-bytes", LeastBytes()),
        ("tenancy_orm.config:LeastBytes", LeastBytes()),
        ({"policy": "least_bytes"}, LeastBytes()),
        ({"policy": "by_region", "regions": ["eu", "us"]}, ByRegion(("eu", "us"))),
        ('{"policy": "by_region", "regions": "eu", "then": "least_bytes"}', ByRegion(("eu",), LeastBytes())),
        ({"policy": "by_tier", "tiers": {"pro": ["big"]}}, ByTier({"pro": ["big"]})),
        (None, None),
    ],
)
def test_a_policy_as_a_setting(written: Any, policy: PlacementPolicy | None) -> None:
    """As text, as a table, as JSON; a variable is text."""
    assert TenancyConfig(control_url=URL, placement=written).placement == policy
    if isinstance(written, str):
        assert TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, "TENANCY_PLACEMENT": written}).placement == policy


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("fewest", "'fewest' is not a policy: write fewest_tenants"),
        ("nowhere:policy", "cannot be loaded"),
        ("{", "is not JSON"),
        (3, "int is not a policy"),
        ({"policy": "by_name"}, "policy is 'by_name'"),
        ({"policy": "by_region"}, "by_region takes regions and then"),
        ({"policy": "by_region", "regions": []}, "needs one region"),
        ({"policy": "by_region", "regions": ["E U"]}, "not the name of a region"),
        ({"policy": "by_tier", "tiers": {}}, "for one tier at least"),
        ({"policy": "by_tier", "tiers": {"pro": 3}}, "names of servers, or labels"),
        ({"policy": "by_tier", "tiers": {"pro": ["a"]}, "x": 1}, "not x"),
    ],
)
def test_a_mistake_in_a_policy_is_named(written: Any, message: str) -> None:
    """The error names the setting."""
    with pytest.raises(SettingError, match="placement") as caught:
        TenancyConfig(control_url=URL, placement=written)
    assert message in str(caught.value)
