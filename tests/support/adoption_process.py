"""A process that adopts a database and is killed: ``python -m tests.support.adoption_process``.

It reads what to do as JSON from stdin, and kills itself by SIGKILL as the step ``at`` begins, or as it has ended. For
a database in place, ``at`` may be "close", "settle", "mark" or "rename": it dies once that is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from tenancy_orm import Tenancy, TenancyConfig
from tenancy_orm.provisioning.creation import pipeline
from tenancy_orm.provisioning.creation.takeover import DatabaseTakeover


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    """Adopt, and die on the way."""
    task: dict[str, Any] = json.loads(sys.stdin.read())
    at = task["at"]
    if at == "proved":
        pipeline.prove = _die_in_proof
    if hasattr(DatabaseTakeover, f"_{at}"):
        _die_after(f"_{at}")
    async with Tenancy(TenancyConfig(**task["config"])) as tenancy:

        def die_at(step: str) -> None:
            if step == at:
                die()

        adoption = tenancy.adoption.rows if "where" in task["options"] else tenancy.adoption
        await adoption.adopt(*task["arguments"], **task["options"], progress=die_at)
        die()


def _die_after(name: str) -> None:
    original = getattr(DatabaseTakeover, name)

    async def dying(*given: Any, **options: Any) -> None:
        await original(*given, **options)
        die()

    setattr(DatabaseTakeover, name, dying)


async def _die_in_proof(*_: Any, **__: Any) -> Any:
    die()


if __name__ == "__main__":
    asyncio.run(main())
