"""``ExportManager``: writes a tenant's data as an archive that needs no PostgreSQL (``tenancy.exports``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..audit.actor import SYSTEM, Actor
from ..cancellation import run_to_completion
from ..config import TenancyConfig
from ..context import refuse_other_tenant, refuse_while_bound
from ..errors import ConfigurationError, ExportRunningError, OperationStateError, TenancyError
from ..jobs.claims import Claimant
from ..operations import Operations
from ..operations.records import Operation
from ..postgres import connections
from ..postgres.connections import Connection
from ..postgres.errors import describe
from ..postgres.failures import SERVER_FAILURES
from ..provisioning.logins.readers import Readers
from ..registry.lifecycle import check_usable
from ..registry.registry import Registry
from ..routing import Router
from ..tenant import Status, Tenant, TenantRef
from .archives import Write, ZipArchive
from .catalogue import Catalogue
from .journal import Journal
from .places import Place
from .plan import Plan, make_plan
from .running import ExportProgress, ExportReport, Run, check_files, failed, snapshot
from .values import ExportFormat

logger = logging.getLogger("tenancy_orm.exports")

_FORMATS = ("jsonl", "csv")
_MOST_FILES = 50_000  # large values and large objects of an export by request; each takes 1 kB of memory
_LOGIN_SECONDS = 600.0  # until then the one connection of an operator's export is opened


class ExportStream:
    """An export that is about to be sent: its tables are locked, and it is known what it has.

    Attributes:
        filename: What a browser may save it as.
        media_type: Its type.
        plan: What it has.
    """

    media_type = "application/zip"

    def __init__(self, connection: Connection, tenant: Tenant, plan: Plan) -> None:
        self._connection = connection
        self._tenant = tenant
        self._started = datetime.now(UTC)
        self.plan = plan
        self.filename = f"{tenant.slug}-{self._started:%Y%m%d-%H%M%S}.zip"
        self.report: ExportReport | None = None
        """What was sent; None until ``write_to`` has returned."""

    async def write_to(self, write: Write) -> ExportReport:
        """Write the archive, a piece at a time; each ``write`` is awaited before the next piece is made.

        Raises:
            ExportError: PostgreSQL refuses; what was written is not a complete archive, and does not open.
        """
        journal = Journal.temporary({})
        archive = ZipArchive(moment=self._started)
        try:
            run = Run(self._connection, self._tenant, self.plan, archive, journal, send=write, most_files=_MOST_FILES)
            self.report = await run.write()
        finally:
            archive.abandon()
            journal.close()
        return self.report


class ExportManager:
    """Exports tenants' data.

    Args:
        config: ``export`` is read from it.
        registry: The tenants, and the audit log.
        router: Connections as a tenant's own role, for exports on request.
        readers: Logins that read one tenant's database, for those of operators.
        operations: Where exports are recorded.
    """

    def __init__(
        self, config: TenancyConfig, registry: Registry, router: Router, readers: Readers, operations: Operations
    ) -> None:
        self._config = config.export
        self._connect_timeout = config.pool.connect_timeout
        self._registry = registry
        self._router = router
        self._readers = readers
        self._operations = operations

    async def write(
        self,
        tenant: TenantRef,
        path: str | Path,
        *,
        row_format: ExportFormat = "jsonl",
        exclude: Iterable[str] = (),
        resume: bool = False,
        progress: Callable[[ExportProgress], None] | None = None,
        actor: Actor = SYSTEM,
    ) -> ExportReport:
        """Write a tenant's data to a ZIP file or a directory, for an operator.

        It is read in one snapshot, by a login that is made for it, whatever the tenant's status: a suspended or deleted
        tenant may want its data as well. The archive gets its name once it is complete. Nothing is overwritten.

        With ``resume`` an export that was interrupted goes on: tables that are complete are kept, as they were then,
        and the others are read in a new snapshot. The manifest says which file is of which.

        Args:
            tenant: The tenant.
            path: A file that ends in ``.zip``, or a directory, which is empty or does not exist.
            row_format: "jsonl" or "csv".
            exclude: Tables and columns to leave out, beside ``export.exclude``: ``users``, ``users:password_hash``.
                Each must leave something out.
            resume: Go on with an export to that place.
            progress: Called as it goes on.
            actor: Who gets the data.

        Raises:
            ConfigurationError: an argument is not valid.
            ExportError: it would not be whole, or cannot be written there.
            TenantNotFoundError: there is no such tenant, or it has been purged.
            ProvisioningError, ServerUnavailableError: its server refused, or does not answer.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("exporting as an operator")
        _check_format(row_format)
        place = Place(Path(path), resume=resume)
        found = await self._registry.find(tenant)
        if found.status is Status.PROVISIONING:
            check_usable(found)
        detail = {"to": "zip" if place.is_zip else "directory", "row_format": row_format, "resumed": resume}
        async with (
            self._recorded(found, detail, actor) as outcome,
            self._connected(found) as connection,
            self._planned(connection, found, row_format, excluded=exclude) as plan,
        ):
            try:
                header = {"tenant": str(found.id), "schema_or_rules": plan.fingerprint}
                archive, journal = await asyncio.to_thread(place.open, header, datetime.now(UTC))
                run = Run(connection, found, plan, archive, journal, progress=progress)
                report = await run.write(str(place.path))
                await asyncio.to_thread(place.complete)
            finally:
                await run_to_completion(asyncio.to_thread(place.close))
            outcome.update(_summary(report))
        return report

    @asynccontextmanager
    async def open(
        self,
        tenant: TenantRef,
        *,
        row_format: ExportFormat = "jsonl",
        exclude: Iterable[str] = (),
        actor: Actor = SYSTEM,
    ) -> AsyncIterator[ExportStream]:
        """Begin an export that is sent as it is made, for the tenant itself: ``async with exports.open(t) as export``.

        It is read as the tenant's own role, over a connection of the pool, in a transaction that PostgreSQL ends after
        ``export.request_timeout``. One is made for each tenant at a time, in all processes. A rule of ``exclude`` that
        leaves nothing out is a warning, as one of the settings, since tenants may be at another revision.

        Raises:
            ConfigurationError: an argument is not valid.
            ExportRunningError: another export of the tenant is under way.
            ExportError: it would not be whole.
            TenancyError: as a session of the tenant.
            CrossTenantError: another tenant is bound.
        """
        refuse_other_tenant(tenant)
        _check_format(row_format)
        found = await self._registry.find(tenant)
        check_usable(found)
        detail = {"to": "request", "row_format": row_format}
        async with (
            self._recorded(found, detail, actor, alone=True) as outcome,
            self._router.connection(found) as pooled,
        ):
            raw: Any = (await pooled.get_raw_connection()).driver_connection
            seconds = self._config.request_timeout
            async with self._planned(raw, found, row_format, rules=exclude, seconds=seconds) as plan:
                check_files(found, plan.catalogue.large_objects, _MOST_FILES)
                stream = ExportStream(raw, found, plan)
                yield stream
                if stream.report is not None:
                    outcome.update(_summary(stream.report))

    @asynccontextmanager
    async def _connected(self, tenant: Tenant) -> AsyncIterator[Connection]:
        """Connect by a login that is made for this export."""
        async with AsyncExitStack() as stack:
            try:
                login = await stack.enter_async_context(self._readers.open(tenant, seconds=_LOGIN_SECONDS))
                connection = await login.connect(timeout=self._connect_timeout)
            except SERVER_FAILURES as exc:
                raise failed(tenant, exc) from exc
            stack.push_async_callback(_close, connection)
            yield connection

    @asynccontextmanager
    async def _planned(
        self,
        connection: Connection,
        tenant: Tenant,
        row_format: ExportFormat,
        *,
        rules: Iterable[str] = (),
        excluded: Iterable[str] = (),
        seconds: float = 0.0,
    ) -> AsyncIterator[Plan]:
        begun = snapshot(connection, seconds=seconds)
        try:
            catalogue: Catalogue = await begun.__aenter__()
        except SERVER_FAILURES as exc:
            raise failed(tenant, exc) from exc
        try:
            plan = make_plan(
                catalogue,
                row_format=row_format,
                bound=self._config.large_value_bytes,
                configured=(*self._config.exclude, *rules),
                excluded=excluded,
            )
            if plan.unmatched:
                logger.warning("tenant %s: these rules leave nothing out: %s", tenant.slug, ", ".join(plan.unmatched))
            yield plan
        finally:
            await begun.__aexit__(None, None, None)

    # --- records ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _recorded(
        self, tenant: Tenant, detail: dict[str, Any], actor: Actor, *, alone: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Record an export as an operation, and in the audit log before anything is read.

        Yields:
            What is recorded at its end.
        """
        claimant, outcome = Claimant(), dict[str, Any]()
        await self._end_abandoned(tenant)
        operation = await self._operations.begin(
            "export", tenant.id, step="read", claimant=claimant, detail=detail, actor=actor
        )
        try:
            if alone:
                await self._refuse_second(tenant, operation)
            await self._registry.record(
                tenant.id, "tenant.export", detail={**detail, "operation": operation.id}, actor=actor
            )
            async with self._operations.keep(operation, claimant):
                yield outcome
        except BaseException as exc:
            await run_to_completion(self._failed(operation, claimant, describe(exc)))
            raise
        await self._operations.finish(operation, claimant, "done", detail=outcome)

    async def _failed(self, operation: Operation, claimant: Claimant, reason: str) -> None:
        try:
            await self._operations.finish(operation, claimant, "failed", error=reason)
        except TenancyError as exc:
            logger.warning("the end of export %d was not recorded: %s", operation.id, exc)

    async def _refuse_second(self, tenant: Tenant, operation: Operation) -> None:
        # of two that begin at once, both see the other: the first one goes on
        for other in await self._operations.list(tenant_id=tenant.id, kinds=("export",), states=("running",)):
            if other.id < operation.id and other.is_claimed and other.detail.get("to") == "request":
                raise ExportRunningError(tenant.slug, other.id)

    async def _end_abandoned(self, tenant: Tenant) -> None:
        """End the records of exports that killed processes have left."""
        for other in await self._operations.list(tenant_id=tenant.id, kinds=("export",), states=("running",)):
            if other.is_abandoned:
                claimant = Claimant()
                try:
                    taken = await self._operations.claim(other.id, claimant)
                except OperationStateError:
                    continue  # another process was faster
                await self._failed(taken, claimant, "the process that made it has ended")


def _check_format(row_format: str) -> None:
    if row_format not in _FORMATS:
        raise ConfigurationError(f"{row_format!r} is not a format of an export; there are {', '.join(_FORMATS)}")


def _summary(report: ExportReport) -> dict[str, Any]:
    names = ("tables", "rows", "files", "bytes", "seconds")
    values = asdict(report)
    return {
        **{name: values[name] for name in names},
        "snapshots": [one.isoformat() for one in report.snapshots],
        "left_out": len(report.left_out),
    }


async def _close(connection: Connection) -> None:
    await run_to_completion(connections.close(connection))


__all__ = ["ExportManager", "ExportStream"]
