"""The tenant's life from creation to tombstone, through the public surface, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import select, text

from tenancy_orm import Status, Tenancy, Tenant, current_tenant, current_tenant_or_none
from tenancy_orm.errors import (
    ConfigurationError,
    CrossTenantError,
    InvalidCredentialError,
    InvalidMetadataError,
    InvalidSlugError,
    InvalidTransitionError,
    LoginNotBlockedError,
    ProvisioningError,
    QuotaExceededError,
    TenantDeletedError,
    TenantExistsError,
    TenantNotFoundError,
    TenantProvisioningError,
    TenantSuspendedError,
    UnknownTierError,
)
from tenancy_orm.events import TenantEvent, TenantPurged, TenantUpdated
from tenancy_orm.registry.rows import TenantDraft, uuid7
from tests.support.models import Note


async def databases_and_roles(tenancy: Tenancy) -> set[str]:
    """Every database and role of this installation's tenants."""
    connection = await tenancy.internals.servers["default"].connect_admin()
    try:
        rows = await connection.fetch("SELECT datname AS name FROM pg_database UNION ALL SELECT rolname FROM pg_roles")
    finally:
        await connection.close()
    names = tenancy.internals.provisioner.names
    return {row["name"] for row in rows if names.parse(row["name"])}


# --- creating -------------------------------------------------------------------------------------------------------


async def test_create_makes_a_usable_tenant(tenancy: Tenancy) -> None:
    """A created tenant is active, has its own database and a key that works."""
    created = await tenancy.tenants.create("acme", tier="pro", metadata={"plan": "annual"})
    tenant = created.tenant
    assert (tenant.slug, tenant.status, tenant.tier) == ("acme", Status.ACTIVE, "pro")
    assert tenant.metadata == {"plan": "annual"}
    assert tenant.id.version == 7
    assert tenant.created_at is not None and tenant.created_at.tzinfo is not None
    assert (await tenancy.tenants.get_by_api_key(created.api_key)).id == tenant.id
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="hello"))


async def test_a_taken_slug_is_refused(tenancy: Tenancy) -> None:
    """Creating over an existing slug raises and leaves the first tenant as it was."""
    first = await tenancy.tenants.create("acme")
    before = await databases_and_roles(tenancy)
    with pytest.raises(TenantExistsError) as caught:
        await tenancy.tenants.create("acme")
    assert caught.value.tenant == "acme"
    assert await databases_and_roles(tenancy) == before
    assert (await tenancy.tenants.get("acme")).id == first.id


async def test_a_slug_is_free_again_after_a_refused_race(tenancy: Tenancy) -> None:
    """Of many creations of one slug at once exactly one succeeds, and the others leave nothing."""
    outcomes = await asyncio.gather(*(tenancy.tenants.create("acme") for _ in range(8)), return_exceptions=True)
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert all(isinstance(x, TenantExistsError) for x in outcomes if isinstance(x, BaseException))
    assert len(await databases_and_roles(tenancy)) == 1


@pytest.mark.parametrize("slug", ["", "A", "1abc", "a_b", "a" * 64, "-a", "a-", "a b", 'a"; DROP DATABASE x; --', "ä"])
async def test_a_slug_that_breaks_the_rule_is_refused(tenancy: Tenancy, slug: str) -> None:
    """A slug is a DNS label; anything else is refused before anything is made."""
    with pytest.raises(InvalidSlugError):
        await tenancy.tenants.create(slug)
    assert await databases_and_roles(tenancy) == set()


async def test_hostile_metadata_is_kept_as_data(tenancy: Tenancy) -> None:
    """Metadata of any content comes back as it was, and changes no SQL."""
    hostile = {"'; DROP TABLE tenancy.tenants; --": ['"$$', "\\", ":id", "%s", "{}", "\u202e", None, 1.5]}
    created = await tenancy.tenants.create("acme", metadata=hostile)
    assert (await tenancy.tenants.get(created.id)).metadata == hostile


@pytest.mark.parametrize(
    "metadata", [{"a": object()}, {"a": float("nan")}, {"a": "\x00"}, {"a": "x" * 70_000}, {"a": "\ud800"}]
)
async def test_metadata_that_jsonb_cannot_keep_is_refused(tenancy: Tenancy, metadata: dict[str, object]) -> None:
    """What is not JSON, or too large, is refused by name."""
    with pytest.raises(InvalidMetadataError):
        await tenancy.tenants.create("acme", metadata=metadata)


async def test_an_unknown_tier_is_refused(tenancy: Tenancy) -> None:
    """The error names the tiers there are."""
    with pytest.raises(UnknownTierError, match="free, starter, pro, enterprise"):
        await tenancy.tenants.create("acme", tier="gold")


async def test_a_trial_keeps_its_end(tenancy: Tenancy) -> None:
    """A tenant can begin as a trial that ends at a given time."""
    ends = datetime(2030, 1, 1, tzinfo=UTC)
    created = await tenancy.tenants.create("acme", status="trial", trial_ends_at=ends)
    assert (created.tenant.status, created.tenant.trial_ends_at) == (Status.TRIAL, ends)


async def test_a_naive_time_is_refused(tenancy: Tenancy) -> None:
    """A datetime without a time zone would mean another moment on another machine."""
    with pytest.raises(ConfigurationError, match="aware"):
        await tenancy.tenants.create("acme", status="trial", trial_ends_at=datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake under test


async def test_many_creations_at_once_all_succeed(tenancy: Tenancy) -> None:
    """Concurrent creation loses none and mixes none up."""
    created = await asyncio.gather(*(tenancy.tenants.create(f"t{i}") for i in range(24)))
    assert {c.slug for c in created} == {f"t{i}" for i in range(24)}
    for one in created:
        assert one.tenant.placement is not None
        found = await tenancy.fetch_value("SELECT current_database()", tenant=one.tenant)
        assert found == one.tenant.placement.database


async def test_a_failed_creation_is_rolled_back(tenancy: Tenancy) -> None:
    """Where a step fails, neither row nor database nor role is left, and the slug is free."""
    admin = await tenancy.internals.servers["default"].connect_admin()
    try:
        await tenancy.tenants.create("first")
        template = (await tenancy.internals.provisioner.template("default")).name
        await admin.execute(f'ALTER DATABASE "{template}" IS_TEMPLATE false')
        await admin.execute(f'ALTER DATABASE "{template}" RENAME TO "{template}_away"')
        before = await databases_and_roles(tenancy)
        with pytest.raises(ProvisioningError) as caught:
            await tenancy.tenants.create("acme")
        assert caught.value.step is not None
        assert await databases_and_roles(tenancy) == before
        with pytest.raises(TenantNotFoundError):
            await tenancy.tenants.get("acme")
        await admin.execute(f'ALTER DATABASE "{template}_away" RENAME TO "{template}"')
        await admin.execute(f'ALTER DATABASE "{template}" IS_TEMPLATE true')
        await tenancy.tenants.create("acme")
    finally:
        await admin.close()


async def test_creation_takes_less_than_the_original(tenancy: Tenancy) -> None:
    """The system this replaces took 1.2 s for a creation; the median here is far below, even on a busy machine."""
    await tenancy.tenants.create("warm-up")
    times = []
    for i in range(5):
        started = time.perf_counter()
        await tenancy.tenants.create(f"t{i}")
        times.append(time.perf_counter() - started)
    assert sorted(times)[2] < 1.2


# --- finding --------------------------------------------------------------------------------------------------------


async def test_get_by_id_slug_and_key(tenancy: Tenancy) -> None:
    """All three ways find the same tenant, and an id works as text too."""
    created = await tenancy.tenants.create("acme")
    for found in (
        await tenancy.tenants.get(created.id),
        await tenancy.tenants.get(str(created.id)),
        await tenancy.tenants.get("acme"),
        await tenancy.tenants.get(created.tenant),
        await tenancy.tenants.get_by_slug("acme"),
        await tenancy.tenants.get_by_api_key(created.api_key),
    ):
        assert found.id == created.id


async def test_an_unknown_tenant_is_not_found(tenancy: Tenancy) -> None:
    """By id, slug and key, for reading and for changing."""
    for reference in (uuid4(), str(uuid4()), "nobody", "NOT A SLUG"):
        with pytest.raises(TenantNotFoundError):
            await tenancy.tenants.get(reference)
        with pytest.raises(TenantNotFoundError):
            await tenancy.tenants.update(reference, tier="pro")
    with pytest.raises(InvalidCredentialError):
        await tenancy.tenants.get_by_api_key("ten_live_nonsense")
    with pytest.raises(TenantNotFoundError):
        async with tenancy.session("nobody"):
            pass


async def test_list_filters_and_pages(tenancy: Tenancy) -> None:
    """Pages follow one another without gap or repetition; filters combine."""
    for i in range(5):
        await tenancy.tenants.create(f"t{i}", tier="pro" if i % 2 else "free")
    await tenancy.tenants.suspend("t1")
    seen: list[str] = []
    after: UUID | None = None
    while True:
        page = await tenancy.tenants.list(limit=2, after=after)
        seen += [tenant.slug for tenant in page.items]
        if (after := page.next) is None:
            break
    assert seen == ["t0", "t1", "t2", "t3", "t4"]
    assert [t.slug for t in (await tenancy.tenants.list(tier="pro")).items] == ["t1", "t3"]
    assert [t.slug for t in (await tenancy.tenants.list(tier="pro", status="active")).items] == ["t3"]
    assert [t.slug async for t in tenancy.tenants.iterate(status="suspended")] == ["t1"]


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": 1_001}, {"status": "asleep"}])
async def test_list_refuses_what_makes_no_sense(tenancy: Tenancy, options: dict[str, object]) -> None:
    """Limits out of range and unknown statuses are named."""
    with pytest.raises(ConfigurationError):
        await tenancy.tenants.list(**options)  # type: ignore[arg-type]


# --- changing -------------------------------------------------------------------------------------------------------


async def test_update_changes_fields(tenancy: Tenancy) -> None:
    """Tier, metadata and time zone change; the rest stays; updated_at moves."""
    created = await tenancy.tenants.create("acme", metadata={"a": 1})
    changed = await tenancy.tenants.update("acme", tier="pro", metadata={"b": 2}, timezone="Europe/Berlin")
    assert (changed.tier, dict(changed.metadata), changed.timezone) == ("pro", {"b": 2}, "Europe/Berlin")
    assert (changed.slug, changed.status) == ("acme", Status.ACTIVE)
    assert changed.updated_at is not None and created.tenant.updated_at is not None
    assert changed.updated_at > created.tenant.updated_at
    assert changed.created_at == created.tenant.created_at


async def test_a_wrong_update_changes_nothing(tenancy: Tenancy) -> None:
    """Arguments are checked before the first statement."""
    await tenancy.tenants.create("acme")
    with pytest.raises(UnknownTierError):
        await tenancy.tenants.update("acme", metadata={"x": 1}, tier="gold")
    with pytest.raises(ConfigurationError):
        await tenancy.tenants.update("acme", metadata={"x": 1}, timezone="Moon/Crater")
    assert (await tenancy.tenants.get("acme")).metadata == {}


async def test_suspend_and_activate(tenancy: Tenancy) -> None:
    """A suspended tenant gets no session, by the code and by PostgreSQL, and works again once activated."""
    created = await tenancy.tenants.create("acme")
    password = tenancy.internals.provisioner.password(created.tenant)
    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1
    suspended = await tenancy.tenants.suspend("acme", reason="unpaid")
    assert (suspended.status, suspended.reason) == (Status.SUSPENDED, "unpaid")
    with pytest.raises(TenantSuspendedError, match="unpaid"):
        async with tenancy.session("acme"):
            pass
    placement = created.tenant.placement
    assert placement is not None
    server = tenancy.internals.servers["default"]
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
        await asyncpg.connect(
            host=server.host, port=server.port, user=placement.role, password=password, database=placement.database
        )
    activated = await tenancy.tenants.activate("acme")
    assert (activated.status, activated.reason) == (Status.ACTIVE, None)
    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1


async def test_a_suspended_tenants_open_connections_are_ended(tenancy: Tenancy) -> None:
    """A transaction that was open when the tenant was suspended cannot go on."""
    await tenancy.tenants.create("acme")
    async with tenancy.session("acme") as session:
        await session.execute(text("SELECT 1"))
        await tenancy.tenants.suspend("acme")
        with pytest.raises(Exception):  # noqa: B017, PT011 - the driver's error for a connection that is gone
            await session.execute(text("SELECT 1"))


async def test_soft_delete_keeps_data_and_refuses_the_key(tenancy: Tenancy) -> None:
    """A deleted tenant's key and sessions are refused; restored, its rows are there."""
    created = await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add(Note(body="kept"))
    deleted = await tenancy.tenants.delete("acme")
    assert deleted.status is Status.DELETED and deleted.deleted_at is not None
    with pytest.raises(InvalidCredentialError):
        await tenancy.tenants.get_by_api_key(created.api_key)
    with pytest.raises(TenantDeletedError):
        async with tenancy.session("acme"):
            pass
    restored = await tenancy.tenants.restore("acme")
    assert restored.status is Status.ACTIVE and restored.deleted_at is None
    assert await tenancy.fetch_value("SELECT body FROM notes", tenant="acme") == "kept"


async def test_restore_returns_to_the_status_before(tenancy: Tenancy) -> None:
    """A tenant that was suspended when it was deleted is suspended again, for the same reason."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.suspend("acme", reason="unpaid")
    await tenancy.tenants.delete("acme")
    restored = await tenancy.tenants.restore("acme")
    assert (restored.status, restored.reason) == (Status.SUSPENDED, "unpaid")


async def test_hard_delete_leaves_a_tombstone(tenancy: Tenancy) -> None:
    """After a purge the database, role, keys and secret are gone, the row stays, and the slug is free."""
    created = await tenancy.tenants.create("acme", metadata={"secret": "plans"})
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    assert await databases_and_roles(tenancy) == set()
    tombstone = await tenancy.tenants.get(created.id)
    assert (tombstone.status, tombstone.placement, tombstone.metadata) == (Status.PURGED, None, {})
    with pytest.raises(TenantNotFoundError):
        await tenancy.tenants.get("acme")
    with pytest.raises(InvalidCredentialError):
        await tenancy.tenants.get_by_api_key(created.api_key)
    again = await tenancy.tenants.create("acme")
    assert again.id != created.id
    assert await tenancy.fetch_value("SELECT count(*) FROM notes", tenant="acme") == 0


async def test_purge_needs_a_deleted_tenant(tenancy: Tenancy) -> None:
    """A running tenant cannot be purged by one mistaken call."""
    await tenancy.tenants.create("acme")
    with pytest.raises(InvalidTransitionError):
        await tenancy.tenants.purge("acme")
    assert await tenancy.fetch_value("SELECT 1", tenant="acme") == 1


LATER = datetime.now(UTC) + timedelta(days=14)


async def start_trial(tenancy: Tenancy) -> None:
    """Suspend acme, and start a trial of it."""
    await tenancy.tenants.suspend("acme")
    await tenancy.tenants.start_trial("acme", ends_at=LATER)


ILLEGAL: list[tuple[Callable[[Tenancy], Awaitable[object]], Callable[[Tenancy], Awaitable[object]], str]] = [
    (lambda t: t.tenants.delete("acme"), lambda t: t.tenants.activate("acme"), "restore it first"),
    (lambda t: t.tenants.delete("acme"), lambda t: t.tenants.suspend("acme", reason="late"), "restore it first"),
    (lambda t: t.tenants.delete("acme"), lambda t: t.tenants.start_maintenance("acme"), "restore it first"),
    (lambda t: t.tenants.delete("acme"), lambda t: t.tenants.end_maintenance("acme"), "restore it first"),
    (lambda t: t.tenants.get("acme"), lambda t: t.tenants.start_trial("acme", ends_at=LATER), "suspend it first"),
    (lambda t: t.tenants.suspend("acme"), lambda t: t.tenants.purge("acme"), "delete it first"),
    (start_trial, lambda t: t.tenants.start_trial("acme", ends_at=LATER + timedelta(days=1)), "update"),
]


@pytest.mark.parametrize(("prepare", "illegal", "remedy"), ILLEGAL)
async def test_an_illegal_transition_is_refused_by_the_code(
    tenancy: Tenancy,
    prepare: Callable[[Tenancy], Awaitable[object]],
    illegal: Callable[[Tenancy], Awaitable[object]],
    remedy: str,
) -> None:
    """The lifecycle has no such change; the tenant stays what it was, and the message says what to do first."""
    await tenancy.tenants.create("acme")
    await prepare(tenancy)
    before = await tenancy.tenants.get("acme")
    with pytest.raises(InvalidTransitionError, match=remedy):
        await illegal(tenancy)
    after = await tenancy.tenants.get("acme")
    assert (after.status, after.updated_at) == (before.status, before.updated_at)


async def test_what_is_so_already_can_be_repeated(tenancy: Tenancy) -> None:
    """Scripts and webhooks come twice: no error, no change, no audit entry, no event; another reason is recorded."""
    await tenancy.tenants.create("acme")
    seen: list[TenantEvent] = []
    tenancy.events.subscribe(TenantEvent, seen.append)
    t = tenancy.tenants
    steps: list[Callable[[], Awaitable[Tenant]]] = [
        lambda: t.suspend("acme", reason="unpaid"),
        lambda: t.start_trial("acme", ends_at=LATER),
        lambda: t.activate("acme"),
        lambda: t.start_maintenance("acme", reason="moving"),
        lambda: t.end_maintenance("acme"),
        lambda: t.delete("acme"),
        lambda: t.restore("acme"),
        lambda: t.restore("acme"),
    ]
    for step in steps:
        changed = await step()
        entries, events = await tenancy.audit.events(limit=1), len(seen)
        assert await step() == changed
        assert (await tenancy.audit.events(limit=1), len(seen)) == (entries, events)
    await t.suspend("acme", reason="unpaid")
    assert (await t.suspend("acme")).reason == "unpaid"
    assert (await t.suspend("acme", reason="fraud")).reason == "fraud"
    assert isinstance(seen[-1], TenantUpdated)
    [entry] = await tenancy.audit.events(limit=1)
    assert (entry.action, entry.before, entry.after) == ("tenant.suspend", {"reason": "unpaid"}, {"reason": "fraud"})
    deleted = await t.delete("acme")
    for _ in range(2):
        await t.purge(deleted.id)
    assert isinstance(seen[-1], TenantPurged) and not isinstance(seen[-2], TenantPurged)


async def test_a_repeat_blocks_a_login_that_was_not_blocked(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant is suspended, but its server did not answer: the same call again finishes it."""
    acme = (await tenancy.tenants.create("acme")).tenant
    assert acme.placement is not None

    async def fails(tenant: Tenant) -> None:
        raise ProvisioningError("the server does not answer", tenant=tenant.slug, step="align")

    async def can_login() -> object:
        server = await tenancy.internals.servers["default"].connect_admin()
        try:
            query = "SELECT rolcanlogin AND rolconnlimit <> 0 FROM pg_roles WHERE rolname = $1"
            return await server.fetchval(query, acme.placement.role if acme.placement else "")
        finally:
            await server.close()

    with monkeypatch.context() as patch:
        patch.setattr(tenancy.internals.provisioner, "align", fails)
        with pytest.raises(LoginNotBlockedError):
            await tenancy.tenants.suspend("acme")
    assert await can_login() is True
    assert (await tenancy.tenants.suspend("acme")).status is Status.SUSPENDED
    assert await can_login() is False


async def test_a_trial_that_has_ended_is_taken_from_a_late_webhook(tenancy: Tenancy) -> None:
    """A time in the past is no error, and ends the trial with the next housekeeping."""
    await tenancy.tenants.create("acme", status="trial", trial_ends_at=LATER)
    assert (await tenancy.run_housekeeping()).suspended == ()
    await tenancy.tenants.update("acme", trial_ends_at=datetime(2020, 1, 1, tzinfo=UTC))
    assert (await tenancy.run_housekeeping()).suspended == ("acme",)
    with pytest.raises(ConfigurationError, match="aware datetime"):
        await tenancy.tenants.update("acme", trial_ends_at="2030-01-01")  # type: ignore[arg-type]


# --- isolation, schema, pools ---------------------------------------------------------------------------------------


async def test_tenants_do_not_see_each_others_rows(tenancy: Tenancy) -> None:
    """The same query gives each tenant its own rows."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
        async with tenancy.transaction(slug) as session:
            session.add(Note(body=f"of {slug}"))
    for slug in ("acme", "globex"):
        async with tenancy.session(slug) as session:
            assert list(await session.scalars(select(Note.body))) == [f"of {slug}"]


async def test_a_tenants_role_cannot_reach_anothers_database(tenancy: Tenancy) -> None:
    """With its own valid credentials, a tenant is refused by PostgreSQL at the login to another's database."""
    acme = (await tenancy.tenants.create("acme")).tenant
    globex = (await tenancy.tenants.create("globex")).tenant
    assert acme.placement is not None and globex.placement is not None
    server = tenancy.internals.servers["default"]

    async def connect(database: str) -> asyncpg.Connection:
        assert acme.placement is not None
        return await asyncpg.connect(
            host=server.host,
            port=server.port,
            user=acme.placement.role,
            password=tenancy.internals.provisioner.password(acme),
            database=database,
        )

    own = await connect(acme.placement.database)
    await own.close()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connect(globex.placement.database)


async def test_a_new_tenant_has_the_schema(tenancy: Tenancy) -> None:
    """Every table of the application is there, and empty."""
    await tenancy.tenants.create("acme")
    tables = await tenancy.fetch_all(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1", tenant="acme"
    )
    assert [row.tablename for row in tables] == ["notes", "tags"]


async def test_each_tenant_has_its_own_pool(tenancy: Tenancy) -> None:
    """Two tenants' sessions use different engines on different databases; one tenant's share one."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    async with tenancy.session("acme") as a, tenancy.session("globex") as b, tenancy.session("acme") as c:
        engines = [session.get_bind() for session in (a, b, c)]
    assert engines[0] is engines[2]
    assert engines[0] is not engines[1]


async def test_concurrent_queries_of_different_tenants(tenancy: Tenancy) -> None:
    """Many queries of several tenants at once each come from their own database."""
    tenants = [(await tenancy.tenants.create(f"t{i}")).tenant for i in range(4)]

    async def ask(tenant: Tenant) -> bool:
        found = await tenancy.fetch_value("SELECT current_database()", tenant=tenant)
        return tenant.placement is not None and found == tenant.placement.database

    assert all(await asyncio.gather(*(ask(tenants[i % 4]) for i in range(80))))


async def test_a_hundred_rows_take_less_than_the_original(tenancy: Tenancy) -> None:
    """The system this replaces took 12 ms for 100 rows; this is below it, however busy the machine is."""
    await tenancy.tenants.create("acme")
    async with tenancy.transaction("acme") as session:
        session.add_all(Note(body=str(i)) for i in range(100))
    times: list[float] = []
    # the fastest: the others tell how busy the machine is
    while not times or (min(times) >= 0.012 and len(times) < 1_000):
        started = time.perf_counter()
        async with tenancy.session("acme") as session:
            assert len(list(await session.scalars(select(Note)))) == 100
        times.append(time.perf_counter() - started)
    assert min(times) < 0.012


# --- quotas and audit -----------------------------------------------------------------------------------------------


async def test_quotas_come_from_the_tier_and_can_be_overridden(tenancy: Tenancy) -> None:
    """A tier's limits apply until the tenant has its own."""
    await tenancy.tenants.create("acme", tier="free")
    assert {u.resource: u.limit for u in await tenancy.quotas.usage("acme")}["users"] == 3
    await tenancy.quotas.set("acme", {"users": 7})
    assert {u.resource: u.limit for u in await tenancy.quotas.usage("acme")}["users"] == 7
    await tenancy.tenants.update("acme", tier="pro")
    limits = {u.resource: u.limit for u in await tenancy.quotas.usage("acme")}
    assert (limits["users"], limits["api_calls"]) == (7, 100_000)


async def test_usage_is_counted_and_refused_past_the_limit(tenancy: Tenancy) -> None:
    """Consuming is atomic: concurrent calls take exactly the limit."""
    await tenancy.tenants.create("acme")
    await tenancy.quotas.set("acme", {"users": 5})
    outcomes = await asyncio.gather(
        *(tenancy.quotas.consume("acme", "users", 1) for _ in range(9)), return_exceptions=True
    )
    refused = [x for x in outcomes if isinstance(x, BaseException)]
    assert len(refused) == 4 and all(isinstance(x, QuotaExceededError) for x in refused)
    assert {u.resource: u.used for u in await tenancy.quotas.usage("acme")}["users"] == 5


async def test_every_operation_is_audited(tenancy: Tenancy) -> None:
    """The log has one entry for each change, in order, with what changed."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.update("acme", tier="pro")
    await tenancy.tenants.suspend("acme", reason="unpaid")
    await tenancy.tenants.activate("acme")
    await tenancy.quotas.set("acme", {"users": 7})
    tenant = await tenancy.tenants.delete("acme")
    await tenancy.tenants.restore("acme")
    await tenancy.tenants.delete("acme")
    await tenancy.tenants.purge("acme")
    events = list(reversed(await tenancy.audit.events(tenant=tenant.id, limit=100)))
    assert [event.action for event in events] == [
        "tenant.create",
        "tenant.activate",
        "tenant.update",
        "tenant.suspend",
        "tenant.activate",
        "quota.set",
        "tenant.delete",
        "tenant.restore",
        "tenant.delete",
        "tenant.purge_begin",
        "tenant.purge",
    ]
    update = events[2]
    assert (update.before, update.after) == ({"tier": "free"}, {"tier": "pro"})


async def test_a_refused_change_is_not_audited(tenancy: Tenancy) -> None:
    """The audit row shares the transaction of the change: neither without the other."""
    created = await tenancy.tenants.create("acme")
    before = len(await tenancy.audit.events(tenant=created.id, limit=100))
    with pytest.raises(InvalidTransitionError):
        await tenancy.tenants.start_trial("acme", ends_at=LATER)
    assert len(await tenancy.audit.events(tenant=created.id, limit=100)) == before


async def test_no_secret_is_kept_in_the_clear(tenancy: Tenancy) -> None:
    """A dump of every control table holds neither the API key's secret nor the role's password."""
    created = await tenancy.tenants.create("acme")
    password = tenancy.internals.provisioner.password(created.tenant)
    secret = created.api_key.rsplit("_", 1)[-1]
    async with tenancy.internals.control.transaction() as connection:
        tables = await connection.scalars(
            text("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'tenancy'")
        )
        dump = ""
        for table in list(tables):
            rows = await connection.execute(text(f"SELECT t::text FROM {table} t"))
            dump += "\n".join(row[0] for row in rows)
    assert created.slug in dump
    assert secret not in dump and secret[:20] not in dump
    assert password not in dump
    assert secret not in repr(created) and secret not in str(created)


# --- the edges of binding, opening and naming -----------------------------------------------------------------------


async def test_a_tenant_that_is_being_created_cannot_be_activated_by_hand(tenancy: Tenancy) -> None:
    """Only the creation itself ends it: until then there may be no database."""
    draft = TenantDraft(
        id=uuid7(), slug="acme", tier="free", server="default", database="x", role="x", sealed_password=b"x" * 40
    )
    found = await tenancy.internals.registry.register(draft)
    for change in (tenancy.tenants.activate, tenancy.tenants.suspend, tenancy.tenants.delete, tenancy.tenants.restore):
        with pytest.raises(InvalidTransitionError):
            await change(found)
    assert (await tenancy.tenants.get("acme")).status is Status.PROVISIONING
    with pytest.raises(TenantProvisioningError):
        async with tenancy.session("acme"):
            pass


async def test_each_does_not_switch_a_scope(tenancy: Tenancy) -> None:
    """An iterator that was made outside cannot be moved on inside another tenant's scope."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    fleet = tenancy.each()
    async with tenancy.scope("globex"):
        with pytest.raises(CrossTenantError):
            await anext(fleet)
        assert current_tenant().slug == "globex"


async def test_each_binds_in_turn_and_a_break_ends_it(tenancy: Tenancy) -> None:
    """Inside, the tenant is bound; after the loop, however it is left, none is."""
    for slug in ("acme", "globex"):
        await tenancy.tenants.create(slug)
    assert [current_tenant().slug async for _ in tenancy.each()] == ["acme", "globex"]
    assert current_tenant_or_none() is None
    async for tenant in tenancy.each():
        assert await tenancy.fetch_value("SELECT current_database()") == tenant.placement.database  # type: ignore[union-attr]
        break
    assert current_tenant_or_none() is None


async def test_a_former_slug_names_the_bound_tenant(tenancy: Tenancy) -> None:
    """Code that names its own tenant by the slug it had is not an intruder."""
    await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    async with tenancy.scope("acme"), tenancy.session("acme") as session:
        assert await session.scalar(text("SELECT 1")) == 1
    async with tenancy.scope("acme-corp"):
        with pytest.raises(CrossTenantError):
            async with tenancy.session("globex"):
                pass


async def test_run_gives_every_argument_to_the_function(tenancy: Tenancy) -> None:
    """Coroutine functions are awaited, plain ones run in a thread; both see the tenant."""
    await tenancy.tenants.create("acme")

    async def ask(*, tenant: str) -> str:
        return f"{tenant} {current_tenant().slug}"

    assert await tenancy.run("acme", ask, tenant="x") == "x acme"
    assert await tenancy.run("acme", lambda: current_tenant().slug) == "acme"


async def test_nested_blocks_close_once(tenancy: Tenancy) -> None:
    """An application's lifespan inside a script's block does not close it for the script."""
    async with tenancy:
        async with tenancy.lifespan(None) as state:
            assert state["tenancy"] is tenancy
        assert tenancy.is_open
        await tenancy.tenants.create("acme")
    assert not tenancy.is_open


@pytest.mark.parametrize("slug", ["deadbeef" * 4, "deadbeef-dead-beef-dead-beefdeadbeef"])
async def test_a_slug_that_reads_as_an_id_is_refused(tenancy: Tenancy, slug: str) -> None:
    """It would be looked for as an id, and never found."""
    with pytest.raises(InvalidSlugError, match="not be a UUID"):
        await tenancy.tenants.create(slug)


async def _role(tenancy: Tenancy, tenant: Tenant) -> tuple[bool, int]:
    """Whether the tenant's role may log in, and its connection limit."""
    assert tenant.placement is not None
    admin = await tenancy.internals.servers["default"].connect_admin()
    try:
        row = await admin.fetchrow(
            "SELECT rolcanlogin, rolconnlimit FROM pg_roles WHERE rolname = $1", tenant.placement.role
        )
    finally:
        await admin.close()
    return (row["rolcanlogin"], row["rolconnlimit"])


async def test_a_new_tier_brings_its_connection_limit(tenancy: Tenancy) -> None:
    """At once, not at the next reconcile."""
    created = await tenancy.tenants.create("acme", tier="free")
    assert await _role(tenancy, created.tenant) == (True, tenancy.config.tiers["free"].connection_limit)
    await tenancy.tenants.update("acme", tier="enterprise")
    assert await _role(tenancy, created.tenant) == (True, tenancy.config.tiers["enterprise"].connection_limit)


async def test_changes_at_once_leave_the_role_as_the_registry_has_it(tenancy: Tenancy) -> None:
    """Whatever the order in which they reach the server, the last commit decides about the login."""
    created = await tenancy.tenants.create("acme")
    for _ in range(6):
        await asyncio.gather(
            tenancy.tenants.suspend("acme"),
            tenancy.tenants.activate("acme"),
            tenancy.tenants.suspend("acme"),
            tenancy.tenants.activate("acme"),
            return_exceptions=True,
        )
        status = (await tenancy.tenants.get("acme")).status
        assert (await _role(tenancy, created.tenant))[0] is (status is Status.ACTIVE)


async def test_a_cancelled_suspension_is_whole_or_nothing(tenancy: Tenancy) -> None:
    """A handler that is cancelled after the commit has blocked the login all the same."""
    created = await tenancy.tenants.create("acme")
    for turns in range(0, 60, 3):
        task = asyncio.create_task(tenancy.tenants.suspend("acme"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        status = (await tenancy.tenants.get("acme")).status
        assert (await _role(tenancy, created.tenant))[0] is (status is Status.ACTIVE)
        if status is not Status.ACTIVE:
            await tenancy.tenants.activate("acme")


async def test_every_manager_takes_a_slug_an_id_or_a_tenant(tenancy: Tenancy) -> None:
    """Also an id as text, and a slug that was given up and still leads to the tenant."""
    created = await tenancy.tenants.create("acme")
    await tenancy.tenants.rename("acme", "acme-corp")
    tenant = await tenancy.tenants.get("acme-corp")
    for reference in ("acme-corp", "acme", created.id, str(created.id), tenant):
        assert (await tenancy.tenants.get(reference)).id == created.id
        assert await tenancy.quotas.usage(reference)
        assert len(await tenancy.keys.list(reference)) == 1
        assert await tenancy.domains.list(reference) == []
        assert await tenancy.fetch_value("SELECT 1", tenant=reference) == 1
