"""The progress of a run is shown beside it, and never in its way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tenancy_orm import Tenancy
from tenancy_orm.cli.migrate_progress import shown
from tenancy_orm.events import EventBus, MigrationRunStarted


async def test_an_error_of_the_progress_is_not_that_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """It would hide the report, and which tenants have failed."""
    asked = asyncio.Event()

    async def progress(run: int) -> Any:
        asked.set()
        raise LookupError("no such column")

    events = EventBus()
    tenancy = cast(Tenancy, SimpleNamespace(events=events, migrations=SimpleNamespace(progress=progress)))
    async with shown(tenancy, quiet=False):
        events.emit(MigrationRunStarted(run=17, command="upgrade", target="head", tenants=1))
        await asked.wait()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["run 17", "the progress could not be shown: LookupError: no such column"]
