"""What synchronous code runs within: a session on a tenant, and a loop that binds each tenant in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..context import TenantInTurn
from ..errors import QueryFailure
from ..queries import FleetQuery, TenantRows
from ..routing import TenantSession
from ..routing.engines import Entry
from ..routing.replicas import ReplicaDemand, ReplicaReads
from ..routing.sessions import checked_options, session_class_in
from ..scopes import admit
from ..tenant import Tenant, TenantRef
from .hops import Hops

if TYPE_CHECKING:
    from .side import ThreadSide

T = TypeVar("T")


class ThreadSession:
    """``with tenancy.sync.session()``: a lease of the tenant's engine, and a ``Session`` on it."""

    __slots__ = (
        "_demand",
        "_entry",
        "_isolation_level",
        "_operator",
        "_options",
        "_read_only",
        "_reads",
        "_session",
        "_side",
        "_tenant",
    )

    def __init__(
        self,
        side: ThreadSide,
        tenant: TenantRef | None,
        *,
        operator: bool,
        options: dict[str, Any],
        read_only: bool = False,
        isolation_level: str | None = None,
        demand: ReplicaDemand | None = None,
    ) -> None:
        self._side = side
        self._tenant = tenant
        self._operator = operator
        self._options = options
        self._read_only = read_only
        self._isolation_level = isolation_level
        self._demand = demand
        self._reads: ReplicaReads | None = None
        self._entry: Entry | None = None
        self._session: TenantSession | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"no session is open yet, so it has no {name!r}; use: with tenancy.sync.session() as session: ...",
            name=name,
            obj=self,
        )

    def __enter__(self) -> TenantSession:
        entry, engine = self._side.lease(self._tenant, operator=self._operator)
        try:
            session_class = session_class_in(self._options, "session_class")
            if self._demand is not None:
                self._reads = self._side.replica_reads(entry, self._demand)
            session = session_class(
                engine.variant(reading=self._read_only, isolation_level=self._isolation_level)
                if self._reads is None
                else self._side.replica_engine(self._reads, engine, self._isolation_level),
                **checked_options(entry, self._options, read_only=self._read_only),
            )
            admit(session)
        except BaseException:
            self._side.release(entry)
            raise
        self._entry, self._session = entry, session
        return session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, entry = self._session, self._entry
        if session is None or entry is None:
            return
        if kind is not None and self._side.hops.is_forked:
            return  # as ``SessionContext``
        if session.in_transaction():
            self._side.hops.threads.check()
        self._session = self._entry = None
        unwritten = session.unwritten() if kind is None and self._read_only else None
        try:
            session.close()
        finally:
            session.ended = True
            if self._reads is not None:
                self._side.hops.post(self._reads.close)
            self._side.release(entry)
        if unwritten is not None:
            raise unwritten


class EachTenant(TenantInTurn):
    """An iterator over tenants that binds each in turn."""

    def __init__(self, hops: Hops, source: AsyncIterator[Tenant]) -> None:
        super().__init__()
        self._hops = hops
        self._source = source

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Tenant:
        """Bind and return the next tenant.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, which this would replace.
        """
        self.between()
        tenant = self._hops.run_async(_next, self._source)
        if tenant is None:
            raise StopIteration
        return self.bind_next(tenant)


class EachAnswer:
    """An iterator over the answers of many tenants. Leaving the loop early cancels the queries under way."""

    def __init__(self, hops: Hops, query: FleetQuery) -> None:
        self._hops = hops
        self._query = query

    @property
    def failures(self) -> tuple[QueryFailure, ...]:
        """The failures so far."""
        return self._query.failures

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> TenantRows:
        """Return the next answer.

        Raises:
            FleetQueryError: all tenants have been asked, and some failed.
            CrossTenantError: a tenant is bound.
        """
        answer: TenantRows | None = self._hops.run_async(_next, self._query)
        if answer is None:
            raise StopIteration
        return answer

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel the queries under way, and wait until their connections are returned."""
        self._hops.run_async(self._query.aclose)

    def __del__(self) -> None:
        """Cancel the queries under way when the loop is left."""
        self._hops.post(self._query.stop)


async def _next(source: AsyncIterator[T]) -> T | None:
    return await anext(source, None)


__all__ = ["EachAnswer", "EachTenant", "ThreadSession"]
