"""The directory: what it remembers, for how long, and what it asks the control database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url, text

from tenancy_orm.control.lookup import find_tenant_id
from tenancy_orm.errors import ControlUnavailableError, InvalidCredentialError, TenantNotFoundError
from tenancy_orm.events import DirectoryMissed, DirectoryUnavailable
from tenancy_orm.keys.format import generate_key
from tenancy_orm.tenant import Status
from tests.support.control import Clock, ControlPlane, control_plane, follow
from tests.support.postgres import Postgres
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import until

if TYPE_CHECKING:
    from tenancy_orm import TenancyConfig

T = TypeVar("T")


@pytest.fixture
async def plane(control_url: str) -> AsyncIterator[ControlPlane]:
    """A control plane with a directory that gets no notifications: its cache lives by TTL."""
    # a look-up that waits for a lock of the test must not end before it, however slow the machine is
    async with control_plane(control_url, opened=False, directory={"timeout": 60.0}) as opened:
        yield opened


def looked_up(plane: ControlPlane) -> int:
    """How many keys and tenants were asked of the control database."""
    return sum(event.keys + event.tenants for event in plane.seen if isinstance(event, DirectoryMissed))


# --- hits and misses ------------------------------------------------------------------------------------------------


async def test_a_key_is_looked_up_once(plane: ControlPlane) -> None:
    """From then on it is known, without I/O."""
    tenant, key = await plane.tenant("acme")
    assert plane.directory.peek(key) is None
    await plane.directory.authenticate(key)
    before = looked_up(plane)
    for _ in range(3):
        assert (await plane.directory.authenticate(key)).tenant == tenant
    assert plane.directory.peek(key) is not None
    assert looked_up(plane) == before


async def test_no_look_up_asks_the_server_for_a_type(
    control_url: str, plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asyncpg asks for one that it does not know on each connection; the first request of a process waited for that."""
    asked: list[object] = []
    introspect = asyncpg.Connection._introspect_types

    async def record(self: object, typeoids: object, timeout: object) -> object:
        asked.append(typeoids)
        return await introspect(self, typeoids, timeout)

    tenant, key = await plane.tenant("acme")
    bound = await plane.key("acme", networks=["10.0.0.0/8", "2001:db8::/32"])
    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", record)
    async with control_plane(control_url, initialise=False, opened=False) as fresh:
        assert (await fresh.directory.authenticate(key)).tenant.id == tenant.id
        assert (await fresh.directory.authenticate(bound.text, source="10.1.2.3")).tenant.id == tenant.id
        with pytest.raises(InvalidCredentialError):
            await fresh.directory.authenticate(bound.text, source="192.0.2.1")
        assert (await fresh.directory.tenant("acme")).id == tenant.id
        assert [str(network) for network in bound.info.networks] == ["10.0.0.0/8", "2001:db8::/32"]
        assert asked == []


async def test_a_key_makes_its_tenant_known(plane: ControlPlane) -> None:
    """By id and by slug: a request needs one query, not two."""
    tenant, key = await plane.tenant("acme")
    await plane.directory.authenticate(key)
    before = looked_up(plane)
    for ref in (tenant, tenant.id, str(tenant.id), "acme"):
        assert (await plane.directory.tenant(ref)) == tenant
    assert looked_up(plane) == before


async def test_however_many_wait_there_is_one_query(plane: ControlPlane) -> None:
    """A thousand requests with one new key are one look-up."""
    _, key = await plane.tenant("acme")
    before = len(plane.of(DirectoryMissed))
    credentials = await asyncio.gather(*(plane.directory.authenticate(key) for _ in range(1_000)))
    assert {credential.tenant.slug for credential in credentials} == {"acme"}
    assert len(plane.of(DirectoryMissed)) == before + 1


async def test_many_new_keys_share_few_queries(plane: ControlPlane) -> None:
    """A process that starts under load asks for its keys together."""
    tenant, _ = await plane.tenant("acme")
    issued = [await plane.key(tenant) for _ in range(50)]
    before = len(plane.of(DirectoryMissed))
    found = await asyncio.gather(*(plane.directory.authenticate(key.text) for key in issued))
    assert [credential.id for credential in found] == [key.key_id for key in issued]
    assert len(plane.of(DirectoryMissed)) - before <= 3


async def test_a_cancelled_request_fails_no_other(plane: ControlPlane) -> None:
    """Whoever asked first may go; the others get their answer."""
    _, key = await plane.tenant("acme")
    first = asyncio.create_task(plane.directory.authenticate(key))
    others = [asyncio.create_task(plane.directory.authenticate(key)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert {(await other).tenant.slug for other in others} == {"acme"}


async def test_an_unknown_key_is_remembered_as_unknown(plane: ControlPlane) -> None:
    """For ``negative_ttl``, and asked for again after it."""
    await plane.tenant("acme")
    key = generate_key("ten_live").text
    for _ in range(3):
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(key)
    assert looked_up(plane) == 1


async def test_a_malformed_key_is_refused_without_a_look_up(plane: ControlPlane) -> None:
    """A typing error in any character is found by the checksum."""
    _, key = await plane.tenant("acme")
    typed = key[:-10] + ("a" if key[-10] != "a" else "b") + key[-9:]
    for text_ in (typed, "", "x" * 100_000, key + "x", key.replace("ten_live", "ten_test"), "\ud800"):
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(text_)
    assert looked_up(plane) == 0


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_a_flood_of_random_keys_evicts_no_good_one(control_url: str) -> None:
    """Nor does it grow memory: what is unknown has a memory of its own, and that is bounded."""
    # the flood takes seconds: longer than a look-up's deadline on a busy machine, and than a key may be remembered
    options: dict[str, Any] = {"directory": {"size": 10, "timeout": 60.0}, "lockout": {"failures": 0}}
    async with control_plane(control_url, opened=False, clock=Clock(), **options) as plane:
        _, key = await plane.tenant("acme")
        await plane.directory.authenticate(key)
        flood = (plane.directory.authenticate(generate_key("ten_live").text) for _ in range(11_000))
        outcomes = await asyncio.gather(*flood, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {InvalidCredentialError}
        assert plane.directory.peek(key) is not None
        assert plane.directory.statistics.negative <= 10_000
        assert plane.directory.statistics.keys == 1


async def test_the_memory_of_keys_is_bounded(control_url: str) -> None:
    """What is in use stays when room is made."""
    async with control_plane(control_url, opened=False, directory={"size": 10}) as plane:
        tenant, busy = await plane.tenant("acme")
        await plane.directory.authenticate(busy)
        for _ in range(40):
            issued = await plane.key(tenant)
            await plane.directory.authenticate(issued.text)
            assert plane.directory.peek(busy) is not None
        assert plane.directory.statistics.keys == 10


async def test_the_sources_remembered_of_a_key_are_bounded(plane: ControlPlane) -> None:
    """A key that is bound to a large network and used from all over it."""
    tenant, _ = await plane.tenant("acme")
    issued = await plane.key(tenant, networks=["10.0.0.0/8"])
    for number in range(200):
        await plane.directory.authenticate(issued.text, source=f"10.0.0.{number}")
    (entry,) = plane.directory._cache.keys.entries.values()
    assert entry.admitted is not None
    assert 0 < len(entry.admitted) <= 64
    assert plane.directory.peek(issued.text, "10.0.0.199") is not None


async def test_a_tenant_whose_keys_are_forgotten_is_kept_nowhere(plane: ControlPlane) -> None:
    """Whether they went by themselves or with it."""
    for change in ("key", "tenant"):
        tenant, key = await plane.tenant(f"acme-{change}")
        credential = await plane.directory.authenticate(key)
        assert plane.directory._cache._by_tenant
        changed = {"key_id": credential.id} if change == "key" else {"tenant_id": tenant.id}
        plane.directory.invalidate(**changed)
        assert not plane.directory._cache._by_tenant
        assert not plane.directory._cache._by_key_id


# --- time -----------------------------------------------------------------------------------------------------------


async def test_what_is_known_is_looked_up_again_after_its_ttl(control_url: str) -> None:
    """Without an invalidation a revoked key works until then, and no longer."""
    clock = Clock()
    async with control_plane(control_url, opened=False, clock=clock, directory={"ttl": 100.0}) as plane:
        _, key = await plane.tenant("acme")
        credential = await plane.directory.authenticate(key)
        async with plane.control.transaction() as connection:
            query = text("UPDATE tenancy.api_keys SET revoked_at = now() WHERE id = :id")
            await connection.execute(query, {"id": credential.id})
        clock.now += 99.0
        assert plane.directory.peek(key) is not None
        clock.now += 1.0
        assert plane.directory.peek(key) is None
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(key)


async def test_time_counts_from_when_the_control_database_was_asked(
    control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow answer does not make it true for longer: neither a key's expiry nor the TTL of anything."""
    clock = Clock()
    async with control_plane(control_url, opened=False, clock=clock, directory={"ttl": 100.0}) as plane:
        tenant, key = await plane.tenant("acme")
        ending = await plane.key(tenant, expires_at=datetime.now(UTC) + timedelta(seconds=50))
        # connects; from then on every query takes ten seconds
        await plane.directory.authenticate(key)
        plane.directory.invalidate()
        control = plane.directory._lookups._control
        fetch = control.fetch

        async def slow(*args: Any) -> Any:
            rows = await fetch(*args)
            clock.now += 10.0
            return rows

        monkeypatch.setattr(control, "fetch", slow)
        start = clock.now
        await plane.directory.authenticate(ending.text)
        assert plane.directory.peek(ending.text) is not None
        clock.now = start + 50.0
        assert plane.directory.peek(ending.text) is None
        start = clock.now
        await plane.directory.authenticate(key)
        await plane.directory.tenant("acme")
        clock.now = start + 99.0
        assert plane.directory.peek(key) is not None
        assert plane.directory.peek_tenant(tenant) is not None
        clock.now = start + 100.0
        assert plane.directory.peek(key) is None
        assert plane.directory.peek_tenant(tenant) is None
        start = clock.now
        assert await plane.directory.tenant("acme") == tenant
        clock.now = start + 100.0
        assert plane.directory.peek_tenant(tenant) is None


async def test_expiry_is_by_the_control_databases_clock(control_url: str) -> None:
    """Clocks of processes differ; here the database's is an hour ahead of this one's."""
    async with control_plane(control_url, opened=False) as plane:
        tenant, _ = await plane.tenant("acme")
        keys = [await plane.key(tenant, expires_at=datetime.now(UTC) + timedelta(minutes=m)) for m in (50, 70)]
        async with plane.control.transaction() as connection:
            ahead = "SELECT pg_catalog.now() + interval '1 hour'"
            for statement in (
                "CREATE SCHEMA clock",
                f"CREATE FUNCTION clock.now() RETURNS timestamptz LANGUAGE sql AS $$ {ahead} $$",
                f'ALTER DATABASE "{plane.control.database}" SET search_path = clock, pg_catalog, public',
            ):
                await connection.execute(text(statement))
        await plane.directory._lookups._control.engine.dispose()
        with pytest.raises(InvalidCredentialError) as caught:
            await plane.directory.authenticate(keys[0].text)
        assert caught.value.reason == "expired"
        assert (await plane.directory.authenticate(keys[1].text)).tenant == tenant


# --- tenants --------------------------------------------------------------------------------------------------------


async def test_an_unknown_tenant_is_not_found(plane: ControlPlane) -> None:
    """By slug and by id; what cannot be a slug is not even asked for."""
    for ref in ("nobody", uuid4()):
        for _ in range(2):
            with pytest.raises(TenantNotFoundError):
                await plane.directory.tenant(ref)
    assert looked_up(plane) == 2
    for ref in ("", "Acme", "a b", "x" * 300, "a';--", "naïve"):
        with pytest.raises(TenantNotFoundError):
            await plane.directory.tenant(ref)
    assert looked_up(plane) == 2


async def test_a_new_tenant_is_found_though_it_was_asked_for_before(plane: ControlPlane) -> None:
    """An invalidation of any tenant clears what was not found."""
    with pytest.raises(TenantNotFoundError):
        await plane.directory.tenant("acme")
    tenant, _ = await plane.tenant("acme")
    plane.directory.invalidate(tenant_id=tenant.id)
    assert await plane.directory.tenant("acme") == tenant


async def test_a_purged_tenant_is_not_found(plane: ControlPlane) -> None:
    """Its tombstone stays in the registry; its slug is another's from then on."""
    tenant, _ = await plane.tenant("acme")
    assert await plane.directory.tenant("acme") == tenant
    await plane.registry.transition(tenant.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(tenant.id)
    await plane.registry.finish_purge(tenant.id)
    plane.directory.invalidate(tenant_id=tenant.id)
    for ref in ("acme", tenant.id, tenant):
        with pytest.raises(TenantNotFoundError):
            await plane.directory.tenant(ref)
    successor, _ = await plane.tenant("acme")
    plane.directory.invalidate(tenant_id=successor.id)
    assert (await plane.directory.tenant("acme")).id == successor.id


async def test_a_slug_that_passed_on_is_not_forgotten_with_its_former_owner(plane: ControlPlane) -> None:
    """Forgetting the old owner later does not take the slug from the new one."""
    first, _ = await plane.tenant("acme")
    await plane.directory.tenant(first)
    async with plane.control.transaction() as connection:
        query = text("UPDATE tenancy.tenants SET slug = 'acme-old' WHERE id = :id")
        await connection.execute(query, {"id": first.id})
    second, _ = await plane.tenant("acme")
    assert (await plane.directory.tenant(second)).slug == "acme"
    plane.directory.invalidate(tenant_id=first.id)
    before = looked_up(plane)
    assert await plane.directory.tenant("acme") == second
    assert looked_up(plane) == before


async def test_former_slugs_and_verified_domains_name_a_tenant(plane: ControlPlane) -> None:
    """A domain that is only claimed does not."""
    tenant, _ = await plane.tenant("acme")
    async with plane.control.transaction() as connection:
        for statement in (
            "INSERT INTO tenancy.former_slugs VALUES ('acme-old', :id, now() + interval '1 hour')",
            "INSERT INTO tenancy.former_slugs VALUES ('acme-older', :id, now() - interval '1 hour')",
            "INSERT INTO tenancy.domains (domain, tenant_id, token, verified_at) VALUES ('a.test', :id, 't', now())",
            "INSERT INTO tenancy.domains (domain, tenant_id, token) VALUES ('b.test', :id, 't')",
        ):
            await connection.execute(text(statement), {"id": tenant.id})
    for name in ("acme-old", "a.test"):
        assert await plane.directory.tenant(name) == tenant
    for name in ("acme-older", "b.test"):
        with pytest.raises(TenantNotFoundError):
            await plane.directory.tenant(name)
    before = looked_up(plane)
    assert await plane.directory.tenant("a.test") == tenant
    assert looked_up(plane) == before


async def test_cold_tenants_are_looked_up_together(control_url: str) -> None:
    """The control database gets few queries, on few connections."""
    async with control_plane(control_url) as plane:
        tenants = [(await plane.tenant(f"tenant-{number}"))[0] for number in range(300)]
        plane.directory.invalidate()
        queries: list[DirectoryMissed] = []
        plane.events.subscribe(DirectoryMissed, queries.append)
        found = await asyncio.gather(*(plane.directory.tenant(tenant.slug) for tenant in tenants))
        assert [one.id for one in found] == [tenant.id for tenant in tenants]
        # two workers begin with what there is, and take up to two hundred from then on
        assert len(queries) <= 4
        assert sum(query.tenants for query in queries) == 300
        assert plane.directory._lookups._control.engine.sync_engine.pool.checkedin() <= 2  # type: ignore[attr-defined]


async def test_the_directory_and_the_registry_agree_on_every_name(plane: ControlPlane) -> None:
    """They look names up by two queries: one of many names at once, one of a single name."""
    acme, _ = await plane.tenant("acme")
    purged, _ = await plane.tenant("initech")
    await plane.registry.rename(purged.id, "initech-corp", redirect_seconds=3_600.0)
    globex, _ = await plane.tenant("globex")
    async with plane.control.transaction() as connection:
        for name, interval in (("acme-old", "1 hour"), ("acme-older", "-1 hour")):
            query = f"INSERT INTO tenancy.former_slugs VALUES ('{name}', :id, now() + interval '{interval}')"
            await connection.execute(text(query), {"id": acme.id})
        for domain, owner, verified in (
            ("a.test", acme, "now()"),
            ("a.test", globex, "NULL"),
            ("b.test", acme, "NULL"),
            ("c.test", purged, "now()"),
        ):
            values = f"('{domain}', :id, 't', {verified})"
            query = f"INSERT INTO tenancy.domains (domain, tenant_id, token, verified_at) VALUES {values}"
            await connection.execute(text(query), {"id": owner.id})
    await plane.registry.transition(purged.id, Status.DELETED, action="tenant.delete")
    await plane.registry.begin_purge(purged.id)
    await plane.registry.finish_purge(purged.id)
    expected = {
        **dict.fromkeys(("acme", "acme-old", "a.test", str(acme.id), acme.id.hex, acme.id.hex.upper()), acme.id),
        "globex": globex.id,
        **dict.fromkeys(("acme-older", "b.test", "c.test", "initech", "initech-corp", "nobody"), None),
        **dict.fromkeys(("", "Acme", "acme.", "a.test.", "*", "acme\0", "x" * 300, f"{{{acme.id}}}"), None),
        f"urn:uuid:{acme.id}": None,
    }
    found: dict[str, list[Any]] = {}
    for name in expected:
        found[name] = []
        for look_up in (plane.directory.tenant, plane.registry.find, partial(find_id, plane)):
            try:
                found[name].append(getattr(answer := await look_up(name), "id", answer))
            except TenantNotFoundError:
                found[name].append(None)
    assert found == {name: [answer] * 3 for name, answer in expected.items()}


async def find_id(plane: ControlPlane, name: str) -> Any:
    async with plane.control.connect() as connection:
        return await find_tenant_id(connection, name)


# --- invalidation ---------------------------------------------------------------------------------------------------


async def test_what_was_read_before_an_invalidation_is_not_remembered(plane: ControlPlane) -> None:
    """A look-up that a revocation overtakes must not put the old answer back."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    for invalidated in ({"key_id": credential.id}, {"tenant_id": credential.tenant.id}, {}):
        plane.directory.invalidate()
        async with plane.control.transaction() as connection:
            # the look-up has started, and waits while the change is made
            await connection.execute(text("LOCK TABLE tenancy.api_keys IN ACCESS EXCLUSIVE MODE"))
            waiting = asyncio.create_task(plane.directory.authenticate(key))
            query = text(
                "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
                "WHERE NOT l.granted AND d.datname = current_database()"
            )
            await until(lambda: connection.scalar(query))  # noqa: B023 - called before the loop goes on
            plane.directory.invalidate(**invalidated)
        await waiting
        assert plane.directory.peek(key) is None, invalidated
        await plane.directory.authenticate(key)
        assert plane.directory.peek(key) is not None


async def test_a_key_read_before_everything_is_to_be_looked_up_again_is_not_remembered(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listener came back while it was read: a change in between may have been missed."""
    _, key = await plane.tenant("acme")
    follow(monkeypatch, plane.directory._lookups._keys, plane.directory.revalidate)
    await plane.directory.authenticate(key)
    assert plane.directory.peek(key) is None


@pytest.mark.parametrize("change", ["tenant", "everything", "unknown"])
async def test_a_tenant_that_changed_while_it_was_read_is_not_remembered(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As with keys: the old answer must not be put back."""
    tenant, _ = await plane.tenant("acme")
    changes = {
        "tenant": lambda: plane.directory.invalidate(tenant_id=tenant.id),
        "everything": plane.directory.invalidate,
        "unknown": plane.directory.revalidate,
    }
    follow(monkeypatch, plane.directory._lookups._tenants, changes[change])
    for ref in ("acme", tenant.id):
        assert await plane.directory.tenant(ref) == tenant
        assert plane.directory.peek_tenant(tenant) is None


async def test_a_tenant_that_was_made_while_it_was_asked_for_is_not_remembered_as_missing(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it uses it at once."""

    async def make() -> None:
        monkeypatch.undo()
        tenant, _ = await plane.tenant("acme")
        plane.directory.invalidate(tenant_id=tenant.id)

    follow(monkeypatch, plane.directory._lookups._tenants, make)
    with pytest.raises(TenantNotFoundError):
        await plane.directory.tenant("acme")
    assert (await plane.directory.tenant("acme")).slug == "acme"


async def test_everything_is_looked_up_again_when_invalidations_may_have_been_missed(plane: ControlPlane) -> None:
    """Keys, tenants, and what was not found."""
    tenant, key = await plane.tenant("acme")
    unknown = generate_key("ten_live").text

    async def ask() -> int:
        before = looked_up(plane)
        await plane.directory.tenant("acme")
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(unknown)
        with pytest.raises(TenantNotFoundError):
            await plane.directory.tenant("nobody")
        return looked_up(plane) - before

    assert await ask() == 3
    assert await ask() == 0
    await plane.directory.authenticate(key)
    plane.directory.revalidate()
    assert plane.directory.peek(key) is None
    assert plane.directory.peek_tenant(tenant) is None
    assert await ask() == 3


async def test_callbacks_learn_which_tenant_changed(plane: ControlPlane) -> None:
    """One that fails keeps nothing from the others; a change of a key is not one of its tenant."""
    tenant, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)
    seen: list[object] = []

    def fail(tenant_id: object) -> None:
        raise RuntimeError("boom")

    plane.directory.on_invalidate(fail)
    plane.directory.on_invalidate(seen.append)
    plane.directory.invalidate(key_id=credential.id)
    plane.directory.invalidate(tenant_id=tenant.id)
    plane.directory.invalidate()
    plane.directory.revalidate()
    assert seen == [tenant.id, None, None]


# --- the control database away --------------------------------------------------------------------------------------


@pytest.fixture
async def proxy(control_url: str) -> AsyncIterator[Proxy]:
    """The network between the directory and its database."""
    async with proxied(control_url) as opened:
        yield opened


async def expired(plane: ControlPlane, key: str) -> None:
    """Wait until a key must be looked up again."""
    await until(lambda: plane.directory.peek(key) is None)


def without_waiting(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing."""
    try:
        waits_for = work.send(None)
    except StopIteration as done:
        returned: T = done.value
        return returned
    work.close()
    raise AssertionError(f"it waits for {waits_for!r}")


@pytest.mark.parametrize("how", ["refuse", "swallow"])
async def test_known_keys_keep_working_while_the_control_database_is_away(
    control_url: str, proxy: Proxy, how: str
) -> None:
    """Past their TTL and within the grace time; after the first failure without waiting. Unknown ones get an error."""
    options: dict[str, Any] = {"directory": {"ttl": 0.05, "grace": 60.0, "timeout": 0.5}}
    async with control_plane(control_url, through=proxy.url(control_url), opened=False, **options) as plane:
        tenant, key = await plane.tenant("acme")
        unknown = (await plane.key(tenant)).text
        await plane.directory.authenticate(key)
        getattr(proxy, how)()
        await expired(plane, key)
        assert (await plane.directory.authenticate(key)).tenant == tenant
        assert len(plane.of(DirectoryUnavailable)) == 1
        for _ in range(100):
            assert without_waiting(plane.directory.authenticate(key)).tenant == tenant
            assert without_waiting(plane.directory.tenant("acme")) == tenant
        with pytest.raises(ControlUnavailableError):
            without_waiting(plane.directory.authenticate(unknown))
        with pytest.raises(ControlUnavailableError):
            without_waiting(plane.directory.tenant("other"))
        proxy.restore()
        proxy.cut()
        await until(lambda: plane.directory.statistics.control_available)
        assert (await plane.directory.authenticate(unknown)).tenant == tenant


@pytest.mark.parametrize("trouble", ["password", "timeout"])
async def test_known_keys_keep_working_while_the_control_database_refuses(
    control_url: str, postgres: Postgres, trouble: str
) -> None:
    """A password being changed, a cancelled look-up: as an outage. Unknown keys are not admitted."""
    role = f"{make_url(control_url).database}_reader"
    through = make_url(control_url).set(username=role, password="one").render_as_string(hide_password=False)
    admin = await asyncpg.connect(postgres.admin_url)
    try:
        await admin.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'one'")
        async with control_plane(control_url, through=through, opened=False, directory={"ttl": 0.05}) as plane:
            _, key = await plane.tenant("acme")
            await plane.directory.authenticate(key)
            refusal = "PASSWORD 'two'" if trouble == "password" else "SET statement_timeout = '50ms'"
            await admin.execute(f"ALTER ROLE {role} {refusal}")
            await plane.directory._lookups._control.engine.dispose()
            async with plane.control.transaction() as connection:
                if trouble == "timeout":
                    await connection.execute(text("LOCK TABLE tenancy.api_keys IN ACCESS EXCLUSIVE MODE"))
                await until(lambda: plane.directory.peek(key) is None)
                assert (await plane.directory.authenticate(key)).tenant.slug == "acme"
                with pytest.raises(ControlUnavailableError):
                    await plane.directory.authenticate(generate_key("ten_live").text)
    finally:
        await admin.execute(f"DROP ROLE {role}")
        await admin.close()


async def test_nothing_works_on_memory_after_the_grace_time(control_url: str, proxy: Proxy) -> None:
    """Known keys get the same error as unknown ones then."""
    options: dict[str, Any] = {"directory": {"ttl": 0.05, "grace": 0.2, "timeout": 0.5}}
    async with control_plane(control_url, through=proxy.url(control_url), opened=False, **options) as plane:
        _, key = await plane.tenant("acme")
        await plane.directory.authenticate(key)
        proxy.refuse()
        await expired(plane, key)
        assert (await plane.directory.authenticate(key)).tenant.slug == "acme"

        async def unavailable() -> bool:
            try:
                await plane.directory.authenticate(key)
            except ControlUnavailableError:
                return True
            return False

        await until(unavailable)
        with pytest.raises(ControlUnavailableError):
            await plane.directory.tenant("acme")


async def test_a_refused_key_stays_refused_while_the_control_database_is_away(control_url: str, proxy: Proxy) -> None:
    """The grace time is for what worked: revoked, expired and invalidated keys do not come back."""
    options: dict[str, Any] = {"directory": {"ttl": 0.05, "grace": 60.0, "timeout": 0.5}}
    async with control_plane(control_url, through=proxy.url(control_url), opened=False, **options) as plane:
        tenant, invalidated = await plane.tenant("acme")
        revoked = await plane.key(tenant)
        await plane.keys.revoke(revoked.key_id)
        await plane.directory.authenticate(invalidated)
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(revoked.text)
        proxy.refuse()
        plane.directory.invalidate(key_id=(await plane.keys.list(tenant.id))[0].key_id)
        await asyncio.sleep(0.06)
        with pytest.raises(InvalidCredentialError):
            await plane.directory.authenticate(revoked.text)
        with pytest.raises(ControlUnavailableError):
            await plane.directory.authenticate(invalidated)


async def test_a_key_that_is_invalidated_while_it_is_looked_up_again_does_not_work_on(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage after the key was invalidated: the grace time does not apply to it."""
    _, key = await plane.tenant("acme")
    credential = await plane.directory.authenticate(key)

    async def invalidated_and_gone() -> None:
        plane.directory.invalidate(key_id=credential.id)
        raise ControlUnavailableError("gone")

    follow(monkeypatch, plane.directory._lookups._keys, invalidated_and_gone)
    plane.directory.revalidate()
    with pytest.raises(ControlUnavailableError):
        await plane.directory.authenticate(key)


async def test_whatever_asking_whether_it_is_back_raises_it_is_asked_again(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the outage would last until the process is restarted."""
    monkeypatch.setattr("tenancy_orm.authentication.lookups._PROBE_SECONDS", 0.01)
    fetch, failures = plane.directory._lookups._control.fetch, 3

    async def fail(query: str) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RuntimeError("unforeseen")
        return await fetch(query)

    monkeypatch.setattr(plane.directory._lookups._control, "fetch", fail)
    plane.directory._lookups._begin_probing()
    assert not plane.directory.statistics.control_available
    await until(lambda: plane.directory.statistics.control_available)
    assert failures < 0


# --- open and close -------------------------------------------------------------------------------------------------


def background() -> set[str]:
    """The directory's tasks that are not done."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return {
        name
        for name in names
        if name.startswith(("Directory.", "DirectoryLookups.", "Listener.", "KeyJournal.", "BatchLoader."))
    }


async def test_closing_with_a_look_up_under_way_leaves_nothing(plane: ControlPlane) -> None:
    """Its caller gets an error, and no outage of the control database is reported."""
    _, key = await plane.tenant("acme")
    async with plane.control.transaction() as connection:
        await connection.execute(text("LOCK TABLE tenancy.api_keys IN ACCESS EXCLUSIVE MODE"))
        waiting = asyncio.create_task(plane.directory.authenticate(key))
        query = text(
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
            "WHERE NOT l.granted AND d.datname = current_database()"
        )
        await until(lambda: connection.scalar(query))
        await plane.directory.close()
        with pytest.raises(ControlUnavailableError):
            await waiting
    assert plane.of(DirectoryUnavailable) == []
    assert background() == set()
    with pytest.raises(ControlUnavailableError, match="closed"):
        await plane.directory.authenticate(key)


async def test_an_opening_that_is_given_up_leaves_nothing(tenancy_config: TenancyConfig) -> None:
    """A supervisor's deadline, while the listener waits for an answer."""
    from tenancy_orm import Tenancy

    async with proxied(tenancy_config.control_url) as proxy:
        proxy.swallow()
        tenancy = Tenancy(tenancy_config.replace(control={"listen_url": proxy.url(tenancy_config.control_url)}))
        opening = asyncio.create_task(tenancy.open(initialise=True))
        await until(lambda: proxy.connections)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        assert not tenancy.is_open
        assert background() == set()


async def test_a_restart_of_the_control_database_fails_no_look_up(control_url: str, proxy: Proxy) -> None:
    """A connection that the pool kept is dead; the look-up is made again on a new one."""
    async with control_plane(control_url, through=proxy.url(control_url), opened=False) as plane:
        tenant, key = await plane.tenant("acme")
        await plane.directory.authenticate(key)
        plane.directory.invalidate()
        proxy.cut()
        assert (await plane.directory.authenticate(key)).tenant == tenant
        assert plane.directory.statistics.control_available
