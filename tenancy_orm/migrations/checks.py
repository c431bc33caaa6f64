"""Checks: what ``preflight()`` of a revision yields, and how one database is asked.

A check is SQL that must return no rows before its revision runs. It is executed as the owner of the tables: a tenant's
role may not see every table, and row security could hide rows from it, so that a check would pass for a wrong reason.
What is asked cannot write, and only the number of rows leaves the server.

The owner's session was opened by the administrator, and code that runs in it could become the administrator (SET ROLE).
So where a tenant's role could put code of its own on the search path, nothing is asked.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import Script
from alembic.util.exc import CommandError
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import NestedTransaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.expression import SelectBase, TextClause

from ..errors import MigrationError
from ..postgres.errors import (
    INVALID_SCHEMA_NAME,
    QUERY_CANCELED,
    UNDEFINED_COLUMN,
    UNDEFINED_FUNCTION,
    UNDEFINED_OBJECT,
    UNDEFINED_TABLE,
    sqlstate_of,
)
from ..tenant import Tenant
from .failures import TRANSIENT, describe
from .plan import MigrationStep
from .statements import statements, tokens

Statement: TypeAlias = "str | SelectBase | TextClause"

MOST_ROWS = 10_000
"""How many rows of a check are counted at most; the server ends the statement at the next one."""

_QUERIES = frozenset({"SELECT", "WITH", "VALUES", "TABLE"})

# an earlier revision of the same path may create what is missing
_UNDEFINED = frozenset({UNDEFINED_TABLE, UNDEFINED_COLUMN, UNDEFINED_FUNCTION, UNDEFINED_OBJECT, INVALID_SCHEMA_NAME})

# classes of SQLSTATEs with messages that name objects, but never quote a value of a row
_WITHOUT_VALUES = frozenset({"0A", "25", "28", "3F", "40", "42", "53", "54", "55", "57"})

# In one statement, for one transaction or savepoint. Without row_security = off, a table with FORCE ROW LEVEL SECURITY
# would hide rows from its owner; with it, PostgreSQL refuses to answer.
_READ_ONLY = (
    "SELECT pg_catalog.set_config('transaction_read_only', 'on', true), "
    "pg_catalog.set_config('row_security', 'off', true), "
    "pg_catalog.set_config('statement_timeout', '{}ms', true)"
)

# Operators are not qualified: pg_catalog is first on the search path, and has exactly these.
_FOREIGN = """
SELECT n.nspname FROM pg_catalog.pg_namespace n, pg_catalog.pg_roles r
WHERE r.rolname = {role} AND n.nspname = ANY (pg_catalog.current_schemas(false)) AND (
    pg_catalog.has_schema_privilege(r.oid, n.oid, 'CREATE')
    OR EXISTS (SELECT FROM pg_catalog.pg_class c
               WHERE c.relnamespace = n.oid AND pg_catalog.pg_has_role(r.oid, c.relowner, 'MEMBER'))
    OR EXISTS (SELECT FROM pg_catalog.pg_proc p
               WHERE p.pronamespace = n.oid AND pg_catalog.pg_has_role(r.oid, p.proowner, 'MEMBER'))
    OR EXISTS (SELECT FROM pg_catalog.pg_operator o
               WHERE o.oprnamespace = n.oid AND pg_catalog.pg_has_role(r.oid, o.oprowner, 'MEMBER')))
LIMIT 1
"""

# A tenant's own tables may have triggers of its own: no batch changes them, and what a foreign key does to them is done
# with the rights of their owner.
_FOREIGN_TRIGGER = """
SELECT pg_catalog.format('%I on %I.%I', t.tgname, n.nspname, c.relname)
FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid,
pg_catalog.pg_roles r
WHERE r.rolname = :role AND NOT t.tgisinternal AND pg_catalog.pg_has_role(r.oid, p.proowner, 'MEMBER')
    AND NOT pg_catalog.pg_has_role(r.oid, c.relowner, 'MEMBER')
LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Check:
    """SQL that must return no rows before its revision runs; a revision's ``preflight()`` yields it.

    Args:
        name: What must hold, in a few words. Reports have it, and neither the SQL nor the rows.
        statement: One ``SELECT``: a text, which is taken as it is, ``sqlalchemy.text`` with parameters, or a
            ``sqlalchemy.select``.
        deferred: Whether to ask right before the revision runs, in its transaction, and not before the first tenant is
            changed: for what an earlier revision of the same upgrade brings about.

    ```python
    def preflight():
        yield Check("no NULLs in users.email", "SELECT FROM users WHERE email IS NULL")
    ```
    """

    name: str
    statement: Statement
    deferred: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no query, before a database is asked."""
        if not self.name.strip():
            raise MigrationError("a check needs a name: Check(name, statement)")
        if not isinstance(self.statement, (str, SelectBase, TextClause)):
            raise MigrationError(
                f"check {self.name!r}: give a text of SQL, sqlalchemy.text or a select, "
                f"not {type(self.statement).__name__}"
            )


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that did not pass: with the number of rows that it returned, or the reason why it could not be asked.

    More than 10,000 rows are not counted: ``rows`` is 10,001 then.
    """

    revision: str
    check: str
    rows: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.revision} {self.check}: {self.found}"

    @property
    def found(self) -> str:
        """What was found, in words."""
        if self.rows is None:
            return self.error or "not asked"
        if self.rows > MOST_ROWS:
            return f"more than {MOST_ROWS} rows"
        return f"{self.rows} row{'s' * (self.rows != 1)}"


# --- what a revision says ---------------------------------------------------------------------------------------------


def script_of(step: MigrationStep) -> Script | None:
    """Return the revision that ``step`` upgrades by, if that has checks."""
    if not isinstance(step, RevisionStep) or not step.is_upgrade:
        return None
    return step.revision if callable(getattr(step.revision.module, "preflight", None)) else None


def checks_of(script: Script) -> Iterator[Check]:
    """Yield the checks of a revision.

    Raises:
        MigrationError: its ``preflight()`` yields something else.
        Exception: it raises.
    """
    found = script.module.preflight()
    if found is None:
        return
    if isinstance(found, (str, Check, ClauseElement)):
        found = (found,)
    if not isinstance(found, Iterable):
        raise MigrationError(f"preflight() of {script.revision} must yield checks, and returns a {_type(found)}")
    for number, item in enumerate(found, start=1):
        if isinstance(item, Check):
            yield item
        elif isinstance(item, (str, SelectBase, TextClause)):
            yield Check(f"check {number}", item)
        else:
            raise MigrationError(
                f"preflight() of {script.revision} yields a {_type(item)}; yield a text of SQL, a select or a Check"
            )


def _type(value: object) -> str:
    return type(value).__name__


# --- asking ---------------------------------------------------------------------------------------------------------


def refuse_foreign_code(connection: SyncConnection, tenant: Tenant | None, *, what: str = "checks") -> None:
    """Refuse to ask, or to do ``what``, where the tenant's role could have put code of its own on the search path.

    Raises:
        MigrationError: it may create objects in a schema of the search path, or owns some there.
    """
    if tenant is None or tenant.placement is None:
        return
    statement = sa.text(_FOREIGN.format(role=":role"))
    schema = connection.execute(statement, {"role": tenant.placement.role}).scalar()
    if schema is not None:
        remedy = "revoke that" if what != "checks" else "revoke that, or skip the preflight"
        raise MigrationError(
            f"the tenant's role may create objects in schema {schema!r}, or owns some there, and {what} would execute "
            f"them with the owner's rights: {remedy}"
        )


def refuse_foreign_triggers(connection: SyncConnection, tenant: Tenant | None) -> None:
    """Refuse to change rows where a function of the tenant's role would be executed for them, or could be.

    Raises:
        MigrationError: as ``refuse_foreign_code``, or a table of the owner's has a trigger with such a function.
    """
    refuse_foreign_code(connection, tenant, what="data migrations")
    if tenant is None or tenant.placement is None:
        return
    trigger = connection.execute(sa.text(_FOREIGN_TRIGGER), {"role": tenant.placement.role}).scalar()
    if trigger is not None:
        raise MigrationError(
            f"the trigger {trigger} calls a function of the tenant's role, and data migrations would execute it with "
            "the owner's rights: drop it, or make the owner's role the owner of the function"
        )


@contextmanager
def read_only(connection: SyncConnection, timeout: float) -> Iterator[NestedTransaction]:
    """A savepoint in which PostgreSQL refuses to write, also within a transaction that writes. It is rolled back."""
    with savepoint(connection) as begun:
        connection.exec_driver_sql(_READ_ONLY.format(max(1, round(timeout * 1000))))
        yield begun


@contextmanager
def savepoint(connection: SyncConnection) -> Iterator[NestedTransaction]:
    """A savepoint that is rolled back at the end."""
    begun = connection.begin_nested()
    try:
        yield begun
    finally:
        if begun.is_active and not connection.invalidated:
            begun.rollback()


def count(connection: SyncConnection, check: Check) -> int:
    """Return how many rows a check finds, at most ``MOST_ROWS`` + 1; the rows themselves are not read.

    Raises:
        MigrationError: it is not one SELECT.
        DBAPIError: PostgreSQL refuses it.
    """
    statement = check.statement
    with savepoint(connection):
        if isinstance(statement, str):
            counting = (
                f"SELECT pg_catalog.count(*) FROM (SELECT FROM (\n{_one_query(check, statement)}\n) AS checked "  # noqa: S608
                f"LIMIT {MOST_ROWS + 1}) AS counted"
            )
            result = connection.exec_driver_sql(counting, execution_options={"no_parameters": True})
        else:
            result = connection.execute(_counting(check, statement))
        return int(result.scalar_one())


def _counting(check: Check, statement: SelectBase | TextClause) -> sa.Select[Any]:
    if isinstance(statement, TextClause):
        text = copy.copy(statement)
        text.text = _one_query(check, statement.text)
        statement = text.columns()
    found: sa.Select[Any] = sa.select(sa.literal_column("1").label("one")).select_from(statement.subquery("checked"))
    return sa.select(sa.func.pg_catalog.count(sa.text("*"))).select_from(found.limit(MOST_ROWS + 1).subquery("counted"))


def names_any(connection: SyncConnection, check: Check, tables: Collection[str]) -> bool:
    """Whether a check names one of these tables."""
    found = check.statement
    if isinstance(found, SelectBase):
        found = str(found.compile(dialect=connection.dialect))
    sql = found.text if isinstance(found, TextClause) else found
    wanted = {table.lower() for table in tables}
    return any(sql[start:end].strip('"').lower() in wanted for _, start, end in tokens(sql))


def _one_query(check: Check, text: str) -> str:
    found = statements(text)
    if len(found) == 1 and found[0].psql_command is None:
        sql = text[found[0].start : found[0].end]
        if sql.startswith("(") or (found[0].words and found[0].words[0] in _QUERIES):
            return sql
    raise MigrationError(f"check {check.name!r} must be one SELECT, which returns what is wrong")


@dataclass(slots=True)
class Asked:
    """The checks of one revision, asked on one database."""

    findings: list[Finding]
    asked: int = 0
    deferred: bool = False
    errors: list[Exception] | None = None


def ask(
    connection: SyncConnection,
    script: Script,
    timeout: float,
    *,
    ahead: bool,
    may_wait: bool,
    changing: Collection[str] = (),
) -> Asked:
    """Ask the checks of a revision.

    Args:
        connection: To the database.
        script: The revision.
        timeout: The seconds for each check.
        ahead: Whether it is asked before the run; checks that say so are deferred then.
        may_wait: Whether a check is deferred that names a table, for example, that does not exist yet.
        changing: The tables with rows that data migrations change before the revision: a check that names one is
            deferred if it finds rows.

    Raises:
        DBAPIError: a lock was not available, or the connection was lost: another attempt may succeed.
    """
    result = Asked([])
    check: Check | None = None
    with read_only(connection, timeout) as limited:
        try:
            for check in _within(limited, checks_of(script)):
                if ahead and check.deferred:
                    result.deferred = True
                    continue
                try:
                    rows = count(connection, check)
                except DBAPIError as exc:
                    if _may_pass(exc):
                        raise
                    if may_wait and sqlstate_of(exc) in _UNDEFINED:
                        result.deferred = True
                        continue
                    _failed(result, script, check.name, exc, timeout)
                else:
                    result.asked += 1
                    if rows and changing and names_any(connection, check, changing):
                        result.deferred = True
                    elif rows:
                        result.findings.append(Finding(script.revision, check.name, rows))
        except DBAPIError as exc:
            # a statement of preflight() itself
            if _may_pass(exc):
                raise
            if may_wait and sqlstate_of(exc) in _UNDEFINED:
                result.deferred = True
            else:
                _failed(result, script, "preflight()", exc, timeout)
        except Exception as exc:  # noqa: BLE001 - a revision may raise anything; it is reported for this tenant
            _failed(result, script, "preflight()" if check is None else check.name, exc, timeout)
    return result


def _within(limited: NestedTransaction, found: Iterator[Check]) -> Iterator[Check]:
    """Yield the checks; refuse a ``preflight()`` that has left the transaction, and so its limits."""
    for check in itertools.chain(found, [None]):
        if not limited.is_active:
            raise MigrationError("it ends the transaction that it is asked in")
        if check is not None:
            yield check


def _may_pass(error: DBAPIError) -> bool:
    return error.connection_invalidated or sqlstate_of(error) in TRANSIENT


def _failed(result: Asked, script: Script, name: str, error: Exception, timeout: float) -> None:
    if sqlstate_of(error) == QUERY_CANCELED:
        reason = f"no answer within {timeout:g} s; migration.preflight_timeout is the limit"
    else:
        reason = describe_without_values(error)
    result.errors = [*(result.errors or ()), error]
    result.findings.append(Finding(script.revision, name, error=reason))


def describe_without_values(error: Exception) -> str:
    """Return one line about an error of a check.

    PostgreSQL quotes values of rows in some messages ("invalid input syntax for type integer"): those are left out.
    """
    if isinstance(error, MigrationError):
        return str(error)
    state = sqlstate_of(error)
    if state is None:
        return f"it raises {_type(error)}"
    if state[:2] not in _WITHOUT_VALUES or not isinstance(error, DBAPIError):
        return f"it fails with SQLSTATE {state}"
    return describe(error)


# --- in the transaction of the revision -------------------------------------------------------------------------------


def ask_in_place(connection: SyncConnection, script: Script, tenant: Tenant | None, timeout: float) -> None:
    """Ask the checks of a revision in the transaction that is about to run it.

    In a template, rows are no failure: it has no data of its own. But a check that PostgreSQL cannot execute is found
    there, before any tenant is changed.

    Raises:
        MigrationError: a check found rows, or could not be asked.
    """
    refuse_foreign_code(connection, tenant)
    result = ask(connection, script, timeout, ahead=False, may_wait=False)
    findings = [one for one in result.findings if tenant is not None or one.error is not None]
    if findings:
        cause = None if result.errors is None else result.errors[0]
        raise MigrationError(f"preflight: {'; '.join(f'{one.check}: {one.found}' for one in findings)}") from cause


def preceded(step: MigrationStep, ask_first: Callable[[], None]) -> MigrationStep:
    """Return a copy of ``step`` that calls ``ask_first`` before the revision, in the same transaction."""
    found: MigrationStep = copy.copy(step)
    migrate = step.migration_fn

    def checked(**options: Any) -> None:
        ask_first()
        migrate(**options)

    found.migration_fn = checked
    return found


# --- without a fleet --------------------------------------------------------------------------------------------------


def ask_before_migrations(context: MigrationContext, timeout: float) -> None:
    """Let ``context.run_migrations`` ask the checks of all revisions that it is about to run, before it runs the first.

    It raises ``CommandError`` if one does not pass.
    """
    untyped: Any = context
    plan = untyped._migrations_fn

    def steps(heads: Any, given: MigrationContext) -> Iterator[MigrationStep]:
        found = tuple(plan(heads, given))
        connection: SyncConnection | None = given.connection
        deferred = frozenset() if connection is None else _ask_ahead(connection, found, timeout)
        for step in found:
            script = script_of(step)
            if connection is None or script is None or script.revision not in deferred:
                yield step
            else:
                yield preceded(step, functools.partial(_ask_one_in_place, connection, script, timeout))

    untyped._migrations_fn = steps


def _ask_one_in_place(connection: SyncConnection, script: Script, timeout: float) -> None:
    if findings := ask(connection, script, timeout, ahead=False, may_wait=False).findings:
        raise CommandError(f"preflight: {'; '.join(map(str, findings))}")


def _ask_ahead(connection: SyncConnection, steps: Sequence[MigrationStep], timeout: float) -> frozenset[str]:
    findings: list[Finding] = []
    deferred = set()
    for number, script in enumerate(map(script_of, steps)):
        if script is None:
            continue
        result = ask(connection, script, timeout, ahead=True, may_wait=number > 0)
        findings += result.findings
        if result.deferred:
            deferred.add(script.revision)
    if findings:
        raise CommandError(f"preflight: nothing was changed: {'; '.join(map(str, findings))}")
    return frozenset(deferred)
