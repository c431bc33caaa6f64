"""``WaveGate``: what happens between two waves of a run, in the one process that has the gate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from sqlalchemy import text

from ..control.database import ControlDatabase
from ..migrations.logs import logger
from ..secrets.keyring import Keyring
from .checks import WaveReport, is_sealed, over_budget, run_checks
from .claims import RunClaims
from .patience import is_temporary
from .records import RunRecord, RunState
from .waves import Wave, Waves

PLANNED = ", as planned"
"""How the reason of a pause ends that the waves ask for."""

_LOOK_SECONDS = 1.0  # how often a process that waits or checks looks whether it still has the gate

_WAVE = text(
    "SELECT n.slug, t.state FROM tenancy.migration_run_tenants t JOIN tenancy.tenants n ON n.id = t.tenant_id "
    "WHERE t.run = :run AND t.wave = :wave AND t.state IN ('done', 'failed') ORDER BY t.tenant_id"
)
# By the records and the clock of the control database: a machine that goes on waits for what is left.
_WAITED = text(
    "SELECT extract(epoch FROM clock_timestamp() - max(ended_at)) FROM tenancy.migration_run_tenants "
    "WHERE run = :run AND wave = :wave"
)
_HAS_GATE = text(
    "SELECT EXISTS (SELECT FROM tenancy.migration_runs WHERE id = :run AND state = 'running' AND gate = :me)"
)


class WaveGate:
    """Decides whether a run goes on after a wave.

    What has to hold is looked at from the beginning by each process that gets the gate: where one is killed in the
    middle, the next one waits for what is left of the time and runs all checks again.

    Args:
        control: The control database.
        keyring: Opens the seal of the checks.
        claims: What this process writes about the run.
        record: The run.
    """

    def __init__(self, control: ControlDatabase, keyring: Keyring, claims: RunClaims, record: RunRecord) -> None:
        self._control = control
        self._keyring = keyring
        self._claims = claims
        self._record = record
        self._waves = Waves.from_json(record.plan)

    async def pass_on(self) -> RunState | None:
        """Open the next wave, or pause the run; return its state where it does not go on."""
        number = self._record.wave
        if self._is_skipped(number):
            await self._claims.open_wave(number + 1)
            return None
        wave = self._waves[number]
        reason = await self._while_ours(self._check(number, wave))
        if reason is not None:
            logger.error("run %d pauses: %s", self._record.id, reason)
            return await self._claims.end("paused", reason)
        if wave.pause:
            name = self._waves[number + 1].name
            return await self._claims.pause_before(number + 1, f"paused before wave {number + 2} ({name}){PLANNED}")
        await self._claims.open_wave(number + 1)
        return None

    async def check_last(self) -> str | None:
        """Check the last wave; return the reason why the run is not done."""
        if self._is_skipped(self._waves.last):
            return None
        return await self._while_ours(self._check(self._waves.last, self._waves[self._waves.last], is_last=True))

    def _is_skipped(self, number: int) -> bool:
        """Whether an operator has said that the run goes on after this wave as it is."""
        return bool(self._record.plan.get("skip_checks") == number)

    async def _check(self, number: int, wave: Wave, *, is_last: bool = False) -> str | None:
        report = await self._report(number)
        if not report.tenants:
            return None
        # failures of the last wave are failures of the run anyway
        if not is_last and (reason := over_budget(wave, report)):
            return reason
        if wave.wait:
            await self._wait(number, wave)
        if not wave.commands and not wave.functions:
            return None
        if not is_sealed(self._keyring, self._waves, self._record.id, self._record.plan.get("seal")):
            return "its checks were not recorded by a process of this installation, and none was run"
        return await run_checks(wave, report)

    async def _report(self, number: int) -> WaveReport:
        async with self._control.connect() as connection:
            rows = (await connection.execute(_WAVE, {"run": self._record.id, "wave": number})).all()
        return WaveReport(
            run=self._record.id,
            command=self._record.command,
            target=self._record.target,
            wave=number + 1,
            name=self._waves[number].name,
            tenants=tuple(row.slug for row in rows),
            failed=tuple(row.slug for row in rows if row.state == "failed"),
        )

    async def _wait(self, number: int, wave: Wave) -> None:
        async with self._control.connect() as connection:
            waited = await connection.scalar(_WAITED, {"run": self._record.id, "wave": number})
        left = wave.wait - float(waited or 0.0)
        if left > 0:
            logger.info("run %d waits %.0f s after wave %r", self._record.id, left, wave.name)
            await asyncio.sleep(left)

    async def _while_ours(self, check: Awaitable[str | None]) -> str | None:
        """Await ``check``, unless the run is cancelled or another process gets the gate: then end it."""
        task = asyncio.ensure_future(check)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_LOOK_SECONDS)
                if not task.done() and not await self.is_ours():
                    return None
            return task.result()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def is_ours(self) -> bool:
        """Whether the run goes on, and this process has the gate."""
        try:
            async with self._control.connect() as connection:
                names = {"run": self._record.id, "me": self._claims.claimant.id}
                return bool(await connection.scalar(_HAS_GATE, names))
        except Exception as exc:
            if not is_temporary(exc):
                raise
            return True  # the claim is renewed elsewhere, which also notices when it is lost


__all__ = ["PLANNED", "WaveGate"]
