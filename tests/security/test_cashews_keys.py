"""cashews' cache: what one tenant caches answers no other, by key, pattern, tag, decorator or chance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import redis
from cashews import Cache, Command, TransactionMode, invalidate_further

from tenancy_orm import Status, Tenant, current_tenant, tenant_prefix
from tenancy_orm.context import bind
from tenancy_orm.errors import ConfigurationError, CrossTenantError, NoTenantError, UnprefixedError
from tenancy_orm.integrations import cashews as module
from tenancy_orm.integrations.cashews import TenantCache
from tests.support.redis_server import redis_server
from tests.support.waiting import until

# what cashews itself calls
pytestmark = pytest.mark.filterwarnings(
    "ignore:Call to deprecated close:DeprecationWarning", "ignore:`rewrite` deprecated:DeprecationWarning"
)

ACME = Tenant(id=UUID(int=1), slug="acme", status=Status.ACTIVE, tier="free")
GLOBEX = Tenant(id=UUID(int=2), slug="globex", status=Status.ACTIVE, tier="free")
A, G = f"t/{ACME.id}/", f"t/{GLOBEX.id}/"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A real Redis."""
    with redis_server() as found:
        yield found


@pytest.fixture(params=["mem", "redis"])
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[TenantCache]:
    """On each kind of store, with a key of each tenant's."""
    made = TenantCache()
    if request.param == "redis":
        url: str = request.getfixturevalue("server")
        with redis.Redis.from_url(url) as client:
            client.flushall()
        made.setup("redis://", address=url)
    else:
        made.setup("mem://")
    for tenant in (ACME, GLOBEX):
        with bind(tenant):
            await made.set("who", tenant.slug, tags=["everyone"])
    yield made
    if request.param == "redis":
        # what decorators do in the background would open connections again
        current = asyncio.current_task()
        await until(lambda: asyncio.all_tasks() <= {current})
    await made.close()


async def seen(cache: TenantCache) -> list[Any]:
    """What each tenant has under its key."""
    found = []
    for tenant in (ACME, GLOBEX):
        with bind(tenant):
            found.append(await cache.get("who"))
    return found


def barrier() -> Callable[[], Any]:
    """A function that returns when two have called it; one alone waits for a moment, and goes on."""
    arrived: list[int] = []
    both = asyncio.Event()

    async def meet() -> None:
        arrived.append(1)
        if len(arrived) == 2:
            both.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(both.wait(), 0.2)

    return meet


async def at_once(function: Callable[[], Any]) -> list[Any]:
    """What a decorated function returns to both tenants at the same time."""

    async def of(tenant: Tenant) -> Any:
        with bind(tenant):
            return await function()

    return list(await asyncio.gather(of(ACME), of(GLOBEX)))


# --- what goes wrong without it -------------------------------------------------------------------------------------


async def by_hand(call: Any, command: Command, backend: Any, *args: Any, **kwargs: Any) -> Any:
    """A middleware as one would write it, for the places that cashews documents."""
    for name in ("key", "pattern"):
        if name in kwargs:
            kwargs[name] = tenant_prefix() + kwargs[name]
    return await call(*args, **kwargs)


async def test_calls_at_once_share_a_result_in_spite_of_a_middleware() -> None:
    """The default ``protected=True`` joins calls with the same arguments, before any key is made."""
    cache = Cache()
    cache.setup("mem://", middlewares=(prefixed_by_hand,))
    meet = barrier()

    @cache(ttl=60)
    async def who() -> str:
        await meet()
        return current_tenant().slug

    assert await at_once(who) == ["acme", "acme"]
    await cache.close()


async def test_an_invalidation_reaches_all_tenants_in_spite_of_a_middleware() -> None:
    """Cashews' own middleware is outside of it where a pattern is read."""
    cache = Cache()
    cache.add_middleware(prefixed_by_hand)
    cache.setup("mem://")
    with bind(GLOBEX):
        await cache.set("x", 1)
    with bind(ACME), invalidate_further():
        assert [item async for item in cache.get_match("*")] == []
    with bind(GLOBEX):
        assert await cache.get("x") is None
    await cache.close()


prefixed_by_hand: Any = by_hand


# --- with it --------------------------------------------------------------------------------------------------------


async def test_each_tenant_has_its_own_keys(cache: TenantCache) -> None:
    """By every command that has one, and none of them changes another's."""
    with bind(ACME):
        assert await cache.get(f"../{GLOBEX.id}/who") is None and await cache.get(f"{G}who") is None
        assert await cache.get_many("who", "none", "who") == ("acme", None, "acme")
        await cache.set_many({"a": 1, "b": 2}, expire=60)
        assert await cache.incr("n") == 1 and await cache.exists("n") and not await cache.exists("m")
        await cache.expire("a", 30)
        assert 0 < await cache.get_expire("a") <= 30
        assert await cache.get_or_set("c", lambda: "made") == "made"
        await cache.set_add("s", "x", "y")
        assert set(await cache.set_pop("s", 10)) == {"x", "y"}
        await cache.set_add("s", "x")
        await cache.set_remove("s", "x")
        assert await cache.incr_bits("bits", 1, 2) == (1, 1) and await cache.get_bits("bits", 1, 3) == (1, 0)
        assert await cache.slice_incr("slice", 0, 10, maxvalue=5) == 1
        await cache.set_raw("raw", b"x")
        await cache.get_raw("raw")
        async with cache.lock("l", 10):
            assert await cache.is_locked("l")
            with bind_other(GLOBEX):
                assert not await cache.is_locked("l")
        assert {key async for key in cache.scan("*")} >= {"who", "a", "b", "n", "c"}
        assert {key: value async for key, value in cache.get_match("*")}["who"] == "acme"
        await cache.delete_many("a", "b")
        assert await cache.delete("n")
        await cache.delete_match("*")
        await cache.delete_match(f"{G}*")
        assert await cache.ping() in (b"PONG", b"PING")
    assert await seen(cache) == [None, "globex"]


def bind_other(tenant: Tenant) -> Any:
    """Another request's binding, amid this one's: what another task would have."""
    from contextlib import contextmanager

    from tenancy_orm.context import reset_current, set_current

    @contextmanager
    def bound() -> Iterator[None]:
        token = set_current(tenant)
        try:
            yield
        finally:
            reset_current(token)

    return bound()


async def test_an_iterator_that_was_kept_gives_nothing_to_another_tenant(cache: TenantCache) -> None:
    """Each step checks who is bound."""
    with bind(ACME):
        await cache.set_many({"a": 1, "b": 2})
        for found in (cache.scan("*"), cache.get_match("*")):
            await anext(found)
            with bind_other(GLOBEX), pytest.raises(CrossTenantError):
                await anext(found)


async def test_tags_are_each_tenant_s(cache: TenantCache) -> None:
    """A tag deletes its own tenant's keys; a key that is deleted leaves its tags."""
    with bind(ACME):
        await cache.delete_tags("everyone")
    assert await seen(cache) == [None, "globex"]

    async def numbered(number: int) -> str:
        return f"{current_tenant().slug} {number}"

    page = cache(ttl=60, key="page:{number}", tags=["pages"])(numbered)

    for tenant in (ACME, GLOBEX):
        with bind(tenant):
            assert await page(1) == f"{tenant.slug} 1"
    with bind(GLOBEX):
        await cache.delete("page:1")
        assert not await cache.set_pop("_tag:pages")
    with bind(ACME):
        assert await cache.exists("page:1")
        await cache.delete_tags("pages")
        assert not await cache.exists("page:1")


async def test_decorated_functions_are_each_tenant_s(cache: TenantCache) -> None:
    """Each kind of decorator, called for both at once, and again when it has something."""
    calls: list[tuple[str, str]] = []

    def function(name: str) -> Any:
        meet = barrier()

        async def who() -> str:
            calls.append((name, current_tenant().slug))
            await meet()
            return current_tenant().slug

        who.__qualname__ = name
        return who

    decorators = {
        "plain": cache(ttl=60),
        "named": cache.cache(ttl=60, key="who-is-it"),
        "locked": cache(ttl=60, lock=True),
        "early": cache.early(ttl=60),
        "soft": cache.soft(ttl=60, soft_ttl=30),
        "hit": cache.hit(ttl=60, cache_hits=10),
        "dynamic": cache.dynamic(ttl=60),
        "failover": cache.failover(ttl=60),
        "upper": cache(ttl=60, upper=True),
    }
    for name, decorator in decorators.items():
        decorated = decorator(function(name))
        for _ in range(2):
            assert await at_once(decorated) == ["acme", "globex"], name
        if name != "dynamic":  # which calls it again by itself
            expected = 4 if name == "failover" else 2
            assert len([1 for called, _ in calls if called == name]) == expected, name
    limited = cache.rate_limit(limit=1, period=60)(function("limited"))
    assert await at_once(limited) == ["acme", "globex"]
    invalidating = cache.invalidate("who")(function("invalidating"))
    with bind(ACME):
        await invalidating()
    assert await seen(cache) == [None, "globex"]


async def test_transactions_and_invalidations_stay_within(cache: TenantCache) -> None:
    """What was refused or leaked by hand."""
    with bind(ACME), invalidate_further():
        assert [item async for item in cache.get_match("*")] == []
    assert await seen(cache) == [None, "globex"]
    with bind(ACME):
        async with cache.transaction():
            await cache.set("who", "changed")
            await cache.delete_match("*")
            await cache.set("x", 1)
        assert await cache.get("x") == 1
        with pytest.raises(UnprefixedError):
            cache.transaction(TransactionMode.SERIALIZABLE)
        cache.set_transaction_mode(TransactionMode.SERIALIZABLE)
        with pytest.raises(UnprefixedError):
            cache.transaction()
    assert await seen(cache) == [None, "globex"]


async def test_what_has_no_tenant_or_no_key_is_refused(cache: TenantCache) -> None:
    """Whoever calls it; and the store itself is not handed out."""
    uses: list[Callable[[], Any]] = [
        partial(cache.get, "who"),
        partial(cache.set, "who", 1),
        partial(cache.get_many, "who"),
        partial(cache.set_many, {"who": 1}),
        partial(cache.delete_match, "*"),
        partial(cache.delete_tags, "everyone"),
        cache(ttl=1)(partial_of_nothing),
    ]
    for use in uses:
        with pytest.raises(NoTenantError):
            await use()
    with pytest.raises(NoTenantError):
        await anext(aiter(cache.scan("*")))
    with bind(ACME):
        for refused in (cache.clear, cache.get_keys_count):
            with pytest.raises(UnprefixedError):
                await refused()
        with pytest.raises(UnprefixedError):
            _ = cache.tags_backend
    assert TenantCache().setup("mem://") is None  # type: ignore[func-returns-value]
    assert await seen(cache) == ["acme", "globex"]


async def partial_of_nothing() -> int:
    """Return something to be cached."""
    return 1


async def test_everything_of_a_tenant_is_deleted(cache: TenantCache) -> None:
    """Its keys and tags, by an operator."""
    with bind(ACME):
        with pytest.raises(CrossTenantError):
            await cache.delete_all(GLOBEX)
        assert await cache.set_pop("_tag:everyone", 0) is not None
    await cache.delete_all(ACME.id)
    assert await seen(cache) == [None, "globex"]
    with bind(ACME):
        assert [key async for key in cache.scan("*")] == []
    with bind(GLOBEX):
        await cache.delete_tags("everyone")
    assert await seen(cache) == [None, None]


# --- the whole of the library ---------------------------------------------------------------------------------------


class Later(Enum):
    """A command that is not there yet."""

    GETALL = "getall"


async def test_every_command_is_prefixed_or_refused() -> None:
    """A command that a later version adds is refused by itself, and so is a method."""
    called: list[Any] = []

    async def call(*args: Any, **kwargs: Any) -> Any:
        called.append((args, kwargs))

        async def nothing() -> AsyncIterator[Any]:
            return
            yield

        return nothing()

    passed = set()
    later: Any = Later.GETALL
    with bind(ACME):
        for command in Command:
            called.clear()
            keys = {"key": "KEY", "pattern": "KEY", "pairs": {"KEY": 1}}
            args = ("KEY",) if command in module._ALL_KEYS else ()
            try:
                await module._prefix_keys(call, command, None, *args, **keys)
            except UnprefixedError:
                continue
            passed.add(command)
            assert command is Command.PING or f"{A}KEY" in repr(called), command
        assert set(Command) - passed == {Command.CLEAR, Command.GET_KEYS_COUNT}
        with pytest.raises(UnprefixedError):
            await module._prefix_keys(call, later, None, key="x")
    public = {name for name in dir(Cache) if not name.startswith("_")}
    assert public <= module._KNOWN | vars(TenantCache).keys()
    with pytest.raises(UnprefixedError, match="getall"):
        module._refusing("getall").fget(TenantCache())  # type: ignore[misc]


def test_a_version_that_is_built_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not add stores where this one does."""
    monkeypatch.setattr(TenantCache, "_add_backend", Cache._add_backend)
    with pytest.raises(ConfigurationError, match="cashews"):
        TenantCache().setup("mem://")
