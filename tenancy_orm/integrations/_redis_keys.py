"""Where the keys are in the arguments of each command of Redis that is known to reach no others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeAlias

from ..errors import InvalidNameError, MissingExtraError
from ..prefixes import without_prefix

try:
    from redis import Redis
except ImportError as exc:
    raise MissingExtraError("redis", "redis") from exc

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Shape: TypeAlias = Callable[[str, str, tuple[Any, ...], dict[str, Any]], Arguments]
"""Puts a prefix in front of the keys: of a command's name, the prefix, and the arguments by position and by name."""

# the first argument is a key, and the command reads or writes no other
# fmt: off
FIRST = (
    "append", "bitcount", "bitpos", "decr", "decrby", "expire", "expireat", "expiretime", "get", "getbit", "getdel",
    "getex", "getrange", "getset", "incr", "incrby", "incrbyfloat", "persist", "pexpire", "pexpireat", "pexpiretime",
    "psetex", "pttl", "set", "setbit", "setex", "setnx", "setrange", "strlen", "substr", "ttl", "type", "hdel",
    "hexists", "hexpire", "hexpireat", "hexpiretime", "hget", "hgetall", "hincrby", "hincrbyfloat", "hkeys", "hlen",
    "hmget", "hpersist", "hpexpire", "hpexpireat", "hpexpiretime", "hpttl", "hrandfield", "hscan", "hset",
    "hsetnx", "hstrlen", "httl", "hvals", "lindex", "linsert", "llen", "lpop", "lpos", "lpush", "lpushx", "lrange",
    "lrem", "lset", "ltrim", "rpop", "rpush", "rpushx", "pfadd", "sadd", "scard", "sismember", "smembers",
    "smismember", "spop", "srandmember", "srem", "sscan", "geoadd", "geodist", "geohash", "geopos", "geosearch",
    "xack", "xadd", "xautoclaim", "xclaim", "xdel", "xgroup_create", "xgroup_createconsumer", "xgroup_delconsumer",
    "xgroup_destroy", "xgroup_setid", "xinfo_consumers", "xinfo_groups", "xinfo_stream", "xlen", "xpending",
    "xpending_range", "xrange", "xrevrange", "xtrim", "zadd", "zcard", "zcount", "zincrby", "zlexcount", "zmscore",
    "zpopmax", "zpopmin", "zrandmember", "zrange", "zrangebylex", "zrangebyscore", "zrank", "zrem", "zremrangebylex",
    "zremrangebyrank", "zremrangebyscore", "zrevrange", "zrevrangebylex", "zrevrangebyscore", "zrevrank", "zscan",
    "zscore",
)
# fmt: on
ITERATING = ("hscan_iter", "sscan_iter", "zscan_iter")  # of a client; a pipeline sends nothing yet


def prefixed_key(prefix: str, key: Any) -> str | bytes:
    if isinstance(key, str):
        return prefix + key
    if isinstance(key, (bytes, bytearray, memoryview)):
        return prefix.encode() + bytes(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{prefix}{key}"
    raise InvalidNameError(repr(key), "is not a key: pass a string, bytes or an integer")


def _keys(prefix: str, keys: Any) -> list[str | bytes]:
    """Of one key, or several in a collection, as redis-py reads it."""
    if isinstance(keys, (str, bytes, bytearray, memoryview, int)):
        return [prefixed_key(prefix, keys)]
    return [prefixed_key(prefix, key) for key in keys]


@cache
def _first_parameter(method: str) -> str:
    return list(inspect.signature(getattr(Redis, method)).parameters)[1]


def _first(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if args:
        return (prefixed_key(prefix, args[0]), *args[1:]), kwargs
    name = _first_parameter(method)
    if name not in kwargs:
        raise TypeError(f"{method}() needs a key")
    return (), {**kwargs, name: prefixed_key(prefix, kwargs[name])}


def _leading(count: int, *allowed: str, more: int = 0) -> Shape:
    """Of a command with that many keys in front, then ``more`` arguments, and options by these names."""

    def shape(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        _by_position(method, kwargs, allowed)
        if not count <= len(args) <= count + more:
            raise TypeError(f"{method}() takes {count} keys, and then {more} arguments by position")
        return (*(prefixed_key(prefix, key) for key in args[:count]), *args[count:]), kwargs

    return shape


def _every(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    _by_position(method, kwargs, ())
    return tuple(prefixed_key(prefix, key) for key in args), kwargs


def _collections(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Of one where each argument is a key or a collection of keys."""
    _by_position(method, kwargs, ())
    return tuple(key for keys in args for key in _keys(prefix, keys)), kwargs


def _stored(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    _by_position(method, kwargs, ())
    first, *rest = args
    return (prefixed_key(prefix, first), [key for keys in rest for key in _keys(prefix, keys)]), kwargs


def _mapping(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    _by_position(method, kwargs, ())
    (given,) = args
    return ({prefixed_key(prefix, key): value for key, value in given.items()},), kwargs


def _popped(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    _by_position(method, kwargs, ("timeout",))
    keys, *rest = args
    return (_keys(prefix, keys), *rest), kwargs


def _streams(position: int) -> Shape:
    """Of a command with a mapping of streams as that argument."""

    def shape(method: str, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        given = args[position] if len(args) > position else kwargs.get("streams")
        if not isinstance(given, Mapping):
            raise TypeError(f"{method}() needs a dictionary of streams and ids")
        streams = {prefixed_key(prefix, name): after for name, after in given.items()}
        if len(args) > position:
            return (*args[:position], streams, *args[position + 1 :]), kwargs
        return args, {**kwargs, "streams": streams}

    return shape


def _by_position(method: str, kwargs: dict[str, Any], allowed: Iterable[str]) -> None:
    if unknown := kwargs.keys() - set(allowed):
        raise TypeError(f"{method}(): pass {', '.join(sorted(unknown))} by position; it may be a key")


SHAPES: Mapping[str, Shape] = {
    **dict.fromkeys((*FIRST, *ITERATING), _first),
    **dict.fromkeys(("delete", "exists", "unlink", "touch", "pfcount", "pfmerge"), _every),
    **dict.fromkeys(("mget", "sinter", "sunion", "sdiff"), _collections),
    **dict.fromkeys(("sinterstore", "sunionstore", "sdiffstore"), _stored),
    **dict.fromkeys(("mset", "msetnx"), _mapping),
    **dict.fromkeys(("rename", "renamenx", "rpoplpush"), _leading(2)),
    "smove": _leading(2, more=1),
    "brpoplpush": _leading(2, "timeout", more=1),
    "copy": _leading(2, "replace"),  # the third is another database
    "lmove": _leading(2, "src", "dest", more=2),
    "blmove": _leading(2, "timeout", "src", "dest", more=3),
    "publish": _leading(1, "message", more=1),
    **dict.fromkeys(("blpop", "brpop"), _popped),
    "xread": _streams(0),
    "xreadgroup": _streams(2),
}


def _popped_without(found: Any, prefix: str) -> Any:
    return found and (without_prefix(found[0], prefix), *found[1:])


def _streams_without(found: Any, prefix: str) -> Any:
    if isinstance(found, dict):  # with version 3 of the protocol
        return {without_prefix(name, prefix): entries for name, entries in found.items()}
    return found and [[without_prefix(name, prefix), entries] for name, entries in found]


RESULTS: Mapping[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("blpop", "brpop"), _popped_without),
    **dict.fromkeys(("xread", "xreadgroup"), _streams_without),
}
"""What removes the prefix from the result of a command that answers with keys."""

NOT_IN_PIPELINES = frozenset({*ITERATING, *RESULTS, "brpoplpush", "blmove"})


__all__ = ["FIRST", "NOT_IN_PIPELINES", "RESULTS", "SHAPES", "Shape", "prefixed_key"]
