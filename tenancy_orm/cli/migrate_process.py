"""A further process of a run: ``python -m tenancy_orm.cli.migrate_process``, as ``migrate_processes`` starts it.

Its standard input says first what it takes part in. When that ends, the process gives back its tenants and ends too.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tenancy import Tenancy


def main() -> None:
    """Take part in a run."""
    # as the command line does while it imports
    gc.disable()
    import typer

    from .runtime import operator, run

    gc.freeze()
    gc.enable()
    if not (line := sys.stdin.buffer.readline()):
        return
    given: dict[str, Any] = json.loads(line)

    async def command(tenancy: Tenancy) -> None:
        _end_with_input()
        await tenancy.migrations.join(given["run"], x=given["x"], actor=operator())

    try:
        # the command that has started it says how to go on
        with suppress(asyncio.CancelledError):
            run(command)
    except typer.Exit as exc:
        sys.exit(exc.exit_code)


def _end_with_input() -> None:
    """Cancel the running task when the standard input ends, or at SIGTERM."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(sys.stdin)
        # once: a second cancellation would interrupt the clean-up that the first one has started
        if not task.cancelling():
            task.cancel()

    loop.add_reader(sys.stdin, end)
    loop.add_signal_handler(signal.SIGTERM, end)


if __name__ == "__main__":
    main()
