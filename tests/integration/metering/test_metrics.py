"""Samples of tenants' databases, sums over the registry, and the policies that propose a higher tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tenancy_orm import Tenancy
from tenancy_orm.authentication.directory import Directory
from tenancy_orm.config import Limit, Tier, TierPolicy
from tenancy_orm.control.names import Names
from tenancy_orm.errors import ConfigurationError, ControlUnavailableError, TenantNotFoundError, TierChangedError
from tenancy_orm.events import QuotaThresholdReached, TierChangeProposed
from tenancy_orm.metering.metrics import STORAGE, SampleReport, StorageSampler, TenantMetrics, WarmCount
from tenancy_orm.metering.policies import TierPolicies
from tenancy_orm.provisioning import Provisioner
from tenancy_orm.secrets.keyring import Keyring
from tenancy_orm.servers import Servers
from tenancy_orm.servers.placement import Placer
from tenancy_orm.tenant import Tenant, TenantRef
from tenancy_orm.tenants.manager import TenantManager
from tests.support.postgres import Postgres
from tests.support.provisioning import ScriptSchema
from tests.support.quotas import KEYS, QuotaPlane, quota_plane
from tests.support.registry import synchronise

GIB = 1024**3
TIERS = {
    "free": Tier("free", {STORAGE: Limit(GIB), "users": Limit(10)}),
    "pro": Tier("pro", {STORAGE: Limit(10 * GIB), "users": Limit(100)}),
    "max": Tier("max", {"users": Limit(1_000)}),
}
NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
async def plane(control_url: str, postgres: Postgres) -> AsyncIterator[QuotaPlane]:
    servers = {"default": postgres.admin_url}
    async with quota_plane(control_url, tiers=TIERS, servers=servers, encryption_keys=KEYS) as opened:
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


_made: list[Provisioner] = []


@pytest.fixture(autouse=True)
async def provisioners() -> AsyncIterator[None]:
    """Close what ``provisioner_of`` has made: it keeps connections."""
    yield
    while _made:
        await _made.pop().close()


def provisioner_of(plane: QuotaPlane, kind: type[Provisioner] = Provisioner, **servers: str) -> Provisioner:
    """What connects to the server of the tests, and to further ``servers``."""
    config = plane.config.replace(servers={**(plane.config.servers or {}), **servers})
    made = kind(
        config=config,
        control=plane.control,
        registry=plane.registry,
        servers=Servers(config),
        names=Names(config.name_prefix, plane.control.installation),
        keyring=Keyring(config.sealing_keys),
        schema=ScriptSchema(),
        events=plane.events,
    )
    _made.append(made)
    return made


def sampler_of(
    plane: QuotaPlane, kind: type[Provisioner] = Provisioner, *, chunk: int = 100, **servers: str
) -> StorageSampler:
    """A sampler of the server of the tests, and of further ``servers``."""
    return StorageSampler(plane.control, plane.quotas, provisioner_of(plane, kind, **servers), chunk=chunk)


# --- the sampler ----------------------------------------------------------------------------------------------------


async def test_the_sampler_records_size_connections_queries_and_errors(
    plane: QuotaPlane, postgres: Postgres, database: str
) -> None:
    """As PostgreSQL counts them; the size is the use of the storage quota."""
    tenant = await plane.tenant(quotas={STORAGE: 8_000_000})
    await place(plane, tenant, database)
    sampler = sampler_of(plane)
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
    plane: QuotaPlane, database: str
) -> None:
    """It is named in the report."""
    await synchronise(plane.control, {}, {"other": ("127.0.0.1", 1)})
    await place(plane, await plane.tenant("acme"), database)
    await place(plane, await plane.tenant("globex"), "gone", "other")
    await plane.tenant("initech")  # its database does not exist
    report = await sampler_of(plane, other="postgresql://x@127.0.0.1:1/x").run()
    assert (report.sampled, report.unavailable) == (1, ("other",))


class Vanishing:
    """A connection to a server on which one database is being dropped: its files are gone, its row is not."""

    def __init__(self, connection: asyncpg.Connection, database: str) -> None:
        self._connection = connection
        self._database = database

    async def fetch(self, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        rows = [dict(row) for row in await self._connection.fetch(*arguments, **options)]
        return [row | {"size_bytes": None} if row["datname"] == self._database else row for row in rows]

    def terminate(self) -> None:
        self._connection.terminate()


async def test_a_database_that_is_being_dropped_is_left_out(plane: QuotaPlane, database: str) -> None:
    """PostgreSQL knows no size of it; the others are sampled, and so is the storage of theirs counted."""
    there, going = await plane.tenant("acme"), await plane.tenant("globex")
    await place(plane, there, database)
    await place(plane, going, "postgres")

    class Dropping(Provisioner):
        async def connect_admin(self, server: str, *arguments: Any, **options: Any) -> Any:
            return Vanishing(await super().connect_admin(server, *arguments, **options), "postgres")

    report = await sampler_of(plane, Dropping).run()
    assert (report.sampled, report.unavailable) == (1, ())
    assert await TenantMetrics(plane.control).history(going) == []
    assert len(await TenantMetrics(plane.control).history(there)) == 1


async def test_whatever_goes_wrong_with_one_server_the_others_are_sampled(
    plane: QuotaPlane, postgres: Postgres, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the report, and logged with its traceback."""
    await synchronise(plane.control, {}, {"other": ("127.0.0.1", 1)})
    await place(plane, await plane.tenant("acme"), database)
    await place(plane, await plane.tenant("globex"), "postgres", "other")

    class Odd(Vanishing):
        async def fetch(self, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
            raise KeyError("an answer that nobody thought of")

    class Answering(Provisioner):
        async def connect_admin(self, server: str, *arguments: Any, **options: Any) -> Any:
            connection = await super().connect_admin(server, *arguments, **options)
            return connection if server == "default" else Odd(connection, "")

    report = await sampler_of(plane, Answering, other=postgres.admin_url).run()
    assert (report.sampled, report.unavailable) == (1, ("other",))
    assert "KeyError" in caplog.text


async def test_a_control_database_that_does_not_answer_ends_the_run(
    plane: QuotaPlane, postgres: Postgres, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what was begun on the other servers has ended."""
    await synchronise(plane.control, {}, {"other": ("127.0.0.1", 1)})
    await place(plane, await plane.tenant("acme"), database)
    await place(plane, globex := await plane.tenant("globex"), "postgres", "other")
    measure, gone = plane.quotas.measure_many, asyncio.Event()

    class Late(Provisioner):
        async def connect_admin(self, server: str, *arguments: Any, **options: Any) -> Any:
            if server == "other":
                await gone.wait()
                await asyncio.sleep(0)
            return await super().connect_admin(server, *arguments, **options)

    async def away_once(*arguments: Any) -> int:
        if not gone.is_set():
            gone.set()
            raise ControlUnavailableError("no answer")
        return await measure(*arguments)

    monkeypatch.setattr(plane.quotas, "measure_many", away_once)
    with pytest.raises(ControlUnavailableError):
        await sampler_of(plane, Late, other=postgres.admin_url).run()
    assert len(await TenantMetrics(plane.control).history(globex)) == 1


async def test_sampling_goes_on_after_it_failed(
    plane: QuotaPlane,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the failure was: nobody would start it again. What nobody expected is logged with its traceback."""
    await place(plane, await plane.tenant(), database)
    failures = [ControlUnavailableError("no answer"), RuntimeError("anything")]

    sampler = sampler_of(plane)
    measure, measured = plane.quotas.measure_many, asyncio.Event()
    run = sampler.run

    async def failing(**options: Any) -> SampleReport:
        if failures:
            raise failures.pop()
        return await run(**options)

    async def counted(*arguments: Any) -> int:
        measured.set()
        return await measure(*arguments)

    monkeypatch.setattr(sampler, "run", failing)
    monkeypatch.setattr(plane.quotas, "measure_many", counted)
    task = asyncio.create_task(sampler.run_every(0.01))
    async with asyncio.timeout(30):
        await measured.wait()
    task.cancel()
    await asyncio.wait([task])
    assert failures == [] and task.cancelled()
    logged = [bool(entry.exc_info) for entry in caplog.records if "could not be sampled" in entry.message]
    assert logged == [True, False]


async def test_of_several_samplers_one_does_the_work(plane: QuotaPlane, database: str) -> None:
    """The others see that it has been done."""
    await place(plane, await plane.tenant(), database)

    sampler = sampler_of(plane, chunk=1)
    assert (await sampler.run(unless_within=60)).sampled == 1
    assert (await sampler.run(unless_within=60)).sampled == 0
    assert (await sampler.run()).sampled == 1


async def test_a_tier_without_a_storage_limit_is_sampled_all_the_same(plane: QuotaPlane, database: str) -> None:
    """Its size is known, and counted against nothing."""
    tenant = await plane.tenant(tier="max")
    await place(plane, tenant, database)

    assert (await sampler_of(plane).run()).sampled == 1
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


Hook = Callable[[UUID], Awaitable[object]]


class Changing(TenantManager):
    """Calls ``before`` for each change of a tenant, and keeps in ``changed`` those that were made."""

    before: Hook | None = None

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.changed: list[tuple[UUID, str]] = []

    async def update(self, tenant: TenantRef, **values: Any) -> Tenant:
        assert isinstance(tenant, UUID)
        if self.before is not None:
            await self.before(tenant)
        found = await super().update(tenant, **values)
        self.changed.append((found.id, found.tier))
        return found


def manager_of(plane: QuotaPlane, before: Hook | None = None) -> Changing:
    """What changes tiers; the tenants have no roles on the server, which is logged."""
    made = Changing(
        config=plane.config,
        registry=plane.registry,
        directory=Directory(plane.control, plane.config, plane.events),
        provisioner=provisioner_of(plane),
        names=Names(plane.config.name_prefix, plane.control.installation),
        keyring=Keyring(plane.config.sealing_keys),
        events=plane.events,
        placer=Placer(plane.config, plane.control, Servers(plane.config)),
    )
    made.before = before
    return made


def evaluator(plane: QuotaPlane, *policies: TierPolicy, tenants: TenantManager | None = None) -> TierPolicies:
    """Policies, and what changes a tier."""
    config = plane.config.replace(metering={"tier_policies": policies})
    return TierPolicies(plane.control, config, plane.events, plane.audit, tenants or manager_of(plane))


async def refuse(tenant_id: UUID) -> None:
    """Have no tenant changed."""
    raise TenantNotFoundError(tenant_id)


APPLY = TierPolicy(resource=STORAGE, sustained=timedelta(0), apply=True)
THREE_DAYS = TierPolicy(resource=STORAGE, fraction=0.9, sustained=timedelta(days=3))


async def test_a_tenant_near_its_limit_for_long_enough_is_proposed_the_next_tier(plane: QuotaPlane) -> None:
    """Once, with an event and an audit entry; one that was near only for a moment is not."""
    acme, globex = await plane.tenant("acme"), await plane.tenant("globex")
    await plane.quotas.measure_many(STORAGE, {acme.id: int(0.95 * GIB), globex.id: int(0.95 * GIB)})
    rules = evaluator(plane, THREE_DAYS)
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
    assert [event.slug for event in plane.of(TierChangeProposed)] == ["acme", "globex"]
    [entry] = await plane.audit.events(tenant=acme, action="tier.propose")
    assert (entry.before, entry.after) == ({"tier": "free"}, {"tier": "pro"})


async def test_a_policy_can_apply_the_next_tier(plane: QuotaPlane) -> None:
    """The tenant is then no longer near its limit."""
    tenant = await plane.tenant()
    await plane.quotas.measure(tenant, STORAGE, GIB)
    tenants = manager_of(plane)
    rules = evaluator(plane, APPLY, tenants=tenants)
    [proposal] = await rules.evaluate()
    assert proposal.applied and tenants.changed == [(tenant.id, "pro")]
    assert (await plane.registry.get(tenant.id)).tier == "pro"
    assert await rules.evaluate() == []
    assert await plane.sql("SELECT * FROM tenancy.quota_pressure") == []


async def test_a_tier_that_could_not_be_changed_is_tried_again(plane: QuotaPlane) -> None:
    """At the next evaluation."""
    await plane.quotas.measure(await plane.tenant(), STORAGE, GIB)
    rules = evaluator(plane, APPLY, tenants=manager_of(plane, refuse))
    for _ in range(2):
        [proposal] = await rules.evaluate()
        assert not proposal.applied


async def test_what_goes_wrong_with_one_tenant_keeps_no_other_from_its_tier(plane: QuotaPlane) -> None:
    """Whatever it is; it is announced and written down once, and tried again by each evaluation."""
    tenants = [await plane.tenant(slug) for slug in ("acme", "globex")]
    await plane.quotas.measure_many(STORAGE, {tenant.id: GIB for tenant in tenants})
    broken = {tenants[0].id}

    async def break_some(tenant_id: UUID) -> None:
        if tenant_id in broken:
            raise RuntimeError("the application's own code")

    rules = evaluator(plane, APPLY, tenants=manager_of(plane, break_some))
    assert {found.slug: found.applied for found in await rules.evaluate()} == {"acme": False, "globex": True}
    assert [found.applied for found in await rules.evaluate()] == [False]
    broken.clear()
    assert [found.applied for found in await rules.evaluate()] == [True]
    told = [(event.slug, event.applied) for event in plane.of(TierChangeProposed)]
    assert sorted(told) == [("acme", False), ("acme", True), ("globex", True)]
    assert len(await plane.audit.events(tenant=tenants[0], action="tier.propose")) == 1


async def test_a_process_that_dies_while_it_applies_leaves_it_to_another(plane: QuotaPlane) -> None:
    """After its claim has run out, and not before."""
    tenant = await plane.tenant()
    await plane.quotas.measure(tenant, STORAGE, GIB)

    async def die(tenant_id: UUID) -> None:
        raise asyncio.CancelledError

    now = datetime.now(UTC)
    with pytest.raises(asyncio.CancelledError):
        await evaluator(plane, APPLY, tenants=manager_of(plane, die)).evaluate(at=now)
    another = evaluator(plane, APPLY)
    assert await another.evaluate(at=now + timedelta(minutes=9)) == []
    [proposal] = await another.evaluate(at=now + timedelta(minutes=11))
    assert proposal.applied and (await plane.registry.get(tenant.id)).tier == "pro"


async def test_a_tenant_climbs_until_it_is_no_longer_near_its_limit(plane: QuotaPlane) -> None:
    """In each tier for as long as the policy says."""
    tenant = await plane.tenant()
    await plane.quotas.consume(tenant, "users", 10)
    await plane.quotas.set(tenant, {"users": 10})
    policy = TierPolicy(resource="users", sustained=timedelta(days=1), apply=True)
    rules = evaluator(plane, policy)
    found = [
        (day, proposal.tier, proposal.proposed)
        for day in range(6)
        for proposal in await rules.evaluate(at=NOW + timedelta(days=day))
    ]
    assert found == [(1, "free", "pro"), (3, "pro", "max")]


async def test_two_policies_of_one_limit_do_not_share_their_notes(plane: QuotaPlane) -> None:
    """One proposes after a day, the other applies after three."""
    await plane.quotas.measure(await plane.tenant(), STORAGE, GIB)
    early = TierPolicy(name="early", resource=STORAGE, sustained=timedelta(days=1))
    late = TierPolicy(name="late", resource=STORAGE, sustained=timedelta(days=3), apply=True)
    rules = evaluator(plane, early, late)
    found = [
        (day, proposal.applied) for day in range(6) for proposal in await rules.evaluate(at=NOW + timedelta(days=day))
    ]
    assert found == [(1, False), (3, True)]


async def test_a_tier_that_was_changed_meanwhile_stays(plane: QuotaPlane) -> None:
    """An operator's change of a tier is not undone by a policy that had looked before."""
    tenant = await plane.tenant()
    await plane.quotas.measure(tenant, STORAGE, GIB)

    async def change_first(tenant_id: UUID) -> None:
        await plane.registry.change(tenant_id, action="tenant.update", tier="max")

    [proposal] = await evaluator(plane, APPLY, tenants=manager_of(plane, change_first)).evaluate()
    assert not proposal.applied
    assert (await plane.registry.get(tenant.id)).tier == "max"


async def test_a_tier_is_changed_only_from_the_one_that_was_seen(tenancy: Tenancy) -> None:
    """Where the caller says which; the policies do."""
    await tenancy.tenants.create("acme", tier="free")
    with pytest.raises(TierChangedError) as caught:
        await tenancy.tenants.update("acme", tier="pro", expected_tier="starter")
    assert (caught.value.expected, caught.value.found) == ("starter", "free")
    assert (await tenancy.tenants.get("acme")).tier == "free"
    assert (await tenancy.tenants.update("acme", tier="pro", expected_tier="free")).tier == "pro"


@pytest.mark.parametrize("apply", [False, True])
async def test_of_two_that_evaluate_at_once_one_proposes(plane: QuotaPlane, apply: bool) -> None:
    """The other has seen the same tenant, and leaves it alone when its turn comes."""
    tenant = await plane.tenant()
    await plane.quotas.measure(tenant, STORAGE, GIB)
    policy = TierPolicy(resource=STORAGE, sustained=timedelta(0), apply=apply)
    insert = "INSERT INTO tenancy.quota_pressure VALUES (:id, :policy, :resource, 'free', now())"
    await plane.sql(insert, id=tenant.id, policy=policy.name, resource=STORAGE)
    async with plane.holding("SELECT 1 FROM tenancy.quota_pressure FOR UPDATE"):
        looking = [asyncio.create_task(evaluator(plane, policy).evaluate()) for _ in range(2)]
        await plane.waiting(*looking)
    assert sorted([len(found) for found in await asyncio.gather(*looking)]) == [0, 1]
    assert len(plane.of(TierChangeProposed)) == 1
    assert len(await plane.audit.events(tenant=tenant, action="tier.propose")) == 1


async def test_the_highest_tier_has_no_next_one_and_a_ladder_can_be_given(plane: QuotaPlane) -> None:
    """Then nobody else is proposed anything."""
    for slug, tier in (("acme", "free"), ("globex", "pro"), ("initech", "max")):
        tenant = await plane.tenant(slug, tier=tier, quotas={"users": 1})
        await plane.quotas.consume(tenant, "users")
    policy = TierPolicy(resource="users", sustained=timedelta(0), next_tier={"free": "max"})
    assert [(found.slug, found.proposed) for found in await evaluator(plane, policy).evaluate()] == [("acme", "max")]
    plain = TierPolicy(resource="users", fraction=0.5, sustained=timedelta(0))
    found = [(proposal.slug, proposal.proposed) for proposal in await evaluator(plane, plain).evaluate()]
    assert sorted(found) == [("acme", "pro"), ("globex", "max")]


async def test_a_policy_of_an_unknown_resource_finds_nobody(plane: QuotaPlane) -> None:
    """It is data, like the tiers; a fraction out of range is a mistake."""
    assert await evaluator(plane, TierPolicy(resource="unicorns", sustained=timedelta(0))).evaluate() == []
    with pytest.raises(ConfigurationError):
        TierPolicy(resource="users", fraction=2)


async def test_warm_databases_are_counted_by_server(plane: QuotaPlane) -> None:
    """Those that a creation can claim, and those that are being made or dropped; none where there are none."""
    metrics = TenantMetrics(plane.control)
    (found,) = await metrics.warm_databases()
    assert (found.ready, found.incomplete) == (0, 0)
    for name, state in (("a", "ready"), ("b", "ready"), ("c", "making"), ("d", "dropping")):
        await plane.sql(
            "INSERT INTO tenancy.warm_databases (name, server, template, recipe, state) "
            f"VALUES ('{name}', '{found.server}', 'template', 'recipe', '{state}')"
        )
    assert await metrics.warm_databases() == [WarmCount(found.server, ready=2, incomplete=2)]
