"""One statement on the databases of many tenants: ``tenancy.query_all``."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, overload

import asyncpg
from sqlalchemy import Executable, Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .cancellation import run_to_completion
from .context import refuse_while_bound
from .errors import ConfigurationError, FleetQueryError, QueryError, QueryFailure, TenancyError
from .migrations.connections import Health, is_down
from .migrations.failures import describe
from .migrations.selection import Selection
from .postgres.errors import sqlstate_of
from .postgres.failures import SERVER_FAILURES
from .registry.lifecycle import check_usable
from .registry.reading import TenantFilter
from .registry.registry import Registry
from .routing import Router
from .routing.connection import ROWS_ONLY
from .tenant import Status, Tenant, TenantRef, placement_of

if TYPE_CHECKING:
    _Row: TypeAlias = Row[*tuple[Any, ...]]
else:
    _Row = Row  # SQLAlchemy 2.0's takes one argument

logger = logging.getLogger("tenancy_orm.queries")

DEFAULT_CONCURRENCY = 8
"""How many tenants of one server are queried at once, by default."""
DEFAULT_TIMEOUT = 30.0
"""How long the statement may take in each tenant's database, by default, in seconds."""
DEFAULT_MAX_ROWS = 10_000
"""How many rows of each tenant are read, by default."""

USABLE = (Status.TRIAL, Status.ACTIVE)
"""The tenants that a query is for where none are named: those with a database that is in use."""

_GRACE_SECONDS = 2.0  # how much later than PostgreSQL this process gives up
_CHUNK = 1_000  # rows in one message
_FAILURES = (TenancyError, DBAPIError, *SERVER_FAILURES)

# PostgreSQL lets nobody change ``transaction_read_only`` back after the first query of a transaction, which this is.
_BOUND = "SELECT pg_catalog.set_config('statement_timeout', :timeout, true)"
_READ_ONLY = ", pg_catalog.set_config('transaction_read_only', 'on', true)"


class Rows(Sequence[_Row]):
    """The rows of one tenant.

    Attributes:
        columns (tuple[str, ...]): The columns' names, also where there are no rows.
        types (tuple[int, ...]): The columns' types, as OIDs of ``pg_type``; empty for ORM statements.
        truncated (bool): Whether there were more rows than ``max_rows``; these were not read.
        rowcount (int): How many rows a statement with ``write`` has changed; -1 where PostgreSQL does not say.
        error (QueryFailure | None): Why the query failed; then there are no rows.
    """

    __slots__ = ("_rows", "columns", "error", "rowcount", "truncated", "types")

    def __init__(
        self,
        rows: Sequence[_Row] = (),
        *,
        columns: Iterable[str] = (),
        types: Iterable[int] = (),
        truncated: bool = False,
        rowcount: int = -1,
        error: QueryFailure | None = None,
    ) -> None:
        self._rows = tuple(rows)
        self.columns = tuple(columns)
        self.types = tuple(types)
        self.truncated = truncated
        self.rowcount = rowcount
        self.error = error

    @overload
    def __getitem__(self, index: int) -> _Row: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[_Row, ...]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Return a row, or several."""
        return self._rows[index]

    def __len__(self) -> int:
        """Return how many rows were read."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Tell how many there are; no values."""
        state = " failed" if self.error else " truncated" if self.truncated else ""
        return f"<Rows {len(self)}{state}>"


class TenantRows(NamedTuple):
    """The answer of one tenant, as ``async for tenant, rows in tenancy.query_all(...)`` takes it apart."""

    tenant: Tenant
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked, and its bounds for each tenant; checked as it is made.

    Args:
        statement: Text with ``:name`` parameters, or a statement of SQLAlchemy Core or ORM.
        parameters: Values by name.
        timeout: Seconds that the statement may take.
        max_rows: How many rows are read.
        write: Whether it may write; it is committed.
    """

    statement: str | Executable
    parameters: Mapping[str, Any] | None = None
    timeout: float = DEFAULT_TIMEOUT
    max_rows: int = DEFAULT_MAX_ROWS
    write: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no bound.

        Raises:
            ConfigurationError: a value is none.
        """
        if not isinstance(self.statement, (str, Executable)):
            raise ConfigurationError(f"a statement is text or SQLAlchemy's, not {type(self.statement).__name__}")
        if not 0 < self.timeout <= 86_400:
            raise ConfigurationError("timeout must be more than 0 seconds, and at most a day")
        if self.max_rows < 1:
            raise ConfigurationError("max_rows must be at least 1")

    async def run(self, router: Router, tenant: Tenant) -> Rows:
        """Execute the statement as the tenant's role, in a transaction of its own.

        Raises:
            TenancyError, DBAPIError: as a session of the tenant.
            QueryError: it returns no rows and may not write, so it was not executed; or the commit took too long.
            TimeoutError: PostgreSQL did not end it in time.
        """
        check_usable(tenant, operator=True)
        try:
            return await self._run_once(router, tenant)
        except DBAPIError as exc:
            # a connection had prepared it before a change of the schema; PostgreSQL has refused it, and nothing is done
            if not _is_outdated(exc):
                raise
        return await self._run_once(router, tenant)

    async def _run_once(self, router: Router, tenant: Tenant) -> Rows:
        async with router.session(tenant) as session:
            # which may wait for a connection, as long as any session may
            await session.connection()
            async with asyncio.timeout(self.timeout + _GRACE_SECONDS):
                rows = await self._execute(session)
            if self.write:
                await self._commit(session, tenant)
            return rows

    async def _commit(self, session: AsyncSession, tenant: Tenant) -> None:
        # deferred constraints and triggers run here, and one may have lifted PostgreSQL's own bound
        try:
            async with asyncio.timeout(self.timeout + _GRACE_SECONDS):
                await session.commit()
        except TimeoutError as exc:
            raise QueryError(
                f"tenant {tenant.slug!r}: the COMMIT was not answered in time; what the statement wrote may be there"
            ) from exc

    async def _execute(self, session: AsyncSession) -> Rows:
        milliseconds = max(1, round(self.timeout * 1000))
        bounds = text(_BOUND if self.write else _BOUND + _READ_ONLY)
        await session.execute(bounds, {"timeout": str(milliseconds)})
        return await session.run_sync(self._fetch)

    def _fetch(self, session: Session) -> Rows:
        statement = text(self.statement) if isinstance(self.statement, str) else self.statement
        # what returns no rows could only end the transaction (COMMIT), or change the session (SET)
        options = {} if self.write else {"yield_per": min(self.max_rows + 1, _CHUNK), ROWS_ONLY: True}
        result: Any = session.execute(statement, dict(self.parameters or {}), execution_options=options)
        if not getattr(result, "returns_rows", True):
            return Rows(rowcount=result.rowcount)
        cursor = getattr(result, "cursor", None)
        described = (cursor.description if cursor is not None else None) or ()
        columns, types = tuple(result.keys()), tuple(column[1] for column in described)
        rowcount = getattr(result, "rowcount", -1) if self.write else -1
        rows = result.fetchmany(self.max_rows + 1)
        result.close()
        return Rows(
            rows[: self.max_rows],
            columns=columns,
            types=types,
            truncated=len(rows) > self.max_rows,
            rowcount=rowcount,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which tenants are meant: those named, or all that are usable, or those of a status or tier."""

    tenants: tuple[TenantRef, ...] | None = None
    tier: tuple[str, ...] = ()
    status: tuple[Status, ...] = ()

    @classmethod
    def of(
        cls,
        tenants: Iterable[TenantRef] | None,
        tier: str | Iterable[str],
        status: Iterable[Status | str] | Status | str | None,
    ) -> Chosen:
        """Read the arguments of ``Tenancy.query_all``.

        Raises:
            ConfigurationError: tenants are named, and so are statuses or tiers; or there is no such status.
        """
        if isinstance(tenants, str):
            raise ConfigurationError("tenants is a list of slugs or ids, not one text")
        statuses = (status,) if isinstance(status, str) else tuple(status or ())
        tiers = (tier,) if isinstance(tier, str) else tuple(tier)
        if tenants is not None and (tiers or statuses):
            raise ConfigurationError("name tenants, or choose them by tier and status; not both")
        try:
            known = tuple(map(Status, statuses))
        except ValueError as exc:
            raise ConfigurationError(f"{exc}; the statuses are {', '.join(Status)}") from None
        return cls(tenants=None if tenants is None else tuple(tenants), tier=tiers, status=known)

    async def find(self, registry: Registry) -> list[Tenant]:
        """Look the tenants up.

        Raises:
            TenantNotFoundError, TenantProvisioningError: a named tenant does not exist, or is being created.
        """
        if self.tenants is not None:
            return await Selection(registry).choose(self.tenants)
        which = TenantFilter(status=self.status or USABLE, tier=self.tier)
        return [tenant async for tenant in registry.iterate(which) if tenant.placement is not None]


_Answer: TypeAlias = TenantRows | BaseException


class FleetQuery:
    """An iterator over the answers of many tenants: ``async for tenant, rows in tenancy.query_all(...)``.

    Answers come as they arrive, in no order. When the loop is left early, the queries under way are cancelled and their
    connections are returned. ``async with tenancy.query_all(...) as answers`` waits for that.
    """

    # A plain object and no async generator: CPython finalises it as soon as the loop is left.

    def __init__(
        self,
        query: Query,
        chosen: Chosen,
        *,
        registry: Registry,
        router: Router,
        concurrency: int,
        yield_errors: bool,
    ) -> None:
        refuse_while_bound("querying all tenants")
        if concurrency < 1:
            raise ConfigurationError("concurrency must be at least 1")
        self._query = query
        self._chosen = chosen
        self._registry = registry
        self._router = router
        # half of a server's connections are left to the process's own requests
        self._concurrency = max(1, min(concurrency, router.capacity // 2))
        self._yield_errors = yield_errors
        self._failures: list[QueryFailure] = []
        self._answers: asyncio.Queue[_Answer] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] | None = None
        self._left = 0
        self._total = 0
        self._truncated = 0

    @property
    def failures(self) -> tuple[QueryFailure, ...]:
        """The failures so far."""
        return tuple(self._failures)

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> TenantRows:
        """Return the next answer.

        Raises:
            FleetQueryError: all tenants have been asked, and some failed.
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("querying all tenants")
        try:
            if self._workers is None:
                await self._start()
            while self._left:
                answer = await self._answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                self._left -= 1
                if answer.rows.error is not None:
                    self._failures.append(answer.rows.error)
                    if not self._yield_errors:
                        continue
                self._truncated += answer.rows.truncated
                return answer
        except BaseException:
            self.stop()
            raise
        self._warn()
        if self._failures and not self._yield_errors:
            failures, self._failures = self._failures, []
            raise FleetQueryError(failures, total=self._total)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel the queries under way, and wait until their connections are returned."""
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the queries under way, and wait until their connections are returned."""
        self.stop()
        if self._workers:
            await run_to_completion(asyncio.wait(self._workers))

    def __del__(self) -> None:
        """Cancel the queries under way when the loop is left."""
        self.stop()

    async def _start(self) -> None:
        tenants = await self._chosen.find(self._registry)
        self._left = self._total = len(tenants)
        by_server: dict[str, deque[Tenant]] = {}
        for tenant in tenants:
            by_server.setdefault(placement_of(tenant).server, deque()).append(tenant)
        ask, health = partial(self._query.run, self._router), Health()
        # bounded, so that a slow consumer is waited for; what waits has returned its connection
        self._answers = asyncio.Queue(self._concurrency)
        self._workers = [
            asyncio.create_task(_work(queue, server, ask, health, self._answers), name="tenancy-query")
            for server, queue in by_server.items()
            for _ in range(min(self._concurrency, len(queue)))
        ]

    def stop(self) -> None:
        """Cancel the queries under way; ``aclose`` waits for that as well."""
        self._left = 0
        for worker in getattr(self, "_workers", None) or ():
            loop = worker.get_loop()
            # a second cancellation would interrupt the clean-up that the first one has started
            if worker.done() or worker.cancelling() or loop.is_closed():
                continue
            if asyncio._get_running_loop() is loop:
                worker.cancel()
            else:  # the garbage collector runs in any thread
                loop.call_soon_threadsafe(worker.cancel)

    def _warn(self) -> None:
        if self._truncated:
            logger.warning(
                "a query over %d tenants read no more than max_rows=%d rows of each, and %d had more",
                self._total,
                self._query.max_rows,
                self._truncated,
            )
            self._truncated = 0


async def _work(
    queue: deque[Tenant],
    server: str,
    ask: Callable[[Tenant], Awaitable[Rows]],
    health: Health,
    answers: asyncio.Queue[_Answer],
) -> None:
    """Ask the tenants of one server one by one. It holds no reference to the iterator, which ends it when dropped."""
    try:
        while queue:
            tenant = queue.popleft()
            await answers.put(TenantRows(tenant, await _answer(tenant, server, ask, health)))
    except Exception as exc:  # noqa: BLE001 - a mistake in the statement: the caller's
        await answers.put(exc)


async def _answer(tenant: Tenant, server: str, ask: Callable[[Tenant], Awaitable[Rows]], health: Health) -> Rows:
    try:
        # the remaining tenants of a server that is down fail at once
        health.check(server, tenant.slug)
        rows = await ask(tenant)
    except _FAILURES as exc:
        if is_down(exc):
            health.failed(server)
        return Rows(error=failure_of(tenant, exc))
    health.answered(server)
    return rows


def failure_of(tenant: Tenant, error: BaseException) -> QueryFailure:
    """Return an error in one tenant's database as text, without the statement and its parameters."""
    sqlstate = getattr(error, "sqlstate", None) or sqlstate_of(error)
    # the failure has the slug and the code beside the message
    message = describe(error).removeprefix(f"tenant {tenant.slug!r}: ").removesuffix(f" (SQLSTATE {sqlstate})")
    return QueryFailure(tenant.id, tenant.slug, sqlstate, message)


def _is_outdated(error: DBAPIError) -> bool:
    cause = getattr(error.orig, "__cause__", None)
    return isinstance(cause, asyncpg.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError)


__all__ = [
    "DEFAULT_CONCURRENCY",
    "DEFAULT_MAX_ROWS",
    "DEFAULT_TIMEOUT",
    "USABLE",
    "Chosen",
    "FleetQuery",
    "Query",
    "Rows",
    "TenantRows",
    "failure_of",
]
