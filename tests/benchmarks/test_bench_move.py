"""What a move costs a tenant under load: the pause, the errors that clients see, the time of it all.

Run by ``make bench ARGS='-k move'``; ``BENCH_MOVE_MB`` is the size of the tenant, 1024 by default, and
``BENCH_MOVE_CLIENTS`` how many sessions write.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time

from sqlalchemy import text

from tenancy_orm import Tenancy
from tests.support.moving import moving_config, pair_of_servers
from tests.support.waiting import until

MEGABYTES = int(os.environ.get("BENCH_MOVE_MB", "1024"))
CLIENTS = int(os.environ.get("BENCH_MOVE_CLIENTS", "8"))
MOVES = int(os.environ.get("BENCH_MOVES", "3"))

# about a kilobyte each
_FILL = "INSERT INTO notes (body) SELECT repeat(md5(random()::text), 30) FROM generate_series(1, 25000)"


async def test_bench_move(control_url: str, name_prefix: str) -> None:
    """The pause, the longest wait of a client, its errors, and the time of the copy."""
    with pair_of_servers() as pair:
        tenancy = Tenancy(moving_config(pair, control_url, name_prefix))
        await tenancy.open(initialise=True)
        try:
            await tenancy.tenants.create("acme")
            async with tenancy.session("acme") as session:
                for _ in range(MEGABYTES // 25 or 1):
                    await session.execute(text(_FILL))
                    await session.commit()
                size = await session.scalar(text("SELECT pg_database_size(current_database())"))
            print(f"\n{size / 1e6:.0f} MB, {CLIENTS} clients, {MOVES} moves")
            pauses, totals, waits = [], [], []
            for number in range(MOVES):
                load = Load(tenancy)
                clients = [asyncio.create_task(load.run()) for _ in range(CLIENTS)]
                await until(lambda load=load: load.done >= 10 * CLIENTS, seconds=600.0)  # type: ignore[misc]
                began = time.perf_counter()
                moved = await tenancy.moves.move("acme", to=("two", "one")[number % 2])
                totals.append(time.perf_counter() - began)
                pauses.append(float(moved.detail["pause_seconds"]))
                load.stopped = True
                await asyncio.gather(*clients)
                waits.append(load.longest)
                print(
                    f"move {number + 1}: {totals[-1]:.1f} s, pause {pauses[-1]:.3f} s, longest request "
                    f"{load.longest:.3f} s, {load.done} requests, {len(load.errors)} errors"
                )
                for error in load.errors[:3]:
                    print(f"  {type(error).__name__}: {error}")
                await tenancy.moves.confirm("acme")
            print(
                f"pause: median {statistics.median(pauses):.3f} s, longest request: median "
                f"{statistics.median(waits):.3f} s, total: median {statistics.median(totals):.1f} s"
            )
        finally:
            await tenancy.close()


class Load:
    """Clients that write and read."""

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy
        self.done = 0
        self.longest = 0.0
        self.errors: list[Exception] = []
        self.stopped = False

    async def run(self) -> None:
        """Make requests, one after the other."""
        while not self.stopped:
            began = time.perf_counter()
            try:
                async with self._tenancy.transaction("acme") as session:
                    await session.execute(text("INSERT INTO notes (body) VALUES ('written')"))
                    await session.execute(text("SELECT body FROM notes ORDER BY id DESC LIMIT 1"))
                self.done += 1
            except Exception as exc:  # noqa: BLE001 - they are counted
                self.errors.append(exc)
            self.longest = max(self.longest, time.perf_counter() - began)
            await asyncio.sleep(0.005)
