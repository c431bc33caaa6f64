"""The directory: a hit, a miss, and look-ups in a registry of a million tenants.

Run by ``make bench ARGS='-k directory'``. Every ratio is of two things measured in the same run.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from uuid import UUID

import asyncpg
import pytest

from tenancy_orm.errors import InvalidCredentialError
from tenancy_orm.keys.format import ALPHABET, NewKey, generate_key
from tenancy_orm.registry.rows import uuid7
from tests.benchmarks.test_bench_session import report, turns
from tests.support.control import ControlPlane, control_plane
from tests.support.postgres import Postgres

TENANTS = int(os.environ.get("BENCH_TENANTS", "1000000"))
KEYS_PER_TENANT = 2
SAMPLE = 1_000


def per_call(call: Callable[[], object], *, count: int = 100_000, rounds: int = 5) -> float:
    """Seconds of one call: the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - started)
    return best / count


async def per_await(call: Callable[[], Awaitable[object]], *, count: int, rounds: int = 5) -> float:
    """Seconds of one awaited call: the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(count):
            await call()
        best = min(best, time.perf_counter() - started)
    return best / count


async def test_bench_hit_and_miss(control_url: str) -> None:
    """A hit is one hash and one look-up; a miss is one query."""
    async with control_plane(control_url) as plane:
        tenant, key = await plane.tenant("acme")
        await plane.directory.authenticate(key)
        bound = await plane.key(tenant, networks=["10.0.0.0/8"])
        await plane.directory.authenticate(bound.text, source="10.0.0.1")
        empty = per_call(lambda: None)
        hit = per_call(lambda: plane.directory.peek(key, "10.0.0.1")) - empty
        bound_hit = per_call(lambda: plane.directory.peek(bound.text, "10.0.0.1")) - empty
        awaited = await per_await(lambda: plane.directory.authenticate(key, source="10.0.0.1"), count=20_000)
        by_id = await per_await(lambda: plane.directory.tenant(tenant.id), count=20_000)

        # each key once: what was admitted is checked again whenever something is invalidated
        pending = [(await plane.key(tenant)).text for _ in range(1_050)]
        plane.directory.invalidate()

        async def miss() -> None:
            await plane.directory.authenticate(pending.pop())

        async with _raw_query(control_url, bound.key_id) as query:
            bare, missing = await turns(query, miss, count=1_000)
    print(f"\nhit (peek)                        {hit * 1e6:8.2f} us   goal: under 2 us")
    print(f"hit, key bound to networks        {bound_hit * 1e6:8.2f} us")
    print(f"hit, awaited (authenticate)       {awaited * 1e6:8.2f} us")
    print(f"tenant by id, awaited             {by_id * 1e6:8.2f} us")
    report("miss, against the bare query, prepared (goal: at most 3)", bare, missing)
    print()


@contextlib.asynccontextmanager
async def _raw_query(url: str, key_id: str) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    connection = await asyncpg.connect(url)
    try:
        query = await connection.prepare(
            "SELECT k.digest, k.scopes, t.* FROM tenancy.api_keys k JOIN tenancy.tenants t ON t.id = k.tenant_id "
            "WHERE k.id = $1"
        )
        yield lambda: query.fetchrow(key_id)
    finally:
        await connection.close()


# --- a million tenants ----------------------------------------------------------------------------------------------


def tenant_rows(ids: Iterable[UUID]) -> Iterator[tuple[object, ...]]:
    """Rows of active tenants."""
    now = datetime.now(UTC)
    for number, tenant_id in enumerate(ids):
        name = f"bench_t_{tenant_id.hex}"
        yield tenant_id, f"bench-{number}", "active", "free", "default", name, name, b"x" * 90, now, now


def key_rows(ids: list[UUID], known: list[NewKey]) -> Iterator[tuple[object, ...]]:
    """Rows of keys: those that are ``known`` spread evenly among random ones."""
    now = datetime.now(UTC)
    total = len(ids) * KEYS_PER_TENANT
    stride = total // len(known)
    # neither secret nor unique by construction: 16 characters of 62 do not meet by chance
    generator = random.Random(0)
    for number in range(total):
        key = known[number // stride] if number % stride == 0 and number // stride < len(known) else None
        key_id = key.key_id if key else "".join(generator.choices(ALPHABET, k=16))
        digest = key.digest if key else generator.randbytes(32)
        yield key_id, ids[number % len(ids)], "ten_live", digest, now


async def fill(url: str, count: int) -> list[NewKey]:
    """Load ``count`` tenants and their keys by COPY; returns some keys that are among them."""
    ids = [uuid7() for _ in range(count)]
    known = [generate_key("ten_live") for _ in range(min(SAMPLE, count))]
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            # tenants do not begin as active, but for the triggers' leave
            await connection.execute("SET LOCAL session_replication_role = replica")
            columns = "id slug status tier server database_name role_name sealed_password created_at updated_at"
            await connection.copy_records_to_table(
                "tenants", schema_name="tenancy", columns=columns.split(), records=tenant_rows(ids), timeout=600
            )
            await connection.copy_records_to_table(
                "api_keys",
                schema_name="tenancy",
                columns=["id", "tenant_id", "prefix", "digest", "created_at"],
                records=key_rows(ids, known),
                timeout=600,
            )
        await connection.execute("VACUUM (ANALYZE) tenancy.tenants, tenancy.api_keys", timeout=600)
    finally:
        await connection.close()
    return known


async def look_ups(plane: ControlPlane, known: list[NewKey]) -> list[float]:
    """Seconds of each look-up of a key that is not remembered."""
    taken = []
    for key in random.sample(known, len(known)):
        started = time.perf_counter()
        await plane.directory.authenticate(key.text)
        taken.append(time.perf_counter() - started)
    return taken


@pytest.mark.timeout(1_200)
async def test_bench_look_up_in_a_large_registry(postgres: Postgres, control_url: str) -> None:
    """The time of a miss does not depend on how many tenants there are."""
    large = await postgres.create_database(postgres.new_name("bench"))
    try:
        async with control_plane(control_url) as few, control_plane(large) as many:
            known_few = await fill(control_url, 1_000)
            started = time.perf_counter()
            known_many = await fill(large, TENANTS)
            loaded = time.perf_counter() - started
            unknown = [generate_key("ten_live") for _ in range(SAMPLE)]
            taken: dict[str, list[float]] = {"few": [], "many": []}
            # in turns, so that what else the machine does weighs on both alike
            for _ in range(5):
                for name, plane, known in (("few", few, known_few), ("many", many, known_many)):
                    plane.directory.invalidate()
                    taken[name] += await look_ups(plane, known)
            missing = await _unknown(many, unknown)
    finally:
        await postgres.drop_database(make_name(large))
    print(f"\nloaded {TENANTS:,} tenants and {TENANTS * KEYS_PER_TENANT:,} keys in {loaded:.0f} s")
    for name, count in (("few", 1_000), ("many", TENANTS)):
        p50, p99 = statistics.median(taken[name]), statistics.quantiles(taken[name], n=100)[98]
        print(f"look-up among {count:>9,} tenants: p50 {p50 * 1e6:6.0f} us, p99 {p99 * 1e6:6.0f} us")
    ratio = statistics.median(taken["many"]) / statistics.median(taken["few"])
    print(f"ratio of the medians: {ratio:.2f}; an unknown key among {TENANTS:,}: p50 {missing * 1e6:.0f} us")


async def _unknown(plane: ControlPlane, keys: list[NewKey]) -> float:
    taken = []
    for key in keys:
        started = time.perf_counter()
        with contextlib.suppress(InvalidCredentialError):
            await plane.directory.authenticate(key.text)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def make_name(url: str) -> str:
    """The database's name."""
    return url.rsplit("/", 1)[1]
