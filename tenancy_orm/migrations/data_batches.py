"""Running the data migrations of one database, in batches that leave room for the tenant's own requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from alembic.runtime.environment import EnvironmentContext
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..config import MigrationConfig
from ..deadlines import clock
from ..errors import MigrationError
from ..postgres.errors import DEADLOCK_DETECTED, INSUFFICIENT_PRIVILEGE, LOCK_NOT_AVAILABLE, QUERY_CANCELED, sqlstate_of
from ..tenant import Tenant
from . import data_checkpoints as checkpoints
from .data_checkpoints import Checkpoint, Direction
from .data_migrations import Batch, BatchFunction, DataMigration, data_migrations_of, of_step, statements_of
from .data_tables import BatchedTable, set_bound
from .failures import describe
from .logs import logger
from .plan import MigrationStep
from .scripts import Environment

_ATTEMPTS = 10  # of one batch, each with half the rows
_PASSES = 10
_GROWTH = 2.0  # of a batch over the one before, at most
_BUSY_SECONDS = 60.0  # how long a batch waits for a busy server at most
_FIRST_BUSY_PAUSE, _LAST_BUSY_PAUSE = 0.1, 2.0
_RETRIED = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED, QUERY_CANCELED})

_LIMIT = text(
    "SELECT pg_catalog.set_config('lock_timeout', :lock, true), "
    "pg_catalog.set_config('statement_timeout', :statement, true), "
    "pg_catalog.set_config('DateStyle', 'ISO', true), pg_catalog.set_config('extra_float_digits', '1', true)"
)
# As the administrator, who may see what sessions of other roles do; NULL and 0 where not even that one may.
_AS_ADMINISTRATOR = "SET LOCAL ROLE NONE"
_LOAD = text("""
SELECT (
    SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE state = 'active' AND backend_type = 'client backend'
       AND pid <> pg_catalog.pg_backend_pid() AND application_name NOT LIKE 'tenancy-migration%'
) AS active, (
    SELECT count(*) FROM pg_catalog.pg_locks AS l WHERE NOT granted
       AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
) AS waiting, (
    SELECT COALESCE(EXTRACT(EPOCH FROM max(replay_lag)), 0)::float8 FROM pg_catalog.pg_stat_replication
) AS lag
""")


@dataclass(frozen=True, slots=True)
class DataLimits:
    """How fast data migrations go: see the settings ``migration.data_*``."""

    batch_seconds: float = 0.5
    pause: float = 1.0
    lock_timeout: float = 1.0
    statement_timeout: float = 60.0
    max_active: int = 32
    max_lag_seconds: float = 30.0

    @classmethod
    def of(cls, settings: MigrationConfig) -> DataLimits:
        """Take the settings of an application."""
        return cls(
            batch_seconds=settings.data_batch_seconds,
            pause=settings.data_pause,
            lock_timeout=settings.data_lock_timeout,
            statement_timeout=settings.data_statement_timeout,
            max_active=settings.data_max_active,
            max_lag_seconds=settings.data_max_lag_seconds,
        )


@dataclass(frozen=True, slots=True)
class DataProgress:
    """How far a data migration has come in one database: ``rows`` of about ``estimate``, in ``batches``.

    ``waits_for`` says why it waits now, if it does; ``done`` is whether it has ended.
    """

    revision: str
    name: str
    rows: int
    estimate: int
    batches: int
    waits_for: str | None = None
    done: bool = False

    @property
    def label(self) -> str:
        """The revision and the name."""
        return f"{self.revision}:{self.name}"

    def fields(self) -> dict[str, Any]:
        """Return what a run's record has of it, as JSON."""
        found: dict[str, Any] = {"rows": self.rows, "estimate": self.estimate, "batches": self.batches}
        if self.waits_for is not None:
            found["waits_for"] = self.waits_for
        return {**found, "done": self.done}


DataObserver = Callable[[DataProgress], Awaitable[None]]


class DataRunner:
    """Runs the data migrations of one database, under its migration lock.

    Args:
        adapted: The connection. It is in no transaction between two calls.
        environment: The scripts.
        tenant: The tenant; None for a template.
        limits: How fast.
        observer: Called after each batch.
        before_batch: Called before each attempt of a batch, and while one waits for a busy server.
    """

    def __init__(
        self,
        adapted: AsyncConnection,
        environment: Environment,
        tenant: Tenant | None,
        limits: DataLimits,
        observer: DataObserver | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._adapted = adapted
        self._environment = environment
        self._tenant = tenant
        self._limits = limits
        self._observer = observer
        self._before_batch = before_batch

    async def resume(self) -> bool:
        """Finish what earlier upgrades have left; return whether there was something.

        Raises:
            MigrationError: it failed, or a downgrade is unfinished.
        """
        pending = await self._call(checkpoints.read)
        for checkpoint in pending:
            if checkpoint.direction == "downgrade":
                raise MigrationError(
                    f"a downgrade of {checkpoint.revision} has begun with its data migration {checkpoint.name} and is "
                    "not done; run that downgrade again before you upgrade"
                )
        for checkpoint in pending:
            await self._run(checkpoint)
        return bool(pending)

    async def reverse(self, step: MigrationStep) -> None:
        """Before a revision's DDL is undone, undo its data migrations as far as they have come, the last one first.

        Raises:
            MigrationError: it failed.
        """
        migrations = [one for one in reversed(of_step(step)) if one.reversal is not None]
        if not migrations:
            return
        revision: str = step.revision.revision  # type: ignore[union-attr]

        def note(connection: SyncConnection) -> list[Checkpoint]:
            role = _role_of(self._tenant)
            checkpoints.create(connection, role)
            for checkpoint in checkpoints.read(connection):
                if checkpoint.revision == revision and checkpoint.direction == "upgrade":
                    checkpoints.turn(connection, checkpoint)
            checkpoints.add(connection, revision, migrations, "downgrade")
            found = {(x.revision, x.name): x for x in checkpoints.read(connection)}
            return [found[revision, one.name] for one in migrations]

        for checkpoint in await self._call(note):
            if not checkpoint.is_done:
                await self._run(checkpoint)

    async def _call(self, function: Callable[[SyncConnection], Any]) -> Any:
        """Run ``function`` in a transaction. After a cancellation the connection is of no more use."""
        try:
            found = await self._adapted.run_sync(function)
            await self._adapted.commit()
        except Exception:
            await self._adapted.rollback()
            raise
        return found

    async def _run(self, checkpoint: Checkpoint) -> None:
        label = f"{checkpoint.revision}:{checkpoint.name}"
        try:
            migration = self._find(checkpoint)
            function = migration.function if checkpoint.direction == "upgrade" else migration.reversal
            if function is None:
                raise MigrationError("its revision has no reverse for it any more")
            work = _Work(migration, function, checkpoint.direction, self._tenant, self._limits)
            table = await self._call(lambda connection: BatchedTable.of(connection, migration))
            logger.info("data migration %s begins after %d rows", label, checkpoint.rows)
            await self._batches(checkpoint, work, table)
            logger.info("data migration %s is done", label)
        except Exception as exc:
            raise MigrationError(
                f"data migration {label} is unfinished: {describe(exc)}; what is done is kept, run it again"
            ) from exc

    def _find(self, checkpoint: Checkpoint) -> DataMigration:
        script = self._environment.script.get_revision(checkpoint.revision)
        found = {one.name: one for one in data_migrations_of(script.module)}
        if checkpoint.name not in found:
            raise MigrationError(f"revision {checkpoint.revision} has no data migration of this name any more")
        return found[checkpoint.name]

    async def _batches(self, checkpoint: Checkpoint, work: _Work, table: BatchedTable) -> None:
        size, failures = min(checkpoint.batch_size, work.migration.max_batch_size), 0
        while True:
            if await self._wait_while_busy(checkpoint):
                size = max(1, size // 2)
            self._before_batch()
            began = clock()
            try:
                now = await self._call(partial(work.batch, table=table, checkpoint=checkpoint, size=size))
            except Exception as exc:
                failures += 1
                is_retried = sqlstate_of(exc) in _RETRIED or isinstance(exc, _RowsLeftError)
                if failures == _ATTEMPTS or not is_retried:
                    raise
                logger.info("%s: a batch of %d rows is tried again: %s", checkpoint.name, size, describe(exc))
                size = max(1, size // 2)
                await asyncio.sleep(random.uniform(0.5, 1.0) * min(5.0, 0.1 * 2**failures))
                continue
            seconds, failures = clock() - began, 0
            await self._observe(now or checkpoint, done=now is None)
            if now is None:
                return
            checkpoint = now
            wanted = size * self._limits.batch_seconds / max(seconds, 0.001)
            size = max(1, min(work.migration.max_batch_size, int(min(wanted, size * _GROWTH))))
            await asyncio.sleep(seconds * self._limits.pause)

    async def _observe(self, checkpoint: Checkpoint, *, waits_for: str | None = None, done: bool = False) -> None:
        if self._observer is not None:
            await self._observer(
                DataProgress(
                    revision=checkpoint.revision,
                    name=checkpoint.name,
                    rows=checkpoint.rows,
                    estimate=checkpoint.rows if done else max(checkpoint.estimate, checkpoint.rows),
                    batches=checkpoint.batches,
                    waits_for=waits_for,
                    done=done,
                )
            )

    async def _wait_while_busy(self, checkpoint: Checkpoint) -> bool:
        """Wait while the server is busy, for a minute at most; return whether it still is."""
        if self._tenant is None:
            return False  # nobody waits for a template's server because of an empty table
        until, pause = clock() + _BUSY_SECONDS, _FIRST_BUSY_PAUSE
        while (reason := await self._busy()) is not None:
            self._before_batch()
            if clock() >= until:
                return True
            await self._observe(checkpoint, waits_for=reason)
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
            pause = min(_LAST_BUSY_PAUSE, pause * 2)
        return False

    async def _busy(self) -> str | None:
        limits = self._limits

        def ask(connection: SyncConnection) -> Any:
            connection.exec_driver_sql(_AS_ADMINISTRATOR)
            return connection.execute(_LOAD).one()

        try:
            load = await self._call(ask)
        except Exception as exc:
            if sqlstate_of(exc) != INSUFFICIENT_PRIVILEGE:
                raise
            return None
        if load.waiting:
            return f"{load.waiting} sessions of this tenant wait for locks"
        if limits.max_active and load.active > limits.max_active:
            return f"{load.active} sessions are active on the server"
        if limits.max_lag_seconds and load.lag > limits.max_lag_seconds:
            return f"a standby lags behind by {load.lag:.0f} s"
        return None


class _RowsLeftError(MigrationError):
    """A batch has not made ``where`` false for all of its rows."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done in the transaction of a batch."""

    migration: DataMigration
    function: BatchFunction
    direction: Direction
    tenant: Tenant | None
    limits: DataLimits

    @property
    def where(self) -> str | None:
        return self.migration.where if self.direction == "upgrade" else None

    def batch(
        self, connection: SyncConnection, table: BatchedTable, checkpoint: Checkpoint, size: int
    ) -> Checkpoint | None:
        """Do one batch of ``size`` rows at most; None if there is nothing left to do, which is noted."""
        limits = {"lock": self.limits.lock_timeout, "statement": self.limits.statement_timeout}
        connection.execute(_LIMIT, {name: f"{round(value * 1000)}ms" for name, value in limits.items()})
        checkpoint = checkpoints.locked(connection, checkpoint)
        if not checkpoint.is_started:
            return self._begin(connection, table, checkpoint, number=1)
        has_after = checkpoint.after is not None
        set_bound(connection, "after", checkpoint.after)
        set_bound(connection, "until", checkpoint.until)
        count, upto = table.next_keys(connection, has_after=has_after, size=size)
        if upto is None:
            return self._end_pass(connection, table, checkpoint)
        set_bound(connection, "upto", upto)
        matched = self._apply(connection, table, has_after=has_after, count=count)
        checkpoints.advance(connection, checkpoint, after=upto, count=count, matched=matched, size=size)
        return checkpoints.locked(connection, checkpoint)

    def _begin(
        self, connection: SyncConnection, table: BatchedTable, checkpoint: Checkpoint, *, number: int
    ) -> Checkpoint | None:
        """Begin a pass over what is in the table now: it must end, however fast rows are added."""
        until = table.last_key(connection)
        if until is None:
            checkpoints.finish(connection, checkpoint)
            return None
        # a later pass looks for rows that were written since; what the first one counted is better than an estimate
        rows = table.estimate(connection) if number == 1 else checkpoint.rows
        checkpoints.begin(connection, checkpoint, until=until, number=number, rows=rows)
        return checkpoints.locked(connection, checkpoint)

    def _end_pass(self, connection: SyncConnection, table: BatchedTable, checkpoint: Checkpoint) -> Checkpoint | None:
        if self.where is None or not checkpoint.pass_rows:
            checkpoints.finish(connection, checkpoint)
            return None
        if checkpoint.number >= _PASSES:
            raise MigrationError(
                f"after {_PASSES} passes there are still rows with {self.where}; does code that runs still write them?"
            )
        return self._begin(connection, table, checkpoint, number=checkpoint.number + 1)

    def _apply(self, connection: SyncConnection, table: BatchedTable, *, has_after: bool, count: int) -> int:
        def condition(alias: str | None = None) -> str:
            return table.rows(has_after=has_after, where=self.where, alias=alias)

        rows = condition()
        matched = count if self.where is None else table.count(connection, rows)
        if not matched:
            return 0
        batch = Batch(rows, connection, self.tenant, matched, condition)
        for statement in statements_of(self.function(batch)):
            if isinstance(statement, str):
                connection.exec_driver_sql(statement)
            else:
                connection.execute(statement)
        if self.where is not None and (left := table.count(connection, rows)):
            raise _RowsLeftError(f"{left} of {matched} rows still have {self.where} after a batch")
        return matched


def track(context: EnvironmentContext, tenant: Tenant | None) -> None:
    """Have the migration note, in the transaction of each revision, which data migrations are to be done."""
    migration_context: Any = context.get_context()

    def note(ctx: Any, step: Any, heads: set[Any], run_args: Any) -> None:
        connection: SyncConnection = ctx.connection
        if step.is_stamp:
            if checkpoints.exists(connection):
                checkpoints.forget_all(connection)
            return
        migrations = data_migrations_of(step.up_revision.module)
        if migrations and step.is_upgrade:
            checkpoints.create(connection, _role_of(tenant))
            checkpoints.add(connection, step.up_revision_id, migrations, "upgrade")
        elif migrations and checkpoints.exists(connection):
            checkpoints.forget(connection, step.up_revision_id, [one.name for one in migrations])

    migration_context.on_version_apply_callbacks = (*migration_context.on_version_apply_callbacks, note)


def _role_of(tenant: Tenant | None) -> str | None:
    return None if tenant is None or tenant.placement is None else tenant.placement.role


__all__ = ["DataLimits", "DataObserver", "DataProgress", "DataRunner", "track"]
