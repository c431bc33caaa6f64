"""A process that exports: ``python -m tests.support.export_process``, with what to do as JSON on its standard input.

``kill``: it is killed by SIGKILL as soon as that table is begun. ``measure``: it prints the peaks of its memory, in
bytes, after the export of each named tenant, and after one has been fetched as a whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.exports import ExportProgress
from tests.support.models import Base


async def export_and_die(tenancy: Tenancy, task: dict[str, Any]) -> None:
    """Export until a table is begun."""

    def die(progress: ExportProgress) -> None:
        if progress.part == task["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    await tenancy.exports.write("acme", task["to"], progress=die)


def peak() -> int:
    """The most memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def measure(tenancy: Tenancy, task: dict[str, Any]) -> None:
    """Export tenants one after the other, to a file and as a stream."""
    peaks = []
    for slug in task["measure"]:
        await tenancy.exports.write(slug, Path(task["to"], f"{slug}.zip"))
        async with tenancy.exports.open(slug) as export:

            async def drop(data: bytes) -> None:
                await asyncio.sleep(0)

            await export.write_to(drop)
        peaks.append(peak())
    async with tenancy.session(task["measure"][-1]) as session:
        raw: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        rows = await raw.fetch("SELECT * FROM big")
        peaks.append(peak())
        assert rows
    print(json.dumps(peaks), flush=True)


async def main() -> None:
    """Do what is asked for."""
    task = json.loads(sys.stdin.read())
    config = TenancyConfig.from_env(metadata=Base.metadata)
    async with Tenancy(config) as tenancy:
        if "kill" in task:
            await export_and_die(tenancy, task)
        else:
            await measure(tenancy, task)


if __name__ == "__main__":
    asyncio.run(main())
