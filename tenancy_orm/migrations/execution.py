"""What is done with the statements of a revision: scripts of several, and those before an ``autocommit_block``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import RevisionStep
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event

from ..errors import MigrationError
from ..postgres.sqlalchemy_versions import await_, has_begun
from .data_migrations import mention_data_migrations
from .indexes import indexes_created, make_room
from .logs import warn_once
from .plan import MigrationStep
from .scripts import Environment
from .statements import Statement, keep_schema, statements


def may_need_care(text: str) -> bool:
    """Whether a text may hold several statements, or some for psql; quicker than to look at it closely."""
    return ";" in text or "\\" in text or "STDIN" in text.upper()


_WITHOUT_ROWS = re.compile(r"\s*(?:CREATE|ALTER|DROP|COMMENT|GRANT|REVOKE|INSERT|UPDATE|DELETE)\b", re.IGNORECASE)
_ROWS_CHANGED = re.compile(r"(?:SELECT|UPDATE|DELETE|INSERT \d+) (\d+)")


def returns_no_rows(text: str) -> bool:
    """Whether a statement surely returns no rows, as those do that a revision consists of."""
    return _WITHOUT_ROWS.match(text) is not None and "RETURNING" not in text.upper()


def refuse_input_for_psql(found: Sequence[Statement]) -> None:
    """Refuse psql's own commands, and a COPY FROM STDIN: PostgreSQL would wait for rows, and asyncpg for PostgreSQL.

    Raises:
        MigrationError: there is one.
    """
    if any(statement.reads_input for statement in found):
        raise MigrationError(
            "COPY FROM STDIN needs rows from the client, which a revision cannot send; use op.bulk_insert"
        )
    if command := next((one.psql_command for one in found if one.psql_command is not None), None):
        raise MigrationError(
            f"{command} is a command of psql, not SQL; leave it out (pg_dump writes some around its statements)"
        )


def run_script(cursor: Any, text: str, found: Sequence[Statement]) -> None:
    """Execute a text of several statements on SQLAlchemy's cursor for asyncpg; there are no rows.

    SQLAlchemy prepares every statement, and PostgreSQL prepares one at a time (42601). asyncpg's own ``execute`` uses
    the simple query protocol, which takes a whole script.

    Raises:
        MigrationError: the script has its own BEGIN or COMMIT, which would commit a part of the migration.
    """
    adapted = cursor._adapt_connection
    for number, statement in enumerate(found, start=1):
        first = " ".join(statement.words[:2])
        if statement.controls_transaction and not adapted.autocommit:
            raise MigrationError(
                f"statement {number} of {len(found)} of a script is {first}; the migration is a transaction already, "
                "which the script must not end; remove its BEGIN and COMMIT, or execute it in an autocommit_block()"
            )
    # PostgreSQL makes one transaction of a text, and a CREATE INDEX CONCURRENTLY cannot be in one
    parts = [text[one.start : one.end] for one in found] if adapted.autocommit else [text]
    await_(_execute(cursor, adapted, parts))


def run_alone(cursor: Any, text: str) -> None:
    """Execute one statement without parameters and rows, as psycopg and psql do: in one round trip.

    SQLAlchemy would have it prepared first, which takes another one.
    """
    status = await_(_execute(cursor, cursor._adapt_connection, [text]))
    changed = _ROWS_CHANGED.match(status)
    cursor._rowcount = int(changed[1]) if changed else -1


async def _execute(cursor: Any, adapted: Any, parts: list[str]) -> str:
    """Execute texts in turn, and return the status of the last one."""
    status = ""
    async with adapted._execute_mutex:
        if not has_begun(adapted):
            await adapted._start_transaction()
        driver = adapted._connection
        try:
            for part in parts:
                status = await driver.execute(part)
        except Exception as exc:  # noqa: BLE001 - SQLAlchemy translates it
            if adapted.autocommit and not driver.is_closed() and driver.is_in_transaction():
                await driver.execute("ROLLBACK")
            cursor._handle_exception(exc)
        if adapted.autocommit and driver.is_in_transaction():
            await driver.execute("ROLLBACK")
            raise MigrationError("a script leaves its transaction open; nothing of that was committed")
    return status


@contextmanager
def printing_sql(context: EnvironmentContext, environment: Environment) -> Iterator[None]:
    """Print what creates the version table's schema first, if the statements of the body begin at base."""
    migration_context: Any = context.get_context()
    mention_data_migrations(migration_context)
    schema: str | None = environment.options.get("version_table_schema")
    if schema is None:
        yield
        return
    impl = migration_context.impl
    write = impl.static_output
    if not migration_context.get_current_heads():
        write(f"CREATE SCHEMA IF NOT EXISTS {environment.quoted_version_schema};")
    impl.static_output = lambda text: write(keep_schema(text, schema))
    try:
        yield
    finally:
        del impl.static_output


class StatementObserver:
    """Sees the statements of revisions on one connection.

    If the version table has a schema of its own, that exists before the first revision. A CREATE SCHEMA of it in a
    revision then does nothing.

    An ``autocommit_block`` commits what the same revision did before, without recording the revision; when it fails,
    the repetition does that part a second time. Such revisions are warned of. ``has_committed_rows`` is whether the
    revision that ran last has committed changes of rows in this way: a repetition may make them twice without an error.
    ``may_have_committed`` is whether it may have committed anything in this way that a repetition makes again, or fails
    at: where the connection is lost, nobody knows how the last statement ended. Where all revisions share a
    transaction, both are also of an earlier revision, until a COMMIT records that.

    Where the database has invalid indexes, one is dropped before a statement that creates an index of its name.
    """

    def __init__(self, environment: Environment, *, has_invalid_indexes: bool = False) -> None:
        self._has_invalid_indexes = has_invalid_indexes
        self._schema: str | None = environment.options.get("version_table_schema")
        self._revision: str | None = None
        self._changed = False
        self._in_block = False
        self._wrote_rows = False
        self._is_each_recorded = bool(environment.options.get("transaction_per_migration"))
        self._committed = self._committed_rows = False  # by the blocks of this revision
        self._is_unsafe = False  # whether it has done, outside a block, what must not be repeated
        self.has_committed_rows = self.may_have_committed = False

    def begin(self, step: MigrationStep) -> None:
        """Receive the step that runs from now on."""
        self._revision = step.revision.revision if isinstance(step, RevisionStep) else None
        self._changed = self._wrote_rows = self._committed = self._committed_rows = self._is_unsafe = False
        if self._is_each_recorded:
            self.has_committed_rows = self.may_have_committed = False

    @contextmanager
    def on(self, context: EnvironmentContext, connection: SyncConnection) -> Iterator[None]:
        """Observe ``connection``, and the ``autocommit_block`` of the context that is configured on it."""
        migration_context: Any = context.get_context()
        block = migration_context.autocommit_block

        @contextmanager
        def autocommit_block() -> Iterator[None]:
            self._warn()
            self.may_have_committed = self.may_have_committed or self._is_unsafe
            with block():
                # the COMMIT has recorded all earlier revisions
                self._committed = self.may_have_committed = self._committed or self._is_unsafe
                self._committed_rows = self.has_committed_rows = self._committed_rows or self._wrote_rows
                self._in_block = True
                try:
                    yield
                finally:
                    self._in_block = self._wrote_rows = self._is_unsafe = False
            self._changed = False

        migration_context.autocommit_block = autocommit_block
        event.listen(connection, "before_cursor_execute", self._before, retval=True)
        event.listen(connection, "after_cursor_execute", self._after)
        try:
            yield
        finally:
            event.remove(connection, "after_cursor_execute", self._after)
            event.remove(connection, "before_cursor_execute", self._before)

    def _before(
        self, connection: SyncConnection, cursor: Any, text: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        if not self._changed:
            self._changed = any(statement.changes for statement in statements(text))
        self._look_at(text)
        if self._schema is not None and "SCHEMA" in text.upper():
            text = keep_schema(text, self._schema)
        if self._has_invalid_indexes and (created := indexes_created(text)):
            driver: Any = connection.connection.driver_connection
            await_(make_room(driver, created))
        return text, parameters

    def _look_at(self, text: str) -> None:
        found = statements(text)
        if not all(statement.may_be_repeated for statement in found):
            self._is_unsafe = True
        if self._in_block or any(statement.controls_transaction for statement in found):
            # a COMMIT of the revision's own, before CREATE INDEX CONCURRENTLY for example, begins such a block, too
            self._committed = self.may_have_committed = self.may_have_committed or self._is_unsafe

    def _after(
        self, connection: SyncConnection, cursor: Any, text: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if any(statement.writes_rows for statement in statements(text)):
            self._wrote_rows = True
            if self._in_block:
                self._committed_rows = self.has_committed_rows = True

    def _warn(self) -> None:
        if self._changed and self._revision is not None:
            warn_once(
                f"revision {self._revision} changes the database before its autocommit_block(), which commits that: if "
                "the block fails, the repetition makes the same change again: rows are changed twice, and DDL fails; "
                "put the block into a revision of its own"
            )
