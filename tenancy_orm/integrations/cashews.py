"""cashews: a cache that knows the bound tenant's keys alone, decorators and tags included (extra ``cashews``).

```python
cache = TenantCache()
cache.setup("redis://localhost:6379/0")


@cache(ttl="10m", key="report:{year}")
async def report(year: int) -> bytes: ...
```

A middleware puts the tenant's prefix in front of every key and pattern, outside of all others, and removes it from what
comes back. Commands without a key, which reach all tenants' at once, are refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NoReturn
from uuid import UUID

from ..errors import ConfigurationError, MissingExtraError, UnprefixedError
from ..prefixes import check_prefix, tenant_prefix, without_prefix
from ..tenant import Tenant

try:
    from cashews import Cache, Command, TransactionMode
except ImportError as exc:
    raise MissingExtraError("cashews", "cashews") from exc

_PREFIX_LENGTH = 39  # of ``tenant_prefix``

_ONE_KEY = frozenset(
    {
        *(Command.GET, Command.GET_RAW, Command.SET, Command.SET_RAW, Command.DELETE, Command.EXISTS, Command.INCR),
        *(Command.EXPIRE, Command.GET_EXPIRE, Command.GET_SIZE, Command.SET_LOCK, Command.UNLOCK, Command.IS_LOCKED),
        *(Command.GET_BITS, Command.INCR_BITS, Command.SLICE_INCR, Command.SET_ADD, Command.SET_REMOVE),
        Command.SET_POP,
    }
)
_ALL_KEYS = frozenset({Command.GET_MANY, Command.DELETE_MANY})
_LISTING = frozenset({Command.SCAN, Command.GET_MATCH})

# cashews' own methods that end in commands, which the middleware sees, or touch no key
_KNOWN = frozenset(
    {
        *(command.value for command in Command),
        *("set_raw", "get_or_set", "lock", "delete_tags", "register_tag", "get_key_tags"),
        *("bloom", "dual_bloom", "cache", "circuit_breaker", "dynamic", "early", "failover", "hit", "invalidate"),
        *("iterator", "locked", "rate_limit", "slice_rate_limit", "soft"),
        *("transaction", "set_transaction_mode", "set_transaction_timeout", "transaction_mode", "transaction_timeout"),
        *("add_middleware", "callback", "callbacks", "default_prefix", "detect", "set_default_fail_exceptions"),
        *("close", "init", "is_init", "is_setup", "setup", "setup_tags_backend"),
        *("disable", "disabling", "enable", "is_disable", "is_enable", "is_full_disable"),
    }
)


async def _prefix_keys(call: Callable[..., Any], command: Command, backend: Any, *args: Any, **kwargs: Any) -> Any:
    """Put the bound tenant's prefix in front of every key: a middleware of cashews."""
    if command is Command.PING:
        return await call(*args, **kwargs)
    prefix = tenant_prefix()
    if command in _ONE_KEY:
        if args:
            args = (prefix + args[0], *args[1:])
        else:
            kwargs["key"] = prefix + kwargs["key"]
    elif command in _ALL_KEYS:
        args = tuple(prefix + key for key in args)
    elif command is Command.SET_MANY:
        kwargs["pairs"] = {prefix + key: value for key, value in kwargs["pairs"].items()}
    elif command is Command.DELETE_MATCH or command in _LISTING:
        kwargs["pattern"] = prefix + kwargs["pattern"]
    else:
        raise UnprefixedError("TenantCache", command.value)
    outcome = await call(*args, **kwargs)
    return _each_without(outcome, prefix) if command in _LISTING else outcome


async def _each_without(found: AsyncIterator[Any], prefix: str) -> AsyncIterator[Any]:
    async for item in found:
        check_prefix(prefix, "an iterator of a TenantCache")
        yield without_prefix(item, prefix) if isinstance(item, str) else (without_prefix(item[0], prefix), *item[1:])


class TenantCache(Cache):
    """A ``cashews.Cache`` for the keys of the tenant that is bound where it is used. Decorate and call it as any other.

    It differs from cashews' own where that is not one tenant's alone. ``clear``, ``get_keys_count``, ``tags_backend``
    and ``SERIALIZABLE`` transactions, which take one lock for all, are refused; so is what a later version adds.
    ``protected=True`` has no effect: calls at once would share one result, also between tenants. ``lock=True`` keeps
    many calls at once from computing the same.

    Raises:
        ConfigurationError: (at ``setup``) this version of cashews is built in another way than the ones known.
        NoTenantError: (at a command, or a call of a decorated function) no tenant is bound.
        UnprefixedError: (at a command) it would reach other tenants' keys.
    """

    def _add_backend(self, backend: Any, middlewares: tuple[Any, ...] = (), prefix: str = "") -> None:
        # the last one is the outermost: cashews' own, which delete by a key they see, then see the tenant's
        super()._add_backend(backend, (*middlewares, _prefix_keys), prefix)

    def setup(self, settings_url: str, *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Configure a store, as cashews does; it is not returned, since it knows no tenants."""
        super().setup(settings_url, *args, **options)
        stores: list[tuple[Any, ...]] = list(self._middlewares.values())
        if not stores or any(around[-1:] != (_prefix_keys,) for around in stores):
            raise ConfigurationError("this version of cashews is not known, and could leave keys without a prefix")

    def setup_tags_backend(self, settings_url: str, *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Configure the store of tags, as cashews does; it is not returned."""
        super().setup_tags_backend(settings_url, *args, **options)

    def _on_remove_callback(self) -> Any:
        async def forget(keys: Iterable[str], backend: Any) -> None:
            # keys as the store has them
            for key in keys:
                prefix, own = key[:_PREFIX_LENGTH], key[_PREFIX_LENGTH:]
                for tag in self.get_key_tags(own):
                    await self._get_tags_backend().set_remove(f"{prefix}{self._tags_key_prefix}{tag}", own)

        return forget

    async def delete_all(self, tenant: Tenant | UUID | str) -> None:
        """Delete every key of a tenant: for when it is purged.

        Args:
            tenant: A ``Tenant`` or an id; a purged tenant has no slug any more.

        Raises:
            CrossTenantError: another tenant is bound. Operators call this with none bound.
        """
        prefix = tenant_prefix(tenant)
        for backend in self._backends.values():
            if not backend.is_init:  # again would leave the first connections open
                await backend.init()  # type: ignore[no-untyped-call]
            await backend.delete_match(f"{prefix}*")

    async def clear(self) -> NoReturn:
        """Refuse: it deletes all tenants' keys.

        Raises:
            UnprefixedError: always.
        """
        raise UnprefixedError("TenantCache", "clear")

    async def get_keys_count(self) -> NoReturn:
        """Refuse: it counts all tenants' keys.

        Raises:
            UnprefixedError: always.
        """
        raise UnprefixedError("TenantCache", "get_keys_count")

    @property
    def tags_backend(self) -> NoReturn:
        """Refuse: it is the store itself.

        Raises:
            UnprefixedError: always.
        """
        raise UnprefixedError("TenantCache", "tags_backend")

    def transaction(self, mode: TransactionMode | None = None, timeout: float | None = None) -> Any:
        """Begin a transaction, as cashews does.

        Raises:
            UnprefixedError: it would be ``SERIALIZABLE``, which takes one lock for all tenants.
        """
        if TransactionMode.SERIALIZABLE in (mode, mode or self.transaction_mode):
            raise UnprefixedError("TenantCache", "transaction(SERIALIZABLE)")
        return super().transaction(mode, timeout)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Cache what a function returns, for each tenant by itself: cashews' decorator."""
        return super().__call__(*args, **{**kwargs, "protected": False})

    cache = __call__

    def early(self, *args: Any, **kwargs: Any) -> Any:
        """Cache what a function returns, and renew it before it expires: cashews' decorator."""
        return super().early(*args, **{**kwargs, "protected": False})

    def soft(self, *args: Any, **kwargs: Any) -> Any:
        """Cache what a function returns, and use it beyond its time when the function fails: cashews' decorator."""
        return super().soft(*args, **{**kwargs, "protected": False})


def _refusing(name: str) -> property:
    def refuse(self: object) -> NoReturn:
        raise UnprefixedError("TenantCache", name)

    return property(refuse)


for _name in dir(Cache):
    if not _name.startswith("_") and _name not in _KNOWN | vars(TenantCache).keys():
        setattr(TenantCache, _name, _refusing(_name))


__all__ = ["TenantCache"]
