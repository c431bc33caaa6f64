"""What a creation from the warm pool costs, up to the first row served, beside the claim and the connect by hand.

Run it with ``make bench ARGS='-k warm_pool'``. Both sides take turns, and pools of their own are filled before. By hand
is what there is no way around: a row is taken from a table of ready databases (UPDATE ... SKIP LOCKED), the role gets a
password and LOGIN, and the first connection selects a row.
"""

from __future__ import annotations

import statistics
import time
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.provisioning.creation.warm_creation import WarmCreation
from tenancy_orm.provisioning.server_objects.scram import scram_verifier
from tenancy_orm.secrets.keyring import new_password
from tests.benchmarks.test_bench_provisioning import Stopwatch, report
from tests.support.models import Base
from tests.support.postgres import Postgres

ROUNDS = 40


async def by_hand(postgres: Postgres, control: Any, admin: Any) -> None:
    """Claim one, open it, connect and select a row."""
    name = await control.fetchval(
        "UPDATE by_hand SET state = 'claimed' WHERE name = (SELECT name FROM by_hand WHERE state = 'ready' "
        "ORDER BY name FOR UPDATE SKIP LOCKED LIMIT 1) RETURNING name"
    )
    password = new_password()
    await admin.execute(
        f"ALTER ROLE \"{name}\" LOGIN PASSWORD '{scram_verifier(password)}'; "
        f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'
    )
    connection = await asyncpg.connect(postgres.url(name, user=name, password=password))
    await connection.fetchval("SELECT 1")
    await connection.close()


@pytest.mark.timeout(600)
async def test_a_creation_from_the_warm_pool(
    postgres: Postgres,
    control_url: str,
    name_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From ``create`` to the first row. The goals: a median under 8 ms, and at most 3 times what it is by hand."""
    config = TenancyConfig(
        control_url=control_url,
        encryption_keys={"1": b"k" * 32},
        name_prefix=name_prefix,
        servers={"default": postgres.admin_url},
        metadata=Base.metadata,
    ).replace(provisioning={"warm_pool": ROUNDS + 3, "warm_pool_background": False, "warm_pool_concurrency": 4})
    watch, parts = Stopwatch(), Stopwatch()
    async with AsyncExitStack() as stack:
        tenancy = Tenancy(config)
        await tenancy.open(initialise=True)
        stack.push_async_callback(tenancy.close)
        admin, control = [await stack.enter_async_context(postgres.connect()) for _ in range(2)]
        made = (await tenancy.warm_pool.refill()).made
        template = (await tenancy.templates.list())[0].name
        await control.execute("CREATE TABLE by_hand (name text PRIMARY KEY, state text DEFAULT 'ready')")
        for number in range(ROUNDS + 3):
            name = f"{name_prefix}_hand_{number:03}"
            await admin.execute(f'CREATE ROLE "{name}" NOLOGIN')
            await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
            warm = await asyncpg.connect(postgres.url(name))
            await warm.close()
            await admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            await control.execute("INSERT INTO by_hand (name) VALUES ($1)", name)
        for owner, names in {
            tenancy.internals.registry: ("register", "record_step", "complete"),
            tenancy.internals.provisioner: ("create",),
            WarmCreation: ("_lock", "_open", "_prove", "_release"),
        }.items():
            for name in names:
                parts.watch(monkeypatch, owner, name)
        for number in range(ROUNDS + 3):
            times = [time.perf_counter()]
            created = await tenancy.tenants.create(f"t{number}")
            times.append(time.perf_counter())
            async with tenancy.session(created.tenant) as session:
                assert await session.scalar(text("SELECT 1")) == 1
            times.append(time.perf_counter())
            assert created.tenant.placement is not None and created.tenant.placement.database in made
            await by_hand(postgres, control, admin)
            times.append(time.perf_counter())
            if number >= 3:
                spans = {"created": times[1] - times[0], "first row": times[2] - times[1]}
                spans |= {"both": times[2] - times[0], "by hand": times[3] - times[2]}
                for label, seconds in spans.items():
                    watch.spent.setdefault(label, []).append(seconds * 1e3)
        await control.execute("DROP TABLE by_hand")
    ratio = statistics.median(watch.spent["both"]) / statistics.median(watch.spent["by hand"])
    report(
        capsys,
        f"from create to the first row, PostgreSQL {postgres.version}, {ROUNDS} each in turns (median ms)",
        [*watch.lines(), f"  {'ratio of medians':30} {ratio:8.2f}", "of which", *parts.lines()],
    )
