"""``Run``: one process's work in one recorded run, from its preparation to the report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..errors import ControlUnavailableError, JobLostError
from ..events import EventBus, MigrationRunEnded, MigrationRunStarted
from ..jobs import Claimant
from ..migrations.data_batches import DataObserver, DataProgress
from ..migrations.failures import describe
from ..migrations.logs import logger, warning_once
from ..secrets.keyring import Keyring
from .claims import GIVEN_UP, Claimed, Finished, RunClaims
from .gate import PLANNED, WaveGate
from .participation import Participation
from .patience import is_temporary, repeat
from .records import RunRecord, RunRecords, RunState, TenantRecord
from .report import FleetReport, Progress, TenantOutcome
from .work import RunWork

_PASSES = 10  # how often a run looks for tenants that were created during it
_OBSERVED_SECONDS = 1.0  # between two notes of how far a data migration has come


class Run:
    """One process's work in one recorded run.

    Args:
        records: The records of runs.
        run: Its number.
        claimant: This process, which takes part already.
        work: What it does.
        keyring: Opens the seal of the checks between waves.
        concurrency: How many tenants this process migrates at once; as many as the one that started it where None.
        progress: Called as the run proceeds.
        actor: Who works here.
        events: Where the run is announced.
        limit: How long the migration of one tenant can take, in seconds.
    """

    def __init__(
        self,
        records: RunRecords,
        run: int,
        claimant: Claimant,
        work: RunWork,
        *,
        keyring: Keyring,
        concurrency: int | None = None,
        progress: Progress | None = None,
        actor: Actor = SYSTEM,
        events: EventBus,
        limit: float,
    ) -> None:
        self._records = records
        self._events = events
        self._run = run
        self._work = work
        self._keyring = keyring
        self._concurrency = concurrency
        self._progress = progress
        self._actor = actor
        self._claims = RunClaims(records.control, run, claimant, held=work.holds)
        self._limit = limit
        self._passes = 0

    async def execute(self) -> FleetReport:
        """Take part until the run ends or pauses, and return the report of the whole run."""
        started = time.monotonic()
        record = await self._records.get(self._run)
        names: dict[str, Any] = {"run": record.id, "command": record.command, "target": record.target}
        total = sum(record.tenants.values())
        self._events.emit(MigrationRunStarted(**names, tenants=total, is_new=record.gate == self._claims.claimant.id))
        if self._progress is not None:
            self._progress.total(total)
        with warning_once():
            while record.state == "running":
                try:
                    await self._take_part(record)
                    break
                except JobLostError:
                    logger.warning("run %d: this process was silent for too long, and joins again", self._run)
                    claimant = Claimant()
                    self._claims = RunClaims(self._records.control, self._run, claimant, held=self._work.holds)
                    await self._records.join(self._run, claimant)
                    record = await self._records.get(self._run)
        report = await self._report(time.monotonic() - started)
        self._events.emit(MigrationRunEnded(**names, state=report.state, failed=len(report.failures)))
        return report

    async def _take_part(self, record: RunRecord) -> None:
        plan = record.plan
        concurrency = self._concurrency or int(plan["concurrency"])
        part = Participation(
            self._claims,
            prepare=self._prepare,
            migrate=self._migrate,
            gate=self._pass_gate,
            concurrency=concurrency,
            per_server=int(plan["server_concurrency"]),
            stop_on_failure=bool(plan["stop_on_failure"]),
            max_failures=plan.get("max_failures"),
            at_gate=record.wave if record.gate == self._claims.claimant.id else None,
            outages=self._work.outages,
        )
        try:
            await part.run()
        except (JobLostError, ControlUnavailableError):
            raise
        except Exception as exc:
            await self._records.fail_unstarted(self._run, describe(exc), actor=self._actor)
            raise

    async def _prepare(self) -> None:
        await self._work.prepare(await self._claims.servers())

    # --- gates ------------------------------------------------------------------------------------------------------

    async def _pass_gate(self, wave: int) -> RunState | None:
        record = await self._records.get(self._run)
        if record.state != "running":
            return record.state
        if wave < 0:
            await self._open(record)
            return None
        if wave < len(record.plan.get("waves") or (None,)) - 1:
            return await self._wave_ended(record)
        if record.plan["all"] and self._passes < _PASSES:
            self._passes += 1
            # tenants that older code cloned from its template after the list was made
            if added := await self._claims.add_missing(wave):
                if self._progress is not None:
                    self._progress.total(sum(record.tenants.values()) + added)
                return None
        return await self._end(record)

    async def _open(self, record: RunRecord) -> None:
        try:
            await self._work.open(record, self._claims.tenants)
        except ControlUnavailableError:
            raise
        except Exception as exc:
            # for all the processes that take part
            await self._claims.end("failed", describe(exc), actor=self._actor)
            raise
        await self._claims.open_wave(0)

    async def _wave_ended(self, record: RunRecord) -> RunState | None:
        """Open the wave after the one that has ended, or pause the run."""
        return await self._wave_gate(record).pass_on()

    def _wave_gate(self, record: RunRecord) -> WaveGate:
        return WaveGate(self._records.control, self._keyring, self._claims, record)

    async def _end(self, record: RunRecord) -> RunState | None:
        gate = self._wave_gate(record)
        reason = await gate.check_last()
        if not await gate.is_ours():
            return None
        if reason is not None:
            return await self._claims.end("paused", reason, actor=self._actor)
        if await self._claims.is_complete():
            await self._work.close(record, lambda: self._records.tenants(self._run))
        return await self._claims.end(actor=self._actor)

    # --- tenants ----------------------------------------------------------------------------------------------------

    async def _migrate(self, claimed: Claimed) -> Finished:
        tenant = claimed.tenant
        if claimed.losses >= GIVEN_UP:
            error = (
                f"its migration was begun {claimed.losses} times, and its process or its server was lost each time; "
                f"find what ends them, then try it again with: tenancy migrate retry {self._run}"
            )
            return Finished(tenant_id=tenant.id, state="failed", error=error, counts=False)

        has_begun = False

        async def begin(before: str | None, target: str | None) -> None:
            nonlocal has_begun
            await self._begin(claimed, before, target, again=has_begun)
            has_begun = True

        result = await self._work.migrate(claimed, begin, self._observer(claimed))
        outcome = result.outcome
        if outcome is None:
            state, detail = ("waiting", {}) if result.is_interrupted else ("skipped", {"gone": True})
            return Finished(
                tenant_id=tenant.id,
                state=state,
                after=result.revision,
                has_read=result.has_read,
                is_announced=result.is_announced,
                is_granted=result.is_granted,
                error=result.error,
                is_lost=result.is_lost,
                detail=detail,
            )
        self._work.emit(outcome)
        if self._progress is not None:
            self._progress.done(outcome)
        return Finished(
            tenant_id=tenant.id,
            state="done" if outcome.ok else "failed",
            before=outcome.before,
            after=outcome.after,
            has_read=result.has_read,
            is_announced=result.is_announced,
            is_granted=result.is_granted,
            changed=outcome.changed,
            seconds=outcome.seconds,
            sqlstate=outcome.sqlstate,
            error=outcome.error,
            detail={"extensions": list(outcome.extensions)} if outcome.extensions else {},
        )

    async def _begin(self, claimed: Claimed, before: str | None, target: str | None, *, again: bool) -> None:
        """Record what a tenant has before its first change. Without that it is not changed."""
        await repeat(
            lambda: self._claims.begin(claimed.tenant.id, before, target=target, seconds=self._limit, again=again)
        )

    def _observer(self, claimed: Claimed) -> DataObserver:
        """Record how far the data migrations of a tenant have come, once a second."""
        known: dict[str, Any] = {}
        due = 0.0

        async def observe(progress: DataProgress) -> None:
            nonlocal due
            known[progress.label] = progress.fields()
            if not progress.done and time.monotonic() < due:
                return
            due = time.monotonic() + _OBSERVED_SECONDS
            try:
                await self._claims.note(claimed.tenant.id, {"data": known})
            except Exception as exc:
                if not is_temporary(exc):
                    raise
                logger.debug("the progress of a data migration is not recorded: %s", type(exc).__name__)

        return observe

    # --- the report -------------------------------------------------------------------------------------------------

    async def _report(self, seconds: float) -> FleetReport:
        record = await self._records.get(self._run)
        return report_of(record, await self._records.tenants(self._run), seconds)


def report_of(record: RunRecord, tenants: Iterable[TenantRecord], seconds: float) -> FleetReport:
    """Return the report of a whole run from its records."""
    known = [one for one in tenants if "gone" not in one.detail]
    return FleetReport(
        command="install extensions" if record.command == "extensions" else record.command,
        target=record.target,
        outcomes=tuple(_outcome(one) for one in known if one.state in ("done", "failed")),
        seconds=seconds,
        skipped=tuple(one.slug for one in known if one.state not in ("done", "failed")),
        run=record.id,
        state=record.state,
        reason=record.reason,
        is_planned=record.state == "paused" and (record.reason or "").endswith(PLANNED),
    )


def _outcome(record: TenantRecord) -> TenantOutcome:
    return TenantOutcome(
        tenant_id=record.tenant_id,
        slug=record.slug,
        server=record.server,
        before=record.revision_before,
        after=record.revision_after,
        changed=record.changed,
        seconds=record.seconds or 0.0,
        error=(record.error or "failed") if record.state == "failed" else None,
        sqlstate=record.sqlstate,
        extensions=tuple(record.detail.get("extensions", ())),
    )


__all__ = ["Run", "report_of"]
