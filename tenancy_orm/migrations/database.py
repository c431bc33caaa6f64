"""The migration of one database: of a template, or of one tenant in a fleet run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import Any

from alembic.runtime.environment import EnvironmentContext
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..errors import MigrationError
from ..postgres.connections import Connection
from ..postgres.errors import QUERY_CANCELED, sqlstate_of
from ..postgres.failures import SERVER_FAILURES
from ..postgres.sqlalchemy_versions import await_
from ..provisioning.rights.grants import protect_version_table
from ..tenant import Tenant
from . import local
from .adapter import ConnectionAdapter
from .checks import ask_in_place, preceded, refuse_foreign_triggers, script_of
from .data_batches import DataObserver, DataRunner, track
from .data_migrations import is_downgrade, of_step, parts
from .execution import StatementObserver
from .extensions import WantedExtensions, hint
from .failures import describe
from .indexes import repair
from .limits import Limits, try_repeatedly
from .logs import labelled, logger, quiet
from .plan import Heads, MigrationPath, MigrationStep, Plan, format_revision
from .scripts import Environment
from .state import State, Target, close, lock, read_state, try_lock
from .waits import naming_blockers

_COMMITTED = (
    "; the revision is not recorded, but its autocommit_block() has committed changes of rows, which a repetition "
    "makes again: undo them before you run it again, or put the block into a revision of its own"
)
_PERHAPS_COMMITTED = (
    "; the connection was lost, and its autocommit_block() has perhaps committed what is not recorded: find out what "
    "before you run it again, which would do that twice"
)


class DatabaseMigration:
    """A plan, applied to one database.

    A database that is at the target already costs one connection and one SELECT. Otherwise it is migrated under an
    advisory lock in that database, taken by polling: PostgreSQL's own wait would hold a snapshot, and a CREATE INDEX
    CONCURRENTLY of the lock's holder would wait for that. After a lock time-out (55P03) or a deadlock (40P01) the
    migration is tried again, from the revision that was reached, unless a part of the next one has changed rows and is
    committed. At the end the revision is read back.

    ``before`` and ``after`` are the first and last heads that were read, None if unknown; they are also valid after a
    failure, where ``after`` is None if the connection was lost, until ``read_again``. ``server_started`` is when the
    server was started that they were read from, None if unknown. ``installed`` are the extensions
    that this migration installed, and ``changed`` is whether it changed the heads, installed any or ran data
    migrations. ``announce`` is called before the first change, and ``announced`` tells whether it was. ``attempts`` is
    how often the migration was tried, and ``has_connected`` whether it had a session. ``observe_data`` is called after
    each batch of a data migration, and ``reached``
    before the first one, with the revision that the database has during that; the change is announced again before the
    next revision.

    ``asks`` says of a revision with a ``preflight()`` whether that is asked right before it runs; all are where it is
    None, as without a preflight of the fleet. ``origin`` are the heads that the way is counted from where it must
    not begin anywhere else (``Plan.is_counted``); an earlier attempt may have moved the database since.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        *,
        adapter: ConnectionAdapter,
        limits: Limits,
        announce: Callable[[], Awaitable[None]] | None = None,
        asks: Callable[[str], bool] | None = None,
        observe_data: DataObserver | None = None,
        reached: Callable[[str | None], Awaitable[None]] | None = None,
        origin: Heads | None = None,
    ) -> None:
        self.plan = plan
        self.target = target
        self.adapter = adapter
        self.limits = limits
        self.before: Heads | None = None
        self.after: Heads | None = None
        self.changed = False
        self.installed: tuple[str, ...] = ()
        self.announced = False
        self.attempts = 0
        self.has_connected = False
        self.server_started: datetime | None = None
        self._announce = announce
        self._asks = asks
        self._observe_data = observe_data
        self._reached = reached
        self._origin = origin
        self._deadline = asyncio.timeout(None)
        self._path = MigrationPath((), (frozenset(),))  # none yet; known once ``before`` is
        self._step: MigrationStep | None = None
        self._observer: StatementObserver | None = None  # of the revisions that run, or have failed
        self._batch_seconds: float | None = None  # how long one may take, while data migrations run
        self._locking = False  # whether the lock is taken where the state is read

    @property
    def _has_committed_rows(self) -> bool:
        """Whether a revision that has failed has changed rows all the same."""
        return self._observer is not None and self._observer.has_committed_rows

    @property
    def may_have_committed(self) -> bool:
        """Whether a revision that has failed may have committed what is not recorded, if its connection was lost."""
        return self._observer is not None and self._observer.may_have_committed

    @property
    def target_revision(self) -> str | None:
        """The revision that it is brought to; known once ``before`` is."""
        return format_revision(self._path.end)

    async def run(self) -> None:
        """Migrate the database.

        Raises:
            MigrationError: a revision failed, there is no path to the target, or the database is not at it afterwards.
            MarkerMismatchError: the database is not the expected tenant's.
            Exception: connecting failed.
        """
        with local.isolated(), labelled(self.target.label):
            self._deadline = deadline = asyncio.timeout(self.limits.total)
            try:
                async with deadline:
                    await try_repeatedly(self._attempt, self.limits, may_repeat=lambda: not self._has_committed_rows)
            except TimeoutError as exc:
                if not deadline.expired():
                    raise
                what = "" if self._batch_seconds is None else "a batch of a data migration was "
                seconds = self.limits.total if self._batch_seconds is None else self._batch_seconds
                raise MigrationError(f"{what}not done within {seconds:g} s; raise migration.timeout") from exc

    async def _attempt(self) -> None:
        self.attempts += 1
        connection = await self.target.connect()
        self.has_connected = True
        try:
            async with naming_blockers(connection, self._watch()):
                # a database that is at the target is closed again at once, and needs no lock
                self._locking = self._expects_steps()
                if self._locking:
                    # first of all: asyncpg forgets the statements that were prepared before SQLAlchemy's settings
                    async with self.adapter.adapt(connection, self.target.url) as adapted:
                        await self._migrate_on(connection, adapted)
                else:
                    await self._migrate_on(connection)
        finally:
            await close(connection)

    def _watch(self) -> Callable[[], Awaitable[Connection]] | None:
        """Return what looks who holds a lock. The first attempt is watched only if there is no other."""
        return self.target.connect_watch if self.attempts > 1 or self.limits.attempts == 1 else None

    async def _migrate_on(self, connection: Connection, adapted: AsyncConnection | None = None) -> None:
        state = await self._read(connection)
        if self.before is None:
            self.before = state.heads
            start = self._origin if self.plan.is_counted else None
            self._path = self.plan.path_from(state.heads if start is None else start)
        if not (
            self._remaining(state.heads) or self._missing(state) or self._must_repair(state) or self._has_data(state)
        ):
            return
        if not state.is_locked:
            await lock(connection, timeout=self.limits.wait, connect_watch=self.target.connect_watch)
        # read again, now that no other run can change it
        state = await self._read(connection)
        await self._install(self._missing(state))
        steps = self._remaining(state.heads)
        if steps or self._has_data(state):
            if adapted is not None:
                await self._migrate(connection, adapted, state, steps)
            else:
                async with self.adapter.adapt(connection, self.target.url) as adapted:
                    await self._migrate(connection, adapted, state, steps)
        elif self._must_repair(state):
            await repair(connection)

    def _expects_steps(self) -> bool:
        """Whether there is something to do according to the registry, which may not know it."""
        tenant = self.target.tenant
        if tenant is None or tenant.schema_revision is None:
            return False
        try:
            return bool(self.plan.path_from(frozenset(tenant.schema_revision.split(","))).steps)
        except Exception:  # noqa: BLE001 - steps for another revision, as those of a rehearsal, lead Alembic anywhere
            return False

    async def _read(self, connection: Connection) -> State:
        state = await read_state(
            connection,
            self.plan.environment,
            self.target,
            timeout=self.limits.connect,
            extensions=self._wants_extensions,
            locking=self._locking,
        )
        self.after = state.heads
        self.server_started = state.server_started
        return state

    @property
    def _wants_extensions(self) -> bool:
        wanted = self.target.extensions
        return wanted is not None and bool(wanted.names) and self.plan.command == "upgrade"

    def _missing(self, state: State) -> tuple[str, ...]:
        """The extensions that this migration must install."""
        wanted = self.target.extensions
        return wanted.missing(state.extensions) if wanted is not None and self._wants_extensions else ()

    def _must_repair(self, state: State) -> bool:
        return state.has_invalid_indexes and self.plan.command != "stamp"

    def _has_data(self, state: State) -> bool:
        """Whether earlier upgrades have left data migrations unfinished, which this migration finishes.

        That is every migration that passes them on its way up; one that goes down reverses what they have done.
        """
        if not state.has_data or self.plan.command in ("stamp", "downgrade"):
            return False
        return not any(map(is_downgrade, self._remaining(state.heads)))

    async def _install(self, names: tuple[str, ...]) -> None:
        if self.target.extensions is not None and names:
            await install(self.target.extensions, names)
            self.installed += names
            self.changed = True

    def _remaining(self, heads: Heads) -> tuple[MigrationStep, ...]:
        """The remaining steps. Those applied by an earlier attempt or another run are not applied again."""
        if self.plan.purges and heads != self._path.end:
            return self._path.steps
        remaining = self._path.remaining(heads)
        if remaining is None:
            if self.plan.is_counted:
                what = (
                    f"give a revision instead of {self.plan.target!r}" if self.plan.is_relative else "undo that first"
                )
                raise MigrationError(f"another run has moved it to {format_revision(heads) or 'base'}; {what}")
            self._path = self.plan.path_from(heads)
            remaining = self._path.steps
        return remaining

    async def _migrate(
        self, connection: Connection, adapted: AsyncConnection, state: State, steps: tuple[MigrationStep, ...]
    ) -> None:
        expected = self._path.end
        await self._give_notice(connection)
        try:
            found = await self._apply_parts(connection, adapted, state, steps)
        except Exception:
            await self._read_after_failure(connection)
            raise
        except BaseException:
            # it may be interrupted after a revision is committed; that is read on a new connection, by ``read_again``
            self.after = None
            raise
        finally:
            self.changed = self.changed or self.after not in (state.heads, None)
        self._check(found, expected)
        self.changed = True
        if self._must_repair(found):
            await repair(connection)

    async def _apply_parts(
        self, connection: Connection, adapted: AsyncConnection, state: State, steps: tuple[MigrationStep, ...]
    ) -> State:
        """Apply the steps, and run each data migration after its revision is committed and before the next one.

        Returns the state that the database has then.
        """
        if self.plan.command != "stamp" and (self._has_data(state) or any(map(of_step, steps))):
            await adapted.run_sync(refuse_foreign_triggers, self.target.tenant)
            await adapted.rollback()
        data = DataRunner(
            adapted,
            self.plan.environment,
            self.target.tenant,
            self.limits.data,
            observer=self._observe_data,
            before_batch=self._extend,
        )
        if self._has_data(state):
            await self._run_data(data, state)
            state = await self._read(connection)
        for part in parts(steps):
            # again after a data migration
            await self._give_notice(connection)
            if is_downgrade(part[0]):
                async with self._by_batch():
                    await data.reverse(part[0])
            await self._apply(adapted, state, part)
            state = await self._read(connection)
            self.changed = True
            if state.has_data and not is_downgrade(part[-1]) and self.plan.command != "stamp":
                await self._run_data(data, state)
                state = await self._read(connection)
        return state

    async def _run_data(self, data: DataRunner, state: State) -> None:
        """Run data migrations, which may take long. Every process is notified that the schema stays as it is."""
        if self._reached is not None:
            await self._reached(format_revision(state.heads))
            self.announced = False
        self.changed = True
        async with self._by_batch():
            await data.resume()

    @asynccontextmanager
    async def _by_batch(self) -> AsyncIterator[None]:
        """Let the body take as long as the rows of a large table need, and bound each of its batches instead."""
        loop, until = asyncio.get_running_loop(), self._deadline.when()
        left = None if until is None else until - loop.time()
        # a statement of a batch ends by a limit of its own first, if the server answers
        self._batch_seconds = self.limits.total + self.limits.data.statement_timeout
        self._extend()
        try:
            yield
        finally:
            if not self._deadline.expired():
                self._batch_seconds = None
                self._deadline.reschedule(None if left is None else loop.time() + left)

    def _extend(self) -> None:
        """Give the next batch its time."""
        if self._batch_seconds is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._batch_seconds)

    async def _give_notice(self, connection: Connection) -> None:
        """Announce the change, and wait until it is known where the database is in use."""
        tenant = self.target.tenant
        if self._announce is None or self.announced or tenant is None or tenant.placement is None:
            return
        self.announced = True
        await self._announce()
        if self.plan.command == "stamp":
            return
        others = (await self._read(connection)).has_others
        if others and await connection.fetchval(_IN_USE, tenant.placement.role, timeout=self.limits.connect):
            await asyncio.sleep(self.limits.notice)

    async def _apply(self, adapted: AsyncConnection, state: State, steps: tuple[MigrationStep, ...]) -> None:
        try:
            await adapted.run_sync(self._run, state, steps)
            self._observer = None
        except Exception as raised:  # noqa: BLE001 - it is raised again
            exc = _cause_of(raised)
            prefix = "" if self._step is None else f"{self._step.short_log}: "
            suffix = _COMMITTED if self._has_committed_rows else ""
            if self.may_have_committed and not suffix and isinstance(exc, DBAPIError) and exc.connection_invalidated:
                suffix = _PERHAPS_COMMITTED
            raise MigrationError(prefix + describe(exc) + hint(exc) + self._limit(exc) + suffix) from exc
        finally:
            await adapted.rollback()

    def _limit(self, error: Exception) -> str:
        if sqlstate_of(error) != QUERY_CANCELED or not self.limits.statement:
            return ""
        return (
            f"; migration.statement_timeout is {self.limits.statement:g} s, and a revision can set another one for a "
            "statement: with timeouts(statement=...)"
        )

    async def _read_after_failure(self, connection: Connection) -> None:
        """Read the revision after a failure: if each revision has its own transaction, it may have changed."""
        self.after = None  # what was read before is not true any more, perhaps
        with contextlib.suppress(*SERVER_FAILURES):
            # the migration's own error is raised; that of a lost connection would add nothing
            await self._read(connection)

    async def read_again(self) -> bool:
        """Read the revision on a new connection, once the migration has been interrupted, or its connection lost.

        Under the lock, which the former connection has until PostgreSQL has ended it: a COMMIT that was sent may still
        be on its way. Returns False where that fails; ``after`` is None then.
        """
        self.after = None
        try:
            connection = await self.target.connect()
            try:
                await lock(connection, timeout=self.limits.connect)
                await self._read(connection)
            finally:
                await close(connection)
        except Exception as exc:  # noqa: BLE001 - how the migration has ended is what counts
            logger.warning("%s: its revision is not known: %s", self.target.label, describe(exc))
            return False
        self.changed = self.changed or self.after != self.before
        return True

    def _check(self, found: State, expected: Heads) -> None:
        if found.heads != expected:
            raise MigrationError(
                f"it is at {format_revision(found.heads) or 'base'} and not at {format_revision(expected) or 'base'} "
                "although the migration reported no error; does a revision commit or roll back by itself?"
            )

    def _run(self, connection: SyncConnection, state: State, steps: tuple[MigrationStep, ...]) -> None:
        self._step = None
        environment = self.plan.environment
        self._observer = observer = StatementObserver(environment, has_invalid_indexes=state.has_invalid_indexes)
        context = environment.context(
            fn=lambda heads, context: self._tracking(steps, observer, connection), **self.plan.options
        )
        with (
            active(context, connection, environment, self.target.tenant),
            observer.on(context, connection),
            context.begin_transaction(),
        ):
            track(context, self.target.tenant)
            if not state.has_version_table:
                make_version_table(context, connection, environment, self.target.tenant)
            elif state.heads and not self.plan.purges:
                _preset_heads(context, state.heads)
            context.run_migrations()

    def _tracking(
        self, steps: tuple[MigrationStep, ...], observer: StatementObserver, connection: SyncConnection
    ) -> Iterator[MigrationStep]:
        for step in steps:
            self._step = step
            observer.begin(step)
            yield self._checked(step, connection)

    def _checked(self, step: MigrationStep, connection: SyncConnection) -> MigrationStep:
        """The step, with its revision's checks before it where they have not been asked yet."""
        script = script_of(step)
        if script is None or (self._asks is not None and not self._asks(script.revision)):
            return step
        tenant, timeout = self.target.tenant, self.limits.preflight
        return preceded(step, lambda: ask_in_place(connection, script, tenant, timeout))


@contextmanager
def active(
    context: EnvironmentContext, connection: SyncConnection, environment: Environment, tenant: Tenant | None
) -> Iterator[None]:
    """Make ``context`` the active ``alembic.context``, configured by env.py's options on ``connection``.

    ``op.get_context().opts["tenant"]`` is the database's tenant; None for a template.
    """
    with context:
        with quiet():
            context.configure(connection=connection, **{**environment.options, "tenant": tenant})
        yield


def _cause_of(error: Exception) -> Exception:
    """What a connection was lost with in an autocommit_block; to leave the block with it raises an error of its own."""
    while isinstance(error, PendingRollbackError) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def make_version_table(
    context: EnvironmentContext, connection: SyncConnection, environment: Environment, tenant: Tenant | None
) -> None:
    """Create the version table as Alembic would, and revoke the tenant's right to write it, in one transaction.

    Its schema, if it has one of its own, is created first: Alembic expects it to exist.

    Default privileges let the tenant's role write the owner's tables. With this one it could hide from migrations.
    """
    migration_context: Any = context.get_context()
    with contextlib.nullcontext() if connection.in_transaction() else connection.begin():
        if (schema := environment.quoted_version_schema) is not None:
            connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        migration_context._ensure_version_table()
        if tenant is not None and tenant.placement is not None:
            driver: Any = connection.connection.driver_connection
            await_(protect_version_table(driver, tenant.placement.role, environment.quoted_version_table))


def _preset_heads(context: EnvironmentContext, heads: Heads) -> None:
    """Give Alembic the heads that were just read under the lock, which saves it two statements."""
    migration_context: Any = context.get_context()

    def known() -> tuple[str, ...]:
        del migration_context.get_current_heads  # a revision that calls it later reads the table
        return tuple(sorted(heads))

    migration_context.get_current_heads = known


_IN_USE = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity "
    "WHERE datname = pg_catalog.current_database() AND usename = $1)"
)


async def install(wanted: WantedExtensions, names: Sequence[str]) -> None:
    """Install extensions in a database. Call it under the database's migration lock.

    Raises:
        MigrationError: PostgreSQL refused.
    """
    try:
        await wanted.install(names)
    except Exception as exc:
        raise MigrationError(f"the extensions {', '.join(names)} could not be installed: {describe(exc)}") from exc
    logger.info("installed the extensions %s", ", ".join(names))


__all__ = [
    "ConnectionAdapter",
    "DatabaseMigration",
    "State",
    "Target",
    "active",
    "close",
    "install",
    "lock",
    "make_version_table",
    "read_state",
    "try_lock",
]
