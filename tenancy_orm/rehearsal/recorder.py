"""``Recorder``: what the statements of revisions do in one database: their times, locks and rewrites.

After each statement of a transaction, the same session is asked for the locks that it has and for the files of tables
and indexes. So no lock is missed, however short. Locks of a transaction are held until its end. A statement outside a
transaction (CREATE INDEX CONCURRENTLY) has released its locks by then: those are seen by a second session, every few
milliseconds.

What is executed while no revision runs is not listed, since it is not the revision's: its time alone is known, as that
of a preflight or of data migrations.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg
from alembic.util import to_tuple
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection

from ..migrations.checks import script_of
from ..migrations.data_migrations import is_downgrade, of_step
from ..migrations.database import ConnectionAdapter
from ..migrations.plan import MigrationStep, Plan
from ..migrations.scripts import Environment
from ..postgres.connections import Connection
from ..postgres.sqlalchemy_versions import await_
from .report import LockReport, RevisionReport, RewriteReport, StatementReport

_POLL_SECONDS = 0.005
_SHOWN = 2_000  # characters of a statement

_BLOCKS = {
    "ShareUpdateExclusiveLock": "schema changes",
    "ShareLock": "writes",
    "ShareRowExclusiveLock": "writes",
    "ExclusiveLock": "writes",
    "AccessExclusiveLock": "reads and writes",
}
"""The modes that an application or another migration notices, and what waits for them."""

_RELATIONS = """
SELECT c.oid, n.nspname || '.' || c.relname AS name, c.relkind IN ('i', 'I') AS is_index,
       pg_catalog.pg_relation_filenode(c.oid) AS file, pg_catalog.pg_relation_size(c.oid) AS size
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'm', 'i', 'I', 'v', 'S') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""
_LOCKS = """
SELECT relation, mode FROM pg_catalog.pg_locks
 WHERE pid = $1 AND locktype = 'relation' AND granted AND mode = ANY($2::text[])
   AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
"""
_FILES = """
SELECT oid, pg_catalog.pg_relation_filenode(oid) AS file FROM pg_catalog.pg_class
 WHERE oid = ANY($1::oid[]) AND relkind IN ('r', 'm', 'i')
"""


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, index, view or sequence that existed before the phase."""

    name: str
    is_index: bool
    file: int | None
    size: int


async def read_relations(connection: Connection) -> dict[int, Relation]:
    """Return the relations of a database, without the system's own, by oid."""
    rows = await connection.fetch(_RELATIONS)
    return {row["oid"]: Relation(row["name"], row["is_index"], row["file"], row["size"]) for row in rows}


@dataclass(slots=True)
class _Statement:
    sql: str
    started: float
    outside: bool  # of a transaction
    seconds: float = 0.0
    locks: dict[tuple[int, str], float] = field(default_factory=dict)  # until when each was held
    rewrites: list[RewriteReport] = field(default_factory=list)


@dataclass(slots=True)
class _Revision:
    """A revision that has begun."""

    name: str = ""
    has_data: bool = False  # data migrations, which follow it
    preflight_seconds: float | None = None
    data_seconds: float | None = None
    seconds: float = 0.0
    statements: list[_Statement] = field(default_factory=list)


class Recorder:
    """Records one phase on one database.

    Args:
        relations: Those that existed before: nobody else waits for what the revisions create themselves.
    """

    def __init__(self, relations: Mapping[int, Relation]) -> None:
        self._relations = relations
        self._files = {oid: one.file for oid, one in relations.items() if one.file is not None}
        self._done: list[_Revision] = []
        self._revision: _Revision | None = None  # the one that runs
        self._is_running = False  # its own code, and not what is around it
        self._around = 0.0  # the seconds of statements around revisions, in this transaction
        self._between = 0.0  # and in those before it
        self._current: _Statement | None = None
        self._held: dict[tuple[int, str], _Statement] = {}
        self._seen: dict[tuple[int, str], float] = {}  # when the current statement's locks were seen first
        self._began = time.perf_counter()

    def listening(self, plan: Plan) -> Plan:
        """Return a plan that tells this recorder when a revision begins and ends."""

        def steps(heads: Any, context: Any) -> Iterator[MigrationStep]:
            return map(self._told_of, plan.function(heads, context))

        return replace(plan, environment=self._listening(plan.environment), function=steps, _paths={})

    def _told_of(self, step: MigrationStep) -> MigrationStep:
        found: MigrationStep = copy.copy(step)
        migrate = step.migration_fn

        @functools.wraps(migrate)  # its name is in messages
        def run(**options: Any) -> None:
            self._begin(step)
            try:
                migrate(**options)
            finally:
                self._is_running = False

        found.migration_fn = run
        return found

    def _listening(self, environment: Environment) -> Environment:
        callbacks = (*to_tuple(environment.options.get("on_version_apply"), default=()), self._revision_applied)
        return replace(environment, options={**environment.options, "on_version_apply": callbacks})

    def revisions(self) -> tuple[RevisionReport, ...]:
        """Return what the revisions did that came to their end, in order."""
        self._release()
        self._give_data(self._between)
        self._between = 0.0
        return tuple(
            RevisionReport(
                revision=one.name,
                seconds=one.seconds,
                statements=tuple(map(self._report, one.statements)),
                preflight_seconds=one.preflight_seconds,
                data_seconds=one.data_seconds,
            )
            for one in self._done
        )

    @contextmanager
    def on(self, connection: SyncConnection) -> Iterator[None]:
        """Record what the body executes on ``connection``."""
        listeners: dict[str, Callable[..., Any]] = {
            "before_cursor_execute": self._before,
            "after_cursor_execute": self._after,
            "commit": self._ended,
            "rollback": self._ended,
        }
        for name, listener in listeners.items():
            event.listen(connection, name, listener)
        self._began = time.perf_counter()
        try:
            yield
        finally:
            for name, listener in listeners.items():
                event.remove(connection, name, listener)

    def saw(self, relation: int, mode: str) -> None:
        """Receive a lock that another session saw just now. It matters for a statement outside a transaction."""
        current = self._current
        if current is not None and current.outside and relation in self._relations:
            first = self._seen.setdefault((relation, mode), time.perf_counter())
            current.locks[relation, mode] = time.perf_counter() - first + _POLL_SECONDS

    def _revision_applied(self, *, step: Any, **_: Any) -> None:
        now, revision = time.perf_counter(), self._revision
        self._revision, self._around = None, 0.0
        if revision is None:  # without a function of its own, as what only leaves the version table
            revision = _Revision()
        revision.name = step.up_revision_id or ""
        revision.seconds, self._began = now - self._began, now
        self._done.append(revision)

    def _begin(self, step: MigrationStep) -> None:
        """Note that the code of a revision begins, and what the statements before it were for."""
        migrations = of_step(step)
        revision = _Revision(has_data=bool(migrations) and not is_downgrade(step))
        if migrations and is_downgrade(step):  # which come before it
            revision.data_seconds = self._between
        else:
            self._give_data(self._between)
        if script_of(step) is not None and self._around:
            revision.preflight_seconds = self._around
        self._around = self._between = 0.0
        self._revision, self._is_running = revision, True

    def _give_data(self, seconds: float) -> None:
        """Give the time of data migrations to the revision that they follow."""
        if self._done and self._done[-1].has_data and seconds:
            self._done[-1].data_seconds = (self._done[-1].data_seconds or 0.0) + seconds

    def _before(self, connection: SyncConnection, cursor: Any, text: str, *_: Any) -> None:
        outside = bool(getattr(getattr(cursor, "_adapt_connection", None), "autocommit", False))
        self._current = _Statement(text, time.perf_counter(), outside)
        self._seen.clear()

    def _after(self, connection: SyncConnection, cursor: Any, text: str, *_: Any) -> None:
        statement, self._current = self._current, None
        if statement is None:
            return
        statement.seconds = time.perf_counter() - statement.started
        if not self._is_running or self._revision is None:
            self._around += statement.seconds
            return
        self._revision.statements.append(statement)
        driver: Any = connection.connection.driver_connection
        await_(self._look(driver, statement))
        # what this look took is not the revision's time
        self._began += time.perf_counter() - statement.started - statement.seconds

    async def _look(self, driver: Connection, statement: _Statement) -> None:
        """Ask the session itself for its locks, and for the files of tables and indexes."""
        if not statement.outside:
            for row in await driver.fetch(_LOCKS, driver.get_server_pid(), list(_BLOCKS)):
                key = row["relation"], row["mode"]
                if key[0] in self._relations and key not in self._held:
                    self._held[key] = statement
        for row in await driver.fetch(_FILES, list(self._files)):
            oid, file = row["oid"], row["file"]
            if file != self._files[oid]:
                self._files[oid] = file
                one = self._relations[oid]
                kind: Any = "index" if one.is_index else "table"
                statement.rewrites.append(RewriteReport(relation=one.name, kind=kind, size=one.size))

    def _ended(self, connection: SyncConnection) -> None:
        self._release()
        if self._revision is None:
            self._between, self._around = self._between + self._around, 0.0
            self._began = time.perf_counter()

    def _release(self) -> None:
        """Note that the locks of the transaction are released."""
        now = time.perf_counter()
        for key, statement in self._held.items():
            statement.locks[key] = now - statement.started
        self._held.clear()

    def _report(self, statement: _Statement) -> StatementReport:
        text = " ".join(statement.sql.split())
        locks = (
            LockReport(
                relation=self._relations[oid].name,
                mode=mode.removesuffix("Lock"),
                blocks=_BLOCKS[mode],
                seconds=min(seconds, statement.seconds) if statement.outside else seconds,
            )
            for (oid, mode), seconds in statement.locks.items()
        )
        return StatementReport(
            sql=text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...",
            seconds=statement.seconds,
            locks=tuple(sorted(locks, key=lambda lock: (lock.relation, lock.mode))),
            rewrites=tuple(statement.rewrites),
        )


class RecordingAdapter(ConnectionAdapter):
    """Makes SQLAlchemy connections on which a recorder records.

    Args:
        recorder: The recorder.
        watcher: Another connection to the same database, which sees the locks of statements outside transactions.
    """

    def __init__(self, recorder: Recorder, watcher: Connection) -> None:
        super().__init__()
        self._recorder = recorder
        self._watcher = watcher

    @asynccontextmanager
    async def adapt(self, connection: Connection, url: URL) -> AsyncIterator[AsyncConnection]:
        """Yield a SQLAlchemy connection, as ``ConnectionAdapter.adapt``."""
        async with super().adapt(connection, url) as adapted:
            watching = asyncio.create_task(self._watch(connection.get_server_pid()))
            try:
                with self._recorder.on(adapted.sync_connection):  # type: ignore[arg-type]  # it is connected
                    yield adapted
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, pid: int) -> None:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):  # then there are fewer locks to report
            while True:
                for row in await self._watcher.fetch(_LOCKS, pid, list(_BLOCKS)):
                    self._recorder.saw(row["relation"], row["mode"])
                await asyncio.sleep(_POLL_SECONDS)
