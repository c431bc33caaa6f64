"""``SyncTenancy``: what ``tenancy.sync`` is."""

from __future__ import annotations

import atexit
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from sqlalchemy import Executable, Result, Row, text
from sqlalchemy.exc import DBAPIError

from ..context import bind
from ..errors import MissingExtraError, NotOpenError
from ..events import DRAIN_TIMEOUT
from ..forks import in_child
from ..lifetime import Lifetime
from ..queries import DEFAULT_CONCURRENCY, DEFAULT_MAX_ROWS, DEFAULT_TIMEOUT, Chosen, FleetQuery, Query
from ..routing import TenantSession
from ..routing.consistency import noting_writes
from ..routing.reading import is_plain
from ..routing.replicas import can_repeat
from ..routing.sessions import replica_demand
from ..tenant import Status, Tenant, TenantRef
from .hops import Hops
from .runner import LoopThread
from .sessions import EachAnswer, EachTenant, ThreadSession

if TYPE_CHECKING:
    from .side import ThreadSide

P = ParamSpec("P")
T = TypeVar("T")


class SyncTenancy:
    """A ``Tenancy`` for synchronous code; ``tenancy.sync`` makes it.

    Where the ``Tenancy`` is open in an event loop of this process, all other threads may use this at once. Where it is
    not, ``open`` (or ``with tenancy.sync``) opens it in an event loop that runs in a thread of its own.

    Connections are psycopg's, opened and used in the thread that needs them. They count in the same slots as the
    asynchronous ones (``pool.max_connections``, ``pool.max_connections_per_tenant``).

    Args:
        lifetime: The parts that this shares with the asynchronous object.

    Raises:
        MissingExtraError: psycopg is not installed.
    """

    def __init__(self, lifetime: Lifetime) -> None:
        try:
            from .side import ThreadSide
        except ImportError as exc:  # also where psycopg finds no libpq
            raise MissingExtraError("psycopg", "sync") from exc
        self._make_side = ThreadSide
        self._lifetime = lifetime
        self._claiming = threading.RLock()  # it protects the next three
        self._runner: LoopThread | None = None
        self._side: ThreadSide | None = None
        self._entered = 0
        in_child(self._leave_to_parent)

    def __repr__(self) -> str:
        """Tell whether it is open; no configuration, which holds credentials."""
        return f"<SyncTenancy {'open' if self.is_open else 'closed'}>"

    # --- sessions and scopes ----------------------------------------------------------------------------------------

    def session(
        self,
        tenant: TenantRef | None = None,
        *,
        operator: bool = False,
        read_only: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
        isolation_level: str | None = None,
        **options: Any,
    ) -> AbstractContextManager[TenantSession]:
        """Open a session on a tenant's own database: ``with tenancy.sync.session() as session``.

        Args:
            tenant: A slug, an id or a ``Tenant``; the bound tenant where None.
            operator: Admit a tenant in maintenance; not a request that its maintenance has ended.
            read_only: Whether it only reads, as in ``Tenancy.session``.
            replica: Whether a replica may serve it, as in ``Tenancy.session``; so are the next two.
            max_staleness: How old what it sees on a replica may be, in seconds.
            after: A token of ``consistency_token``.
            isolation_level: As in ``Tenancy.session``.
            options: Further arguments of ``sqlalchemy.orm.Session``, and ``session_class``: a subclass of
                ``tenancy_orm.routing.TenantSession``.

        Raises:
            TenancyError: as ``Tenancy.session``.
            WrongEventLoopError: this is the thread of the event loop that the ``Tenancy`` is open in.
        """
        side = self._opened()
        demand = replica_demand(
            side.router,
            replica=replica,
            read_only=read_only,
            max_staleness=max_staleness,
            after=after,
            isolation_level=isolation_level,
        )
        return ThreadSession(
            side,
            tenant,
            operator=operator,
            options=options,
            read_only=read_only,
            isolation_level=isolation_level,
            demand=demand,
        )

    @contextmanager
    def transaction(
        self, tenant: TenantRef | None = None, *, operator: bool = False, **options: Any
    ) -> Iterator[TenantSession]:
        """Open a session. Its work is committed when the body succeeds, and rolled back when it raises.

        Raises:
            TenancyError: as ``session``.
        """
        with self.session(tenant, operator=operator, **options) as session, session.begin():
            yield session

    @contextmanager
    def scope(self, tenant: TenantRef) -> Iterator[Tenant]:
        """Bind ``tenant`` for the body: for jobs, scripts and tests. The binding is this thread's.

        Raises:
            CrossTenantError: another tenant is bound; a scope cannot be switched from inside.
            TenantNotFoundError: there is no such tenant.
        """
        with bind(self._opened().tenant(tenant)) as found, noting_writes(found.id):
            yield found

    def each(
        self,
        *,
        status: Iterable[Status | str] = (Status.TRIAL, Status.ACTIVE),
        tier: str | Iterable[str] = (),
    ) -> EachTenant:
        """Iterate over the fleet, each tenant bound in turn: ``for tenant in tenancy.sync.each(): ...``.

        Raises:
            CrossTenantError: a tenant is bound already; work over the fleet is not a tenant's to do.
        """
        side = self._opened()
        return EachTenant(side.hops, self._lifetime.parts.tenants.iterate(status=tuple(status), tier=tier))

    def run(self, tenant: TenantRef, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call ``func(*args, **kwargs)`` with ``tenant`` bound, and return its result.

        A plain function runs in this thread; a coroutine function is awaited in the event loop, with the tenant bound.

        Raises:
            TenancyError: as ``scope``; and whatever ``func`` raises.
        """
        with self.scope(tenant):
            if inspect.iscoroutinefunction(func):
                return self.call(func, *args, **kwargs)
            outcome = func(*args, **kwargs)
            return self.call(_awaited, outcome) if inspect.isawaitable(outcome) else outcome

    def call(self, async_function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``async_function(*args, **kwargs)`` in the event loop, in this thread's context; return its result.

        For what only the asynchronous object has: ``tenancy.sync.call(tenancy.tenants.create, "acme")``. Where this
        thread is interrupted (Ctrl-C), the call is cancelled.

        Raises:
            NotOpenError: it is not open.
            WrongEventLoopError: this is the loop's thread.
            TypeError: this is a coroutine, and no function.
            Exception: whatever ``async_function`` raises.
        """
        given: object = async_function
        if inspect.iscoroutine(given):
            given.close()
            raise TypeError(
                "pass the function and its arguments, not what it returns: "
                'tenancy.sync.call(tenancy.tenants.create, "acme")'
            )
        return self._opened().hops.run_async(partial(async_function, *args, **kwargs))

    def consistency_token(self, tenant: TenantRef | None = None) -> str:
        """Return a token for ``session(..., replica=True, after=token)``.

        Raises:
            TenancyError: as ``Tenancy.consistency_token``.
        """
        side = self._opened()
        return side.hops.run_async(side.router.consistency_token, side.tenant(tenant))

    # --- textual SQL ------------------------------------------------------------------------------------------------

    def fetch_all(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> list[Row[*tuple[Any, ...]]]:
        """Run a query on a tenant and return all rows: textual SQL with ``:name`` parameters, or SQLAlchemy's.

        It only reads: PostgreSQL refuses what writes (25006). With ``replica``, a replica may serve it, as in
        ``session``; where one cancels it, the statement is repeated elsewhere.

        Raises:
            TenancyError: as ``session``.
        """
        return list(self._fetch(sql, parameters, Result.all, tenant, operator, replica, max_staleness, after))

    def fetch_one(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> Row[*tuple[Any, ...]] | None:
        """Run a query as ``fetch_all`` does and return the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        found: Row[*tuple[Any, ...]] | None = self._fetch(
            sql, parameters, Result.first, tenant, operator, replica, max_staleness, after
        )
        return found

    def fetch_value(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
        replica: bool = False,
        max_staleness: float | None = None,
        after: str | None = None,
    ) -> Any:
        """Run a query as ``fetch_all`` does and return the first column of the first row, or None.

        Raises:
            TenancyError: as ``session``.
        """
        return self._fetch(sql, parameters, Result.scalar, tenant, operator, replica, max_staleness, after)

    def _fetch(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        take: Callable[[Result[Any]], Any],
        tenant: TenantRef | None,
        operator: bool,
        replica: bool,
        max_staleness: float | None,
        after: str | None,
    ) -> Any:
        """Read in a session; again where a replica has ended the statement, or is gone."""
        with self.session(
            tenant, operator=operator, read_only=True, replica=replica, max_staleness=max_staleness, after=after
        ) as session:
            while True:
                try:
                    return take(session.execute(_executable(sql), dict(parameters or {})))
                except DBAPIError as exc:
                    if not can_repeat(session.bind, exc):
                        raise
                    session.rollback()

    def execute(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenant: TenantRef | None = None,
        operator: bool = False,
    ) -> int:
        """Run one statement on a tenant, commit, and return how many rows it touched; -1 where PostgreSQL does not say.

        Where the connection is lost before PostgreSQL has answered, the statement may be committed. It is not repeated.

        Raises:
            TenancyError: as ``session``.
        """
        # one that PostgreSQL plans is a transaction of its own; another may be several statements, or end one
        alone = isinstance(sql, str) and is_plain(sql) and ";" not in sql
        level = "AUTOCOMMIT" if alone else None
        with self.session(tenant, operator=operator, isolation_level=level) as session, session.begin():
            result: Any = session.connection().execute(
                _executable(sql), dict(parameters or {}), execution_options={"preserve_rowcount": True}
            )
            return int(result.rowcount)

    def query_all(
        self,
        statement: str | Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        tenants: Iterable[TenantRef] | None = None,
        tier: str | Iterable[str] = (),
        status: Iterable[Status | str] | Status | str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        timeout: float = DEFAULT_TIMEOUT,
        max_rows: int = DEFAULT_MAX_ROWS,
        write: bool = False,
        yield_errors: bool = False,
    ) -> EachAnswer:
        """Run one statement on many tenants: ``for tenant, rows in tenancy.sync.query_all("SELECT ...")``.

        The tenants are asked in the event loop, many at once. The arguments are those of ``Tenancy.query_all``.

        Raises:
            TenancyError: as ``Tenancy.query_all``.
        """
        hops, parts = self._opened().hops, self._lifetime.parts
        query = FleetQuery(
            Query(statement=statement, parameters=parameters, timeout=timeout, max_rows=max_rows, write=write),
            Chosen.of(tenants, tier, status),
            registry=parts.registry,
            router=parts.router,
            concurrency=concurrency,
            yield_errors=yield_errors,
        )
        return EachAnswer(hops, query)

    # --- opening and closing ----------------------------------------------------------------------------------------

    def open(self, *, initialise: bool | None = None, warm: bool = True) -> Self:
        """Make this usable: open the ``Tenancy`` in a thread of its own, unless an event loop has it open already.

        Open it after a fork, in each process: what was opened before one stays the parent's. It is closed at the end of
        the process if nobody has closed it.

        Args:
            initialise: As in ``Tenancy.open``.
            warm: As in ``Tenancy.open``.

        Raises:
            TenancyError: as ``Tenancy.open``.
            WrongEventLoopError: it is open in this thread's event loop.
        """
        with self._claiming:
            if self.is_open:
                self._opened().hops.threads.check()
                return self
            runner = LoopThread()
            try:
                runner.run(self._lifetime.open(initialise=initialise, warm=warm))
            except BaseException:
                runner.stop()
                raise
            self._runner = runner
            atexit.register(self.close)
        return self

    def close(self, *, timeout: float = DRAIN_TIMEOUT) -> None:
        """End what ``open`` has begun. Where an event loop had the ``Tenancy`` open before, it stays open there.

        Args:
            timeout: How long to wait for subscribers' coroutines, in seconds, before anything is closed.
        """
        with self._claiming:
            runner, self._runner = self._runner, None
            if runner is None:
                return
            atexit.unregister(self.close)
            self._side = None
            try:
                runner.run(self._lifetime.close(timeout=timeout))
            finally:
                runner.stop()

    def __enter__(self) -> Self:
        """Open. Blocks may be nested; the outermost one closes."""
        with self._claiming:
            self.open()
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, if this is the outermost block."""
        with self._claiming:
            if self._entered == 0:
                return  # it was entered by the process that this one was forked from
            self._entered -= 1
            if self._entered == 0:
                self.close()

    def _leave_to_parent(self) -> None:
        """In a forked process, which has no other thread, give up what is open in the parent."""
        self._claiming = threading.RLock()
        if self._runner is not None:
            atexit.unregister(self.close)
        self._runner = self._side = None
        self._entered = 0

    @property
    def is_open(self) -> bool:
        """Whether the ``Tenancy`` is open: here, or in an event loop."""
        return self._lifetime.assembly is not None

    def _opened(self) -> ThreadSide:
        try:
            home, parts = self._lifetime.home, self._lifetime.parts
        except NotOpenError:
            raise NotOpenError(
                "this Tenancy is not open; call tenancy.sync.open(), or: with tenancy.sync: ..."
            ) from None
        side = self._side
        if side is None or side.router is not parts.router:
            side = self._side = self._make_side(Hops(home), parts.directory, parts.router)
        side.hops.threads.check()
        return side


def hops_of(sync: SyncTenancy) -> Hops:
    """Return what puts calls into the event loop: for the package's own adapters.

    Raises:
        NotOpenError: it is not open.
        WrongEventLoopError: this is the loop's thread.
    """
    return sync._opened().hops


def _executable(sql: str | Executable) -> Executable:
    return text(sql) if isinstance(sql, str) else sql


async def _awaited(outcome: Awaitable[T]) -> T:
    return await outcome


__all__ = ["SyncTenancy", "hops_of"]
