"""Samples of tenants' databases, sums over the registry, and the policies that propose a higher tier."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from tenancy_orm.config import Limit, Tier, UpgradePolicy
from tenancy_orm.context import Tenant
from tenancy_orm.control.audit import Actor
from tenancy_orm.control.metrics import STORAGE, StorageSampler, TenantMetrics
from tenancy_orm.control.upgrades import Upgrades
from tenancy_orm.errors import ConfigurationError, TenantNotFoundError
from tenancy_orm.events import QuotaThresholdReached, TierUpgradeProposed
from tests.support.postgres import Postgres
from tests.support.quotas import QuotaPlane, quota_plane

GIB = 1024**3
TIERS = {
    "free": Tier("free", {STORAGE: Limit(GIB), "users": Limit(10)}),
    "pro": Tier("pro", {STORAGE: Limit(10 * GIB), "users": Limit(100)}),
    "max": Tier("max", {"users": Limit(1_000)}),
}
NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[QuotaPlane]:
    async with quota_plane(control_url, tiers=TIERS) as opened:
        yield opened


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[str]:
    name = postgres.new_name("tenant")
    await postgres.create_database(name)
    yield name
    await postgres.drop_database(name)


async def place(plane: QuotaPlane, tenant: Tenant, database: str, server: str = "default") -> None:
    """Say that a tenant's data is in ``database``."""
    await plane.sql(
        "UPDATE tenancy.tenants SET database_name = :database, server = :server WHERE id = :id",
        database=database,
        server=server,
        id=tenant.id,
    )


# --- the sampler ----------------------------------------------------------------------------------------------------


async def test_the_sampler_records_size_connections_queries_and_errors(
    plane: QuotaPlane, postgres: Postgres, database: str
) -> None:
    """As PostgreSQL counts them; the size is the use of the storage quota."""
    tenant = await plane.tenant(quotas={STORAGE: 8_000_000})
    await place(plane, tenant, database)

    async def connect(server: str) -> asyncpg.Connection:
        assert server == "default"
        return await asyncpg.connect(postgres.admin_url)

    sampler = StorageSampler(plane.control, plane.quotas, connect)
    async with postgres.connect(database) as connection:
        await connection.execute("CREATE TABLE big AS SELECT repeat('x', 500) AS x FROM generate_series(1, 4000)")
        report = await sampler.run()
        size = await connection.fetchval("SELECT pg_database_size(current_database())")
    assert (report.sampled, report.unavailable) == (1, ())
    [sample] = await TenantMetrics(plane.control).history(tenant)
    assert sample.tenant_id == tenant.id and abs(sample.size_bytes - size) < 1_000_000
    assert sample.connections == 1 and sample.queries >= 0 and sample.errors == 0
    used = {usage.resource: usage.used for usage in await plane.quotas.usage(tenant)}
    assert used[STORAGE] == sample.size_bytes
    assert [event.fraction for event in plane.of(QuotaThresholdReached)] == [0.8, 1.0]
    [active] = await TenantMetrics(plane.control).active_tenants()
    assert (active.slug, active.sample) == ("acme", sample)


async def test_a_server_that_is_down_does_not_keep_the_others_from_being_sampled(
    plane: QuotaPlane, postgres: Postgres, database: str
) -> None:
    """It is named in the report."""
    await plane.control.synchronise({}, {"other": ("127.0.0.1", 1)})
    await place(plane, await plane.tenant("acme"), database)
    await place(plane, await plane.tenant("globex"), "gone", "other")
    await plane.tenant("initech")  # its database does not exist

    async def connect(server: str) -> asyncpg.Connection:
        return await asyncpg.connect(postgres.admin_url if server == "default" else "postgresql://x@127.0.0.1:1/x")

    report = await StorageSampler(plane.control, plane.quotas, connect).run()
    assert (report.sampled, report.unavailable) == (1, ("other",))


async def test_of_several_samplers_one_does_the_work(plane: QuotaPlane, postgres: Postgres, database: str) -> None:
    """The others see that it has been done."""
    await place(plane, await plane.tenant(), database)

    async def connect(_: str) -> asyncpg.Connection:
        return await asyncpg.connect(postgres.admin_url)

    sampler = StorageSampler(plane.control, plane.quotas, connect, chunk=1)
    assert (await sampler.run(unless_within=60)).sampled == 1
    assert (await sampler.run(unless_within=60)).sampled == 0
    assert (await sampler.run()).sampled == 1


async def test_a_tier_without_a_storage_limit_is_sampled_all_the_same(
    plane: QuotaPlane, postgres: Postgres, database: str
) -> None:
    """Its size is known, and counted against nothing."""
    tenant = await plane.tenant(tier="max")
    await place(plane, tenant, database)

    async def connect(_: str) -> asyncpg.Connection:
        return await asyncpg.connect(postgres.admin_url)

    assert (await StorageSampler(plane.control, plane.quotas, connect).run()).sampled == 1
    assert [usage.resource for usage in await plane.quotas.usage(tenant)] == ["users"]


async def test_samples_are_kept_for_so_long(plane: QuotaPlane) -> None:
    """Newest first, from a time on, and pruned."""
    tenant = await plane.tenant()
    await plane.sql(
        "INSERT INTO tenancy.tenant_metrics SELECT :id, now() - make_interval(days => n * 30), n, 0, 0, 0 "
        "FROM generate_series(0, 5) n",
        id=tenant.id,
    )
    metrics = TenantMetrics(plane.control)
    assert [sample.size_bytes for sample in await metrics.history(tenant.id)] == [0, 1, 2, 3, 4, 5]
    since = datetime.now(UTC) - timedelta(days=45)
    assert [sample.size_bytes for sample in await metrics.history(tenant, since=since)] == [0, 1]
    assert await metrics.prune(days=80) == 3
    assert len(await metrics.history(tenant, limit=2)) == 2


async def test_the_registry_is_summed_up_by_tier(plane: QuotaPlane) -> None:
    """In the order of their rank; purged tenants do not count, and tenants in use come in pages."""
    for number, tier in enumerate(("free", "free", "pro")):
        await plane.tenant(f"t{number}", tier=tier)
    await plane.sql("UPDATE tenancy.tenants SET status = 'suspended' WHERE slug = 't1'")
    metrics = TenantMetrics(plane.control)
    shares = {share.tier: (share.tenants, share.active, share.suspended) for share in await metrics.tier_distribution()}
    assert shares == {"free": (2, 1, 1), "pro": (1, 1, 0), "max": (0, 0, 0)}
    first = await metrics.active_tenants(limit=1)
    rest = await metrics.active_tenants(after=first[0].id)
    assert [tenant.slug for tenant in [*first, *rest]] == ["t0", "t2"]
    assert first[0].sample is None


# --- policies -------------------------------------------------------------------------------------------------------


def upgrades(plane: QuotaPlane, policy: UpgradePolicy, changed: list[tuple[UUID, str]] | None = None) -> Upgrades:
    """A policy, and what changes a tier in the registry."""

    async def change(tenant_id: UUID, tier: str, actor: Actor) -> None:
        if changed is None:
            raise TenantNotFoundError(tenant_id)
        await plane.registry.change(tenant_id, action="tenant.update", actor=actor, tier=tier)
        changed.append((tenant_id, tier))

    config = plane.config.replace(upgrade_policies=(policy,))
    return Upgrades(plane.control, config, plane.events, plane.audit, change)


THREE_DAYS = UpgradePolicy(resource=STORAGE, fraction=0.9, sustained=timedelta(days=3))


async def test_a_tenant_near_its_limit_for_long_enough_is_proposed_the_next_tier(plane: QuotaPlane) -> None:
    """Once, with an event and an audit entry; one that was near only for a moment is not."""
    acme, globex = await plane.tenant("acme"), await plane.tenant("globex")
    await plane.quotas.measure_many(STORAGE, {acme.id: int(0.95 * GIB), globex.id: int(0.95 * GIB)})
    rules = upgrades(plane, THREE_DAYS)
    assert await rules.evaluate(at=NOW) == []
    await plane.quotas.measure(globex, STORAGE, int(0.5 * GIB))
    assert await rules.evaluate(at=NOW + timedelta(days=2)) == []
    await plane.quotas.measure(globex, STORAGE, int(0.95 * GIB))
    [proposal] = await rules.evaluate(at=NOW + timedelta(days=3))
    assert (proposal.tenant_id, proposal.tier, proposal.proposed, proposal.applied) == (acme.id, "free", "pro", False)
    assert (proposal.limit, proposal.since) == (GIB, NOW)
    assert await rules.evaluate(at=NOW + timedelta(days=4)) == []
    [later] = await rules.evaluate(at=NOW + timedelta(days=6))
    assert later.slug == "globex"
    assert [event.slug for event in plane.of(TierUpgradeProposed)] == ["acme", "globex"]
    [entry] = await plane.audit.events(tenant=acme, action="tier.propose")
    assert (entry.before, entry.after) == ({"tier": "free"}, {"tier": "pro"})


async def test_a_policy_can_apply_the_next_tier(plane: QuotaPlane) -> None:
    """The tenant is then no longer near its limit."""
    tenant = await plane.tenant()
    await plane.quotas.measure(tenant, STORAGE, GIB)
    changed: list[tuple[UUID, str]] = []
    policy = UpgradePolicy(resource=STORAGE, sustained=timedelta(0), apply=True)
    rules = upgrades(plane, policy, changed)
    [proposal] = await rules.evaluate()
    assert proposal.applied and changed == [(tenant.id, "pro")]
    assert (await plane.registry.get(tenant.id)).tier == "pro"
    assert await rules.evaluate() == []
    assert await plane.sql("SELECT * FROM tenancy.quota_pressure") == []


async def test_a_tier_that_could_not_be_changed_is_tried_again(plane: QuotaPlane) -> None:
    """At the next evaluation."""
    await plane.quotas.measure(await plane.tenant(), STORAGE, GIB)
    rules = upgrades(plane, UpgradePolicy(resource=STORAGE, sustained=timedelta(0), apply=True))
    for _ in range(2):
        [proposal] = await rules.evaluate()
        assert not proposal.applied


async def test_the_highest_tier_has_no_next_one_and_a_ladder_can_be_given(plane: QuotaPlane) -> None:
    """Then nobody else is proposed anything."""
    for slug, tier in (("acme", "free"), ("globex", "pro"), ("initech", "max")):
        tenant = await plane.tenant(slug, tier=tier, quotas={"users": 1})
        await plane.quotas.consume(tenant, "users")
    policy = UpgradePolicy(resource="users", sustained=timedelta(0), next_tier={"free": "max"})
    assert [(found.slug, found.proposed) for found in await upgrades(plane, policy).evaluate()] == [("acme", "max")]
    plain = UpgradePolicy(resource="users", fraction=0.5, sustained=timedelta(0))
    found = [(proposal.slug, proposal.proposed) for proposal in await upgrades(plane, plain).evaluate()]
    assert sorted(found) == [("acme", "pro"), ("globex", "max")]


async def test_a_policy_of_an_unknown_resource_finds_nobody(plane: QuotaPlane) -> None:
    """It is data, like the tiers; a fraction out of range is a mistake."""
    assert await upgrades(plane, UpgradePolicy(resource="unicorns", sustained=timedelta(0))).evaluate() == []
    with pytest.raises(ConfigurationError):
        UpgradePolicy(resource="users", fraction=2)
