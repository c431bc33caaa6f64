"""Running one of Alembic's commands on each tenant, with its output kept apart by tenant."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from alembic.config import Config
from sqlalchemy import Connection as SyncConnection

from ..postgres.connections import Connection
from ..tenant import Tenant, TenantRef, placement_of
from . import local
from .concurrency import map_concurrently
from .connections import Connections, Health
from .database import Target, active, close, lock, make_version_table, read_state
from .logs import labelled
from .scripts import Environment
from .selection import Selection

_printed: ContextVar[io.StringIO] = ContextVar("tenancy_orm.migrations.printed")


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The output of a command for one tenant, or the error that it failed with."""

    tenant: Tenant
    text: str
    error: Exception | None


class CommandRunner:
    """Runs a command, given by the ``options`` of its ``EnvironmentContext``, on each tenant's database.

    Args:
        connections: Connects to the databases.
        selection: Looks up the tenants.
        environment: The scripts.
        options: The options that the command passes to ``EnvironmentContext``.
    """

    def __init__(
        self, connections: Connections, selection: Selection, environment: Environment, options: dict[str, Any]
    ) -> None:
        self._connections = connections
        self._selection = selection
        self._environment = environment
        self._options = options
        self._health = Health()

    async def run(self, tenants: Iterable[TenantRef] | None, concurrency: int) -> list[CommandResult]:
        """Run the command on ``tenants``, or on all; return the results in order."""
        with _printing_apart(self._environment.config):
            return await map_concurrently(self._run_for, await self._selection.choose(tenants), concurrency)

    async def _run_for(self, tenant: Tenant) -> CommandResult:
        target = self._connections.target(tenant, self._health)
        buffer = io.StringIO()
        _printed.set(buffer)
        error: Exception | None = None
        with local.isolated(), labelled(tenant.slug):
            try:
                connection = await target.connect()
                try:
                    await self._run_on(connection, tenant, target)
                finally:
                    await close(connection)
            except Exception as exc:  # noqa: BLE001 - any error is reported for this tenant
                error = exc
        return CommandResult(tenant, buffer.getvalue(), error)

    async def _run_on(self, connection: Connection, tenant: Tenant, target: Target) -> None:
        environment, limits = self._environment, self._connections.limits
        changes = not self._options.get("dont_mutate")
        if changes:
            await lock(connection, timeout=limits.wait)
        state = await read_state(connection, environment, target, timeout=limits.connect)

        def run(sync: SyncConnection) -> None:
            context = environment.context(**self._options)
            with active(context, sync, environment, tenant), context.begin_transaction():
                if changes and not state.has_version_table:
                    make_version_table(context, sync, environment, tenant)
                context.run_migrations()

        adapter = self._connections.adapter(placement_of(tenant).server)
        async with asyncio.timeout(limits.total), adapter.adapt(connection, target.url) as adapted:
            await adapted.run_sync(run)


@contextmanager
def _printing_apart(config: Config) -> Iterator[None]:
    """Send the output of ``config.print_stdout`` to the buffer of the task that prints."""
    before = config.stdout
    config.stdout = _Printed()  # type: ignore[assignment]
    try:
        yield
    finally:
        config.stdout = before


class _Printed(io.TextIOBase):
    """A ``stdout`` for several tenants at once."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return _printed.get().write(text)
