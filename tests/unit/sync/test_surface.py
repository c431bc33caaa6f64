"""``Tenancy`` and ``SyncTenancy`` offer the same, by the same parameters, but for what is excused here."""

from __future__ import annotations

import inspect

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.sync import SyncTenancy

ASYNCHRONOUS_ALONE = {
    "lifespan": "of an ASGI application",
    "run_housekeeping": "tenancy.sync.call(tenancy.run_housekeeping)",
    "sync": "the way here",
    "on_create": "registers a function with the Tenancy",
    "wrap": "takes plain functions as well",
    "loop": "for run_coroutine_threadsafe, which sync.call does",
    "config": "the configuration is that of the Tenancy",
    "job": "a decorator of the Tenancy, for functions of a worker",
    "worker": "a process of its own: tenancy worker",
    "events": "of the Tenancy: subscribers are called in its event loop",
    **dict.fromkeys(
        (
            *("tenants", "domains", "keys", "members", "revocations", "tiers", "quotas", "metrics", "audit"),
            *("secrets", "migrations", "templates", "internals", "seeds", "schedules", "servers", "jobs", "warm_pool"),
            *(
                "operations",
                "backups",
                "restores",
                "rebuilding",
                "recovery",
                "exports",
                "erasures",
                "adoption",
                "clones",
                "moves",
            ),
        ),
        "a part of the Tenancy; sync.call awaits its methods",
    ),
}
SYNCHRONOUS_ALONE = {"call": "awaits what only the asynchronous one has"}


def public(kind: type) -> dict[str, object]:
    """The public members of a class, and how it is entered and left."""
    entered = {"__aenter__": "__enter__", "__aexit__": "__exit__"}
    return {
        entered.get(name, name): member
        for name, member in vars(kind).items()
        if not name.startswith("_") or name in (*entered, *entered.values())
    }


OFFERED, SYNC = public(Tenancy), public(SyncTenancy)


def test_each_has_what_the_other_has() -> None:
    """What is added to one is missed in the other, until it is there or excused; and no excuse outlives its cause."""
    assert OFFERED.keys() - SYNC.keys() == ASYNCHRONOUS_ALONE.keys() - {"events"}
    assert SYNC.keys() - OFFERED.keys() == SYNCHRONOUS_ALONE.keys()


@pytest.mark.parametrize("name", sorted(OFFERED.keys() & SYNC.keys()))
def test_both_take_the_same(name: str) -> None:
    """Names, kinds and defaults of the parameters."""
    one, other = OFFERED[name], SYNC[name]
    if isinstance(one, property):
        assert isinstance(other, property)
        return

    def parameters(function: object) -> list[tuple[str, object, object]]:
        found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return [(p.name, p.kind, p.default) for p in found]

    assert parameters(one) == parameters(other)
