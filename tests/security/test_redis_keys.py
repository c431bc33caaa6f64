"""Keys and channels of Redis: a tenant's client reaches that tenant's alone, whatever it is asked for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

import pytest
import redis
import redis.asyncio
from redis.commands import CoreCommands

from tenancy_orm import Status, Tenant, current_tenant, tenant_prefix
from tenancy_orm.context import bind, reset_current, set_current
from tenancy_orm.errors import (
    AdmissionEndedError,
    ConfigurationError,
    CrossTenantError,
    InvalidNameError,
    NoTenantError,
    UnprefixedError,
)
from tenancy_orm.integrations import redis as module
from tenancy_orm.integrations._redis_keys import FIRST, SHAPES
from tenancy_orm.integrations.redis import TenantLock, TenantRedis
from tests.support.redis_server import redis_server
from tests.support.waiting import until

ACME = Tenant(id=UUID(int=1), slug="acme", status=Status.ACTIVE, tier="free")
GLOBEX = Tenant(id=UUID(int=2), slug="globex", status=Status.ACTIVE, tier="free")
A, G = f"t/{ACME.id}/", f"t/{GLOBEX.id}/"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server for all tests."""
    with redis_server() as found:
        yield found


@pytest.fixture
async def raw(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A client that no tenant should have; the server is emptied for each test."""
    client = redis.asyncio.Redis.from_url(url, decode_responses=True)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def cache(raw: redis.asyncio.Redis, url: str) -> AsyncIterator[TenantRedis]:
    """The wrapped client, with a key of each tenant's."""
    async with TenantRedis.from_url(url, decode_responses=True) as made:
        for tenant in (ACME, GLOBEX):
            with bind(tenant):
                await made.set("who", tenant.slug)
        yield made


# --- what goes wrong without it -------------------------------------------------------------------------------------


async def test_a_forgotten_prefix_answers_one_tenant_with_another_s(raw: redis.asyncio.Redis) -> None:
    """A raw client, and a function's cache in the process: both know no tenants."""

    @lru_cache
    def greeting(name: str) -> str:
        return f"{name} of {current_tenant().slug}"

    async def cached_greeting() -> str:
        found = await raw.get("greeting")
        if found is None:
            await raw.set("greeting", found := current_tenant().slug)
        return str(found)

    with bind(ACME):
        assert (await cached_greeting(), greeting("ann")) == ("acme", "ann of acme")
    with bind(GLOBEX):
        assert (await cached_greeting(), greeting("ann")) == ("acme", "ann of acme")


async def test_a_prefix_by_hand_can_be_got_around(raw: redis.asyncio.Redis) -> None:
    """By slugs of which one begins another, and by a pattern that a user gives."""
    await raw.mset({"acme:x": 1, "acme-corp:x": 2, "globex:x": 3})
    assert set(await raw.keys("acme*")) == {"acme:x", "acme-corp:x"}
    user_gives = "*"
    assert len(await raw.keys(user_gives)) == 3


# --- with it --------------------------------------------------------------------------------------------------------

KEYS = [
    "who",
    "../globex/who",
    f"../{GLOBEX.id}/who",
    f"{G}who",
    f"/{G}who",
    "*",
    "[a-z]*",
    "who\r\nGET t/2/who",
    "\x00",
    "",
    b"\x01\x00",
    7,
]


@pytest.mark.parametrize("key", KEYS)
async def test_no_key_leads_to_another_tenant(cache: TenantRedis, raw: redis.asyncio.Redis, key: Any) -> None:
    """Reading, writing, deleting, and all at once: what is another tenant's stays as it is."""
    with bind(ACME):
        assert await cache.get(key) in (None, "acme")
        await cache.set(key, "changed")
        assert await cache.get(key) == "changed"
        assert await cache.mget([key, "other"]) == await cache.mget(key, "other") == ["changed", None]
        await cache.mset({key: "again"})
        assert await cache.exists(key) == await cache.touch(key) == 1
        found = {name async for name in cache.scan_iter(count=1)}
        assert found == set(await cache.keys()) == set((await cache.scan(count=100))[1])
        assert len(found) == (1 if key == "who" else 2)
        assert await cache.delete(key, "nothing") == 1
    assert await raw.get(f"{G}who") == "globex"


@pytest.mark.parametrize("pattern", ["*", "**", "?*", "[^x]*", f"{G}*", f"../{GLOBEX.id}/*", "\\*", b"*", "*/*", "t/*"])
async def test_no_pattern_finds_another_tenant_s_keys(cache: TenantRedis, pattern: Any) -> None:
    """They are the tenant's own names, without the prefix."""
    with bind(ACME):
        found = {
            *await cache.keys(pattern),
            *[name async for name in cache.scan_iter(pattern)],
            *(await cache.scan(match=pattern, count=100))[1],
        }
    assert found <= {"who"}


async def test_several_keys_are_the_tenant_s_each(cache: TenantRedis, raw: redis.asyncio.Redis) -> None:
    """Moves, copies, set operations, blocking reads; by position, since a key by name could be overlooked."""
    with bind(ACME):
        await cache.sadd("s", "a", "b")
        await cache.sadd("t", "b", "c")
        assert await cache.sinter("s", "t") == await cache.sinter(["s", "t"]) == {"b"}
        assert await cache.sunionstore("u", "s", ["t"]) == 3
        assert await cache.smove("s", "t", "a") and await cache.rename("u", "v") and await cache.copy("v", "w")
        await cache.rpush("q", "1", "2")
        assert await cache.blpop(["none", "q"], timeout=1) == ("q", "1")
        assert await cache.lmove("q", "r", "LEFT", "LEFT") == "2"
        assert await cache.blpop("none", timeout=0.01) is None
        assert await cache.hset("h", key="field", value="x") == 1 and await cache.hset(name="h", mapping={"y": 1}) == 1
        assert [item async for item in cache.hscan_iter("h")] == [("field", "x"), ("y", "1")]
        first = await cache.xadd("stream", {"a": "b"})
        assert await cache.xread({"stream": 0}) == await cache.xread(streams={"stream": 0}, count=5)
        assert await cache.xread({"stream": 0}) == [["stream", [(first, {"a": "b"})]]]
        assert await cache.xgroup_create("stream", "group", id=0)
        read = await cache.xreadgroup("group", "me", {"stream": ">"}, count=1)
        assert read == [["stream", [(first, {"a": "b"})]]] and await cache.xack("stream", "group", first) == 1
        assert not await cache.xread({f"../{GLOBEX.id}/stream": 0})
        assert await cache.incr(name="n") == 1
        wrong_calls: list[Callable[[], Any]] = [
            cache.get,
            partial(cache.copy, "v", "w", 1),
            partial(cache.copy, source="v", destination="w"),
            partial(cache.blpop, keys=["q"]),
            partial(cache.mget, keys=["q"]),
            partial(cache.rename, "a"),
            partial(cache.xread, ["stream"]),
        ]
        for wrong in wrong_calls:
            with pytest.raises(TypeError):
                wrong()
        for no_key in (1.5, None, True, ["a"], object()):
            with pytest.raises(InvalidNameError):
                cache.get(no_key)
    assert {name for name in await raw.keys() if not name.startswith(A)} == {f"{G}who"}


async def test_results_have_no_prefix_with_the_newer_protocol_either(cache: TenantRedis, url: str) -> None:
    """It answers with other types."""
    async with TenantRedis.from_url(url, decode_responses=True, protocol=3) as newer:
        with bind(ACME):
            await newer.xadd("stream", {"a": "b"}, id="1-1")
            assert set(await newer.keys()) == set((await newer.scan(count=100))[1]) == {"who", "stream"}
            assert list(await newer.xread({"stream": 0})) == ["stream"]
            await newer.rpush("q", "1")
            assert tuple(await newer.brpop("q", 1)) == ("q", "1")
            async with newer.pubsub(ignore_subscribe_messages=True) as subscriber:
                await subscriber.subscribe("news")
                await until(partial(cache.publish, "news", "x"))
                found: list[Any] = []
                await until(partial(receive, subscriber, found))
                assert found[0]["channel"] == "news"


async def receive(subscriber: Any, found: list[Any]) -> list[Any]:
    """Take the next message, if there is one."""
    message = await subscriber.get_message(timeout=0.1)
    found += [message] if message else []
    return found


async def test_a_pipeline_is_one_tenant_s(cache: TenantRedis, raw: redis.asyncio.Redis) -> None:
    """From its first command to its last; with the keys it watches."""
    with bind(ACME):
        async with cache.pipeline() as pipe:
            assert pipe.set("a", 1).incr("a") is pipe and len(pipe) == 2
            assert await pipe.execute() == [True, 2]
            await pipe.watch("a")
            assert await pipe.get("a") == "2"
            await raw.set(f"{A}a", "9")
            pipe.multi()
            pipe.set("a", 3)
            with pytest.raises(redis.WatchError):
                await pipe.execute()
        other = cache.pipeline()
        other.set("a", 1)
    with bind(GLOBEX):
        uses: list[Callable[[], Any]] = [partial(other.get, "a"), other.execute, partial(other.watch, "a")]
        for use in uses:
            with pytest.raises(CrossTenantError):
                use()
    with pytest.raises(NoTenantError):
        other.execute()
    await other.reset()
    for name in ("execute_command", "scan_iter", "keys", "blpop", "xread", "register_script", "hscan_iter"):
        with pytest.raises(UnprefixedError):
            getattr(other, name)


async def test_a_lock_is_one_tenant_s(cache: TenantRedis, raw: redis.asyncio.Redis) -> None:
    """Two tenants hold the same name at once; its end needs no binding, so that none is left behind."""
    with bind(ACME):
        mine = cache.lock("import", timeout=30)
        assert await mine.acquire(blocking=False)
        assert not await cache.lock("import").acquire(blocking=False)
    with bind(GLOBEX):
        async with cache.lock("import", timeout=30) as held:
            assert await held.owned()
            assert set(await raw.keys("*import")) == {f"{A}import", f"{G}import"}
    await mine.release()
    with pytest.raises(UnprefixedError):
        _ = mine.redis


async def test_what_was_kept_gives_nothing_to_another_tenant(cache: TenantRedis, url: str) -> None:
    """An iterator over keys or fields goes on, and a lock is acquired, for the tenant that they were made for alone."""
    with bind(ACME), TenantRedis(redis.Redis.from_url(url)) as blocking:
        await cache.hset("h", "field", "x")
        kept: list[Callable[[], Any]] = [
            partial(anext, cache.scan_iter()),
            partial(anext, cache.hscan_iter("h")),
            partial(next, blocking.scan_iter()),
            partial(next, blocking.hscan_iter("h")),
            *(partial(enter, cache.lock("l")) for enter in (acquire, TenantLock.__aenter__)),
            partial(TenantLock.__enter__, blocking.lock("l")),
        ]
        with bind_instead(GLOBEX):
            for use in kept:
                with pytest.raises(CrossTenantError):
                    outcome = use()
                    await outcome
        assert not await cache.exists("l")


def acquire(lock: TenantLock) -> Any:
    """Acquire a lock that nobody has."""
    return lock.acquire(blocking=False)


async def test_a_message_is_not_given_to_a_request_that_ended_while_it_waited(cache: TenantRedis) -> None:
    """The admission is checked when the message is there, and not only before."""

    class Ending:
        ended = False

        def check(self) -> None:
            if self.ended:
                raise AdmissionEndedError("revoked", credential_id="key")

    admission = Ending()
    with bind(replace(ACME, admission=admission)):
        async with cache.pubsub(ignore_subscribe_messages=True) as subscriber:
            await subscriber.subscribe("news")
            await subscriber.get_message(timeout=1)
            waiting = asyncio.ensure_future(subscriber.get_message(timeout=30))
            await asyncio.sleep(0)
            await until(partial(cache.publish, "news", "x"))
            admission.ended = True
            with pytest.raises(AdmissionEndedError):
                await waiting


@contextmanager
def bind_instead(tenant: Tenant) -> Iterator[None]:
    """Another request's binding, amid this one's: what another task would have."""
    token = set_current(tenant)
    try:
        yield
    finally:
        reset_current(token)


async def test_channels_are_the_tenant_s(cache: TenantRedis) -> None:
    """A subscriber to every channel receives its own tenant's, by their own names."""
    with bind(ACME):
        async with cache.pubsub() as subscriber:
            await subscriber.psubscribe("*")
            await subscriber.subscribe("news")
            assert (await subscriber.get_message(timeout=5))["pattern"] is None
            assert (await subscriber.get_message(timeout=5))["channel"] == "news"
    other = None
    with bind(GLOBEX):
        other = cache.pubsub(ignore_subscribe_messages=True)
        await other.psubscribe("*", f"{A}*")
        await cache.publish("news", "of globex")
    with bind(ACME):
        async with cache.pubsub(ignore_subscribe_messages=True) as subscriber:
            await subscriber.psubscribe("n*")
            assert await subscriber.get_message(timeout=0.2) is None
            assert await cache.publish("news", "of acme") == 1
            async for message in subscriber.listen():
                assert message == {"type": "pmessage", "pattern": "n*", "channel": "news", "data": "of acme"}
                break
            await subscriber.punsubscribe()
    with bind(GLOBEX):
        found = [await other.get_message(timeout=1) for _ in range(3)]
        assert [message["data"] for message in found if message] == ["of globex"]
    with bind(ACME), pytest.raises(CrossTenantError):
        await other.get_message()
    await other.aclose()


async def test_without_a_tenant_and_after_its_admission_nothing_is_done(cache: TenantRedis) -> None:
    """Each command checks."""

    class Ended:
        def check(self) -> None:
            raise AdmissionEndedError("revoked", credential_id="key")

    uses: list[Callable[[], Any]] = [
        *(cache.keys, cache.scan, cache.scan_iter, cache.pipeline, cache.pubsub),
        *(partial(cache.get, "who"), partial(cache.lock, "x"), partial(cache.publish, "x", "y")),
    ]
    for use in uses:
        with pytest.raises(NoTenantError):
            use()
        with bind(replace(ACME, admission=Ended())), pytest.raises(AdmissionEndedError):
            use()


async def test_everything_of_a_tenant_is_deleted(
    cache: TenantRedis, raw: redis.asyncio.Redis, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an operator, by its id, in batches; nothing of another tenant's."""
    monkeypatch.setattr(module, "_BATCH", 7)
    with bind(ACME):
        await cache.mset({f"k{n}": n for n in range(50)})
    with bind(GLOBEX), pytest.raises(CrossTenantError):
        await cache.delete_all(ACME)
    with pytest.raises(ConfigurationError, match="slug"):
        cache.delete_all("acme")
    assert await cache.delete_all(ACME.id) == 51
    assert await raw.keys() == [f"{G}who"]
    plain = redis.Redis.from_url(url)
    with TenantRedis(plain) as blocking:
        with bind(ACME):
            values: dict[str | bytes, int] = {b"a": 1, "b": 2, **{f"k{n}": n for n in range(6)}}
            blocking.mset(values)
            assert sorted(blocking.keys())[:2] == [b"a", b"b"]
            assert len(list(blocking.scan_iter("k*"))) == 6
            with blocking.pipeline() as pipe, blocking.lock("l", timeout=9):
                assert pipe.get("a").execute() == [b"1"]
            with blocking.pubsub() as subscriber:
                subscriber.subscribe("c")
                assert next(subscriber.listen())["channel"] == b"c"
        assert blocking.delete_all(str(ACME.id)) == 8
        assert blocking.ping()
    assert await raw.keys() == [f"{G}who"]


# --- the whole of the library ---------------------------------------------------------------------------------------

OWN = {"keys", "scan", "scan_iter", "pipeline", "lock", "pubsub", "ping", "close", "aclose", "from_url"}


def commands() -> set[str]:
    """Every public name of redis-py's clients."""
    return {name for kind in (redis.Redis, redis.asyncio.Redis) for name in dir(kind) if not name.startswith("_")}


async def test_every_method_is_prefixed_or_refused(cache: TenantRedis, raw: redis.asyncio.Redis) -> None:
    """Those that pass are tried: no command that is sent has a key that is not the tenant's."""
    sent: list[tuple[Any, ...]] = []

    async def record(*args: Any, **options: Any) -> None:
        sent.append(args)

    cache._raw.execute_command = record
    passed = set()
    with bind(ACME):
        for name in sorted(commands() - OWN):
            try:
                method = getattr(cache, name)
            except UnprefixedError:
                continue
            passed.add(name)
            sent.clear()
            outcome = method(*arguments(name))
            if hasattr(outcome, "__anext__"):
                with pytest.raises(TypeError):  # of the answer, which is none
                    await anext(outcome)
            elif inspect.isawaitable(outcome):
                await outcome
            keys = [part for args in sent for part in args if isinstance(part, str) and part.endswith("KEY")]
            assert keys and all(key == f"{A}KEY" for key in keys), (name, sent)
    assert passed == set(SHAPES)
    assert {"eval", "flushdb", "execute_command", "sort", "migrate", "randomkey", "transaction"} <= (
        commands() - passed
    )


def arguments(name: str) -> list[Any]:
    """Of a command: KEY for each key, and something for the rest."""
    if name in ("mset", "msetnx"):
        return [{"KEY": 1}]
    if name == "zmscore":
        return ["KEY", ["member"]]
    values: dict[str, Any] = {
        "streams": {"KEY": 0},
        **dict.fromkeys(("first_list", "second_list", "channel", "src", "dst", "dest", "source", "destination"), "KEY"),
        "keys": ["KEY"],
        "fields": {"a": 1},
        "mapping": {"a": 1},
        "message_ids": ["1-1"],
        "where": "BEFORE",
        "min": 0,
        "max": 1,
        "values": [1, 1, "x"],
    }
    if name in FIRST:
        values["keys"] = ["field"]
    if name in ("lmove", "blmove"):
        values |= {"src": "LEFT", "dest": "LEFT"}
    found: list[Any] = []
    for position, parameter in enumerate(list(inspect.signature(getattr(redis.Redis, name)).parameters.values())[1:]):
        if position == 0 and name in SHAPES and parameter.name in ("name", "key"):
            found.append("KEY")
        elif parameter.kind is parameter.VAR_POSITIONAL:
            found.append("KEY" if name not in FIRST else 1)
        elif parameter.kind is not parameter.VAR_KEYWORD and parameter.default is parameter.empty:
            found.append(values.get(parameter.name, 1))
    return found + MORE.get(name, [])


# what redis-py asks for besides
MORE: dict[str, list[Any]] = {"geosearch": ["member", None, None, "m", 1], "hset": ["field", 1], "xtrim": [1]}


async def test_a_method_that_a_later_version_adds_is_refused(
    cache: TenantRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list says what passes, and not what does not."""
    monkeypatch.setattr(CoreCommands, "getall", lambda self: self.keys("*"), raising=False)
    with bind(ACME), pytest.raises(UnprefixedError, match="getall"):
        cache.getall()
    assert not hasattr(cache, "getall")


async def test_only_a_client_can_be_wrapped(raw: redis.asyncio.Redis) -> None:
    """No pipeline, no cluster, nothing else; and what is wrapped tells no address."""
    for wrong in (raw.pipeline(), object(), redis.asyncio.RedisCluster, "redis://localhost"):
        with pytest.raises(ConfigurationError):
            TenantRedis(wrong)  # type: ignore[arg-type]
    assert "redis-" not in repr(TenantRedis(raw))


async def test_tenants_at_once_do_not_mix(cache: TenantRedis) -> None:
    """Each task has its own binding."""

    async def work(tenant: Tenant) -> None:
        for n in range(20):
            with bind(tenant):
                await cache.set("n", f"{tenant.slug}{n}")
                assert await cache.get("n") == f"{tenant.slug}{n}"

    await asyncio.gather(work(ACME), work(GLOBEX))


def test_a_prefix_for_other_clients() -> None:
    """By the id, with the separator of the protocol."""
    with bind(ACME):
        assert tenant_prefix() == tenant_prefix(ACME) == tenant_prefix(str(ACME.id)) == A
        assert tenant_prefix(separator=".") == f"t.{ACME.id}."
        assert len(tenant_prefix()) == 39
        with pytest.raises(CrossTenantError):
            tenant_prefix(GLOBEX)
        for separator in ("", "-", "//", "*"):
            with pytest.raises(ConfigurationError, match="separated"):
                tenant_prefix(separator=separator)
    assert tenant_prefix(GLOBEX.id) == G
