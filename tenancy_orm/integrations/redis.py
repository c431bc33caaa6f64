"""Redis: a client that knows the bound tenant's keys and channels alone (extra ``redis``).

```python
cache = TenantRedis.from_url("redis://localhost:6379/0")
await cache.set("greeting", "hello", ex=60)  # the key is t/<id>/greeting
```

Commands that are known to act on keys they are given get the tenant's prefix in front of each; what comes back has it
removed. Everything else is refused: scripts, ``FLUSHDB``, administration, and what a later redis-py adds.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from ..errors import ConfigurationError, MissingExtraError, UnprefixedError
from ..prefixes import check_prefix, tenant_prefix, without_prefix
from ..tenant import Tenant
from ._redis_keys import ITERATING, NOT_IN_PIPELINES, RESULTS, SHAPES, Shape, prefixed_key

try:
    import redis
    import redis.asyncio
    import redis.asyncio.client
    import redis.client
except ImportError as exc:
    raise MissingExtraError("redis", "redis") from exc

_BATCH = 1_000


class _Commands:
    """What has commands: a client, or a pipeline."""

    _excluded: frozenset[str] = frozenset()

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __repr__(self) -> str:
        """Tell what it wraps, without an address or a password."""
        return f"<{type(self).__name__} of {type(self._raw).__module__}>"

    def __getattr__(self, name: str) -> Any:
        """Return a command on the tenant's own keys.

        Raises:
            UnprefixedError: it is not known to stay within them.
        """
        shape = SHAPES.get(name)
        if shape is None or name in self._excluded:
            raise UnprefixedError(type(self).__name__, name)
        return partial(self._call, name, shape)

    def _prefix(self) -> str:
        raise NotImplementedError

    def _call(self, name: str, shape: Shape, /, *args: Any, **kwargs: Any) -> Any:
        prefix = self._prefix()
        args, kwargs = shape(name, prefix, args, kwargs)
        outcome = getattr(self._raw, name)(*args, **kwargs)
        if outcome is self._raw:
            return self  # a pipeline, for the next command
        if name in ITERATING:
            return _each(outcome, prefix, lambda item: item)
        without = RESULTS.get(name)
        if without is not None:
            return _then(outcome, lambda found: without(found, prefix))
        return outcome


class _Block:
    """Ends with a block, ``with`` or ``async with``, as redis-py's own objects do."""

    def _leave(self) -> Any:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it, or give its connection back."""
        await self._leave()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it, or give its connection back."""
        self._leave()


class TenantRedis(_Block, _Commands):
    """A client of Redis, asynchronous or synchronous, on the keys and channels of the tenant that is bound.

    Every command needs a bound tenant, and its key is prefixed where the command is called. Commands are redis-py's,
    with its arguments and results; keys go by position where there may be several.

    It has: the commands on a single key of strings, hashes, lists, sets, sorted sets, streams and places; ``delete``,
    ``exists``, ``unlink``, ``touch``, ``mget``, ``mset``, ``rename``, ``copy``, set operations and moves between the
    tenant's own keys; ``keys``, ``scan`` and ``scan_iter`` over them; ``pipeline``, ``lock``, ``publish``, ``pubsub``.

    Args:
        client: A ``redis.asyncio.Redis`` or ``redis.Redis``, which nothing else should use from now on; no cluster.

    Raises:
        ConfigurationError: it is another kind of client.
        NoTenantError: (at a command) no tenant is bound.
        UnprefixedError: (at an attribute) it is no command, or none that is known to stay within a tenant's keys.
    """

    def __init__(self, client: redis.Redis | redis.asyncio.Redis) -> None:
        given: object = client
        pipelines = (redis.client.Pipeline, redis.asyncio.client.Pipeline)
        if not isinstance(given, (redis.Redis, redis.asyncio.Redis)) or isinstance(given, pipelines):
            raise ConfigurationError(
                f"TenantRedis takes a redis.asyncio.Redis or redis.Redis, not {type(given).__name__}"
            )
        super().__init__(given)
        self._is_async = isinstance(given, redis.asyncio.Redis)

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Make an asynchronous client of its own, which nothing else has: ``redis.asyncio.from_url``."""
        return cls(redis.asyncio.Redis.from_url(url, **options))

    def _prefix(self) -> str:
        return tenant_prefix()

    # --- keys -------------------------------------------------------------------------------------------------------

    def keys(self, pattern: str | bytes = "*") -> Any:
        """Return the tenant's keys that match, without the prefix; a coroutine where the client is asynchronous."""
        prefix = self._prefix()
        found = self._raw.keys(prefixed_key(prefix, pattern))
        return _then(found, lambda names: [without_prefix(name, prefix) for name in names])

    def scan(self, cursor: int = 0, match: str | bytes | None = None, count: int | None = None) -> Any:
        """Return the next cursor and some of the tenant's keys, without the prefix."""
        prefix = self._prefix()
        found = self._raw.scan(cursor, match=prefixed_key(prefix, "*" if match is None else match), count=count)
        return _then(found, lambda step: (step[0], [without_prefix(name, prefix) for name in step[1]]))

    def scan_iter(self, match: str | bytes | None = None, count: int | None = None) -> Any:
        """Iterate over the tenant's keys that match, without the prefix; each step needs the tenant to be bound."""
        prefix = self._prefix()
        found = self._raw.scan_iter(match=prefixed_key(prefix, "*" if match is None else match), count=count)
        return _each(found, prefix, lambda name: without_prefix(name, prefix))

    def delete_all(self, tenant: Tenant | UUID | str) -> Any:
        """Delete every key of a tenant, and return how many there were: for when it is purged.

        Args:
            tenant: A ``Tenant`` or an id; a purged tenant has no slug any more.

        Raises:
            CrossTenantError: another tenant is bound. Operators call this with none bound.
        """
        prefix = tenant_prefix(tenant)
        return self._delete_async(prefix) if self._is_async else self._delete(prefix)

    def _delete(self, prefix: str) -> int:
        deleted, batch = 0, []
        for name in self._raw.scan_iter(match=f"{prefix}*", count=_BATCH):
            batch.append(name)
            if len(batch) == _BATCH:
                deleted += self._raw.unlink(*batch)
                batch.clear()
        return deleted + (self._raw.unlink(*batch) if batch else 0)

    async def _delete_async(self, prefix: str) -> int:
        deleted, batch = 0, []
        async for name in self._raw.scan_iter(match=f"{prefix}*", count=_BATCH):
            batch.append(name)
            if len(batch) == _BATCH:
                deleted += await self._raw.unlink(*batch)
                batch.clear()
        return deleted + (await self._raw.unlink(*batch) if batch else 0)

    # --- several commands, locks, channels ---------------------------------------------------------------------------

    def pipeline(self, transaction: bool = True) -> TenantPipeline:
        """Begin a pipeline, in a ``MULTI`` unless ``transaction`` is False. It is this tenant's to its end."""
        return TenantPipeline(self._raw.pipeline(transaction=transaction), self._prefix())

    def lock(
        self,
        name: str,
        timeout: float | None = None,
        sleep: float = 0.1,
        blocking: bool = True,
        blocking_timeout: float | None = None,
        thread_local: bool = True,
    ) -> TenantLock:
        """Return a lock with a key of the tenant's; see redis-py for the arguments."""
        prefix = self._prefix()
        return TenantLock(
            self._raw.lock(
                prefixed_key(prefix, name),
                timeout=timeout,
                sleep=sleep,
                blocking=blocking,
                blocking_timeout=blocking_timeout,
                thread_local=thread_local,
            ),
            prefix,
        )

    def pubsub(self, ignore_subscribe_messages: bool = False) -> TenantPubSub:
        """Return a subscriber to the tenant's channels."""
        prefix = self._prefix()
        return TenantPubSub(self._raw.pubsub(ignore_subscribe_messages=ignore_subscribe_messages), prefix)

    # --- the connection ---------------------------------------------------------------------------------------------

    def ping(self) -> Any:
        """Ask whether the server answers; needs no tenant."""
        return self._raw.ping()

    def close(self) -> Any:
        """Close the connections; ``aclose`` of an asynchronous client."""
        return self._raw.aclose() if self._is_async else self._raw.close()

    aclose = close

    def _leave(self) -> Any:
        return self.close()


class _OfOneTenant:
    """What belongs to the tenant it was made for, until it is closed."""

    _fixed: str

    def _check(self) -> str:
        """Return the prefix.

        Raises:
            CrossTenantError: another tenant is bound by now.
            NoTenantError: none is.
        """
        check_prefix(self._fixed, f"a {type(self).__name__}")
        return self._fixed


class TenantPipeline(_Block, _OfOneTenant, _Commands):
    """Several commands of one tenant, sent together: ``TenantRedis.pipeline``."""

    _excluded = NOT_IN_PIPELINES

    def __init__(self, raw: Any, prefix: str) -> None:
        super().__init__(raw)
        self._fixed = prefix

    def _prefix(self) -> str:
        return self._check()

    def __len__(self) -> int:
        """How many commands wait."""
        return len(self._raw)

    def execute(self, raise_on_error: bool = True) -> Any:
        """Send the commands, and return their results."""
        self._check()
        return self._raw.execute(raise_on_error)

    def watch(self, *names: str | bytes) -> Any:
        """Have ``execute`` fail if one of these keys is changed; commands run at once until ``multi``."""
        prefix = self._check()
        return self._raw.watch(*(prefixed_key(prefix, name) for name in names))

    def unwatch(self) -> Any:
        """Forget the keys that were watched."""
        return self._raw.unwatch()

    def multi(self) -> None:
        """Begin the transaction, after ``watch``."""
        self._raw.multi()

    def reset(self) -> Any:
        """Forget the commands, and give the connection back."""
        return self._raw.reset()

    def _leave(self) -> Any:
        return self.reset()


class TenantLock(_OfOneTenant):
    """A lock with a tenant's key, as redis-py's: ``TenantRedis.lock``.

    The tenant must be bound where it is acquired. Its end needs none, so it is never left.
    """

    def __init__(self, raw: Any, prefix: str) -> None:
        self._raw = raw
        self._fixed = prefix

    def __getattr__(self, name: str) -> Any:
        """Return a method of redis-py's lock that acts on its own key."""
        if name not in {"acquire", "extend", "locked", "owned", "reacquire", "release"}:
            raise UnprefixedError(type(self).__name__, name)
        if name == "acquire":
            self._check()
        return getattr(self._raw, name)

    async def __aenter__(self) -> Self:
        """Acquire."""
        self._check()
        await self._raw.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release."""
        await self._raw.__aexit__(kind, error, traceback)

    def __enter__(self) -> Self:
        """Acquire."""
        self._check()
        self._raw.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release."""
        self._raw.__exit__(kind, error, traceback)


class TenantPubSub(_Block, _OfOneTenant):
    """A subscriber to the channels of one tenant: ``TenantRedis.pubsub``. Messages have the tenant's own names."""

    def __init__(self, raw: Any, prefix: str) -> None:
        self._raw = raw
        self._fixed = prefix

    def subscribe(self, *channels: str | bytes) -> Any:
        """Subscribe to channels."""
        return self._raw.subscribe(*self._named(channels))

    def psubscribe(self, *patterns: str | bytes) -> Any:
        """Subscribe to the channels that match."""
        return self._raw.psubscribe(*self._named(patterns))

    def unsubscribe(self, *channels: str | bytes) -> Any:
        """End subscriptions; all of them where none is named."""
        return self._raw.unsubscribe(*self._named(channels))

    def punsubscribe(self, *patterns: str | bytes) -> Any:
        """End subscriptions to patterns; all of them where none is named."""
        return self._raw.punsubscribe(*self._named(patterns))

    def get_message(self, ignore_subscribe_messages: bool = False, timeout: float | None = 0.0) -> Any:
        """Return the next message, or None where none arrives in ``timeout`` seconds (None: wait)."""
        self._check()
        # checked again when it arrives: the request may have lost its admission since
        return _then(self._raw.get_message(ignore_subscribe_messages, timeout), self._arrived)

    def listen(self) -> Any:
        """Iterate over messages; each one needs the tenant to be bound, and its request still to be admitted."""
        self._check()
        return self._listen_async() if hasattr(self._raw, "aclose") else self._listen()

    def _listen(self) -> Iterator[Any]:
        for message in self._raw.listen():
            yield self._arrived(message)

    async def _listen_async(self) -> AsyncIterator[Any]:
        async for message in self._raw.listen():
            yield self._arrived(message)

    def close(self) -> Any:
        """End the subscriptions, and give the connection back; ``aclose`` of an asynchronous client."""
        return self._raw.aclose() if hasattr(self._raw, "aclose") else self._raw.close()

    aclose = close

    def _leave(self) -> Any:
        return self.close()

    def _named(self, names: tuple[str | bytes, ...]) -> list[str | bytes]:
        prefix = self._check()
        return [prefixed_key(prefix, name) for name in names]

    def _arrived(self, message: dict[str, Any] | None) -> dict[str, Any] | None:
        if message is None:
            return None
        self._check()
        names = {
            part: without_prefix(message[part], self._fixed)
            for part in ("channel", "pattern")
            if message.get(part) is not None and message["type"] != "pong"
        }
        return {**message, **names}


def _then(outcome: Any, change: Callable[[Any], Any]) -> Any:
    """Change an outcome, or what awaiting it returns."""
    if inspect.isawaitable(outcome):
        return _then_async(outcome, change)
    return change(outcome)


async def _then_async(outcome: Awaitable[Any], change: Callable[[Any], Any]) -> Any:
    return change(await outcome)


def _each(found: Any, prefix: str, change: Callable[[Any], Any]) -> Any:
    """Iterate over what a tenant's command finds, for as long as that tenant is bound."""
    return _each_async(found, prefix, change) if hasattr(found, "__aiter__") else _each_sync(found, prefix, change)


def _each_sync(found: Iterator[Any], prefix: str, change: Callable[[Any], Any]) -> Iterator[Any]:
    for item in found:
        check_prefix(prefix, "an iterator of a TenantRedis")
        yield change(item)


async def _each_async(found: AsyncIterator[Any], prefix: str, change: Callable[[Any], Any]) -> AsyncIterator[Any]:
    async for item in found:
        check_prefix(prefix, "an iterator of a TenantRedis")
        yield change(item)


__all__ = ["TenantLock", "TenantPipeline", "TenantPubSub", "TenantRedis"]
