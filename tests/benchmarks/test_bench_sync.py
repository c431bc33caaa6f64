"""A tenant's session of synchronous code against a plain engine of psycopg's with SQLAlchemy's ``QueuePool``.

Run by ``make bench ARGS='-k sync'``. Both run in turns, in one thread, on one database; the event loop that owns the
``Tenancy`` runs in another, as in an application. ``BENCH_TURNS`` says how often.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.sync.tenancy import hops_of
from tests.support.models import Note
from tests.support.postgres import Postgres

TURNS = int(os.environ.get("BENCH_TURNS", "1500"))


def test_bench_sync_session(tenancy_config: TenancyConfig, postgres: Postgres) -> None:
    """One row by its key; and what the hop into the loop costs by itself."""
    tenancy = Tenancy(tenancy_config)
    tenancy.sync.open(initialise=True)
    one = select(Note).where(Note.id == 1)
    try:
        tenant = tenancy.sync.call(tenancy.tenants.create, "acme").tenant
        with tenancy.sync.transaction("acme") as session:
            session.add(Note(body="x"))
        assert tenant.placement is not None
        engine = create_engine(postgres.url(tenant.placement.database, driver="psycopg"))

        def plain() -> None:
            with Session(engine, expire_on_commit=False) as session:
                assert session.scalars(one).one().id == 1

        def by_tenant() -> None:
            with tenancy.sync.session(tenant) as session:
                assert session.scalars(one).one().id == 1

        hops = hops_of(tenancy.sync)

        def hop() -> None:
            hops.run(int)

        timed: dict[Callable[[], None], list[float]] = {plain: [], by_tenant: [], hop: []}
        for call in timed:
            for _ in range(20):
                call()
        for _ in range(TURNS):
            for call, seconds in timed.items():
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
        engine.dispose()
    finally:
        tenancy.sync.close()
    print(f"\none row of synchronous code, {TURNS} times each, in turns; by hand, by tenant, ratio; one hop:", end="")
    for name, of in (("median", statistics.median), ("fastest tenth", lambda s: statistics.quantiles(s, n=10)[0])):
        hand, ours, alone = (of(seconds) * 1e6 for seconds in timed.values())
        print(f"\n    {name:14}{hand:7.0f} us {ours:7.0f} us {ours / hand:7.3f} {alone:7.0f} us", end="")
