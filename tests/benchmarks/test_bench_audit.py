"""The audit log: appends a second by one writer and by eight, against plain inserts; and verification.

Run by ``make bench ARGS='-k audit'``. Every ratio is of two things measured in the same run.
"""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text

from tests.support.quotas import line, quota_plane, say, start_worker

_HUNDRED = text(
    "SELECT tenancy.audit_append('test.bulk', gen_random_uuid(), 'acme', 'operator', 'ada', NULL, "
    "jsonb_build_object('n', n), NULL, 'request', '192.0.2.1') FROM generate_series(1, 100) n"
)


async def appends_per_second(mode: str, url: str, writers: int, each: int) -> float:
    """Let ``writers`` processes go at once, each with ``each`` transactions of one row."""
    workers = [await start_worker(mode, url, each, number) for number in range(writers)]
    assert [await line(worker) for worker in workers] == ["ready"] * writers
    started = time.perf_counter()
    for worker in workers:
        await say(worker)
    assert [int(await line(worker, timeout=300)) for worker in workers] == [each] * writers
    seconds = time.perf_counter() - started
    for worker in workers:
        await worker.wait()
    return writers * each / seconds


@pytest.mark.parametrize("flush", ["on", "off"])
async def test_bench_append(control_url: str, flush: str) -> None:
    """Each in a transaction of its own; with the flush to disk that a commit waits for, and without.

    The head of the chain is locked until the commit, so writers queue for one flush each, where plain inserts share
    theirs.
    """
    async with quota_plane(control_url) as plane:
        await plane.sql(
            "CREATE TABLE plain (id bigserial PRIMARY KEY, writer text, content jsonb, at timestamptz DEFAULT now())"
        )
        await plane.sql(f'ALTER DATABASE "{plane.control.database}" SET synchronous_commit = {flush}')
        for writers, each in ((1, 1_000), (8, 250)):
            plain = await appends_per_second("insert", control_url, writers, each)
            chained = await appends_per_second("append", control_url, writers, each)
            print(
                f"\nsynchronous_commit {flush:3}, writers: {writers}: {chained:6,.0f} appends a second, "
                f"{chained / plain:.2f} x the {plain:,.0f} plain inserts"
            )
        assert (await plane.audit.verify()).ok


async def test_bench_verify(control_url: str) -> None:
    """A chain of 20,000 entries, streamed and hashed again."""
    async with quota_plane(control_url) as plane:
        started = time.perf_counter()
        for _ in range(200):
            async with plane.control.transaction() as connection:
                await connection.execute(_HUNDRED)
        appended = time.perf_counter() - started
        started = time.perf_counter()
        report = await plane.audit.verify()
        verified = time.perf_counter() - started
        assert report.ok and report.entries == 20_000
    print(f"\nappend, a hundred in one statement: {20_000 / appended:,.0f} entries a second")
    print(f"verify:                             {20_000 / verified:,.0f} entries a second")
