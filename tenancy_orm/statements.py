"""One statement on a tenant's database, without a session of the caller's: ``tenancy.fetch_all`` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Executable, Result, text
from sqlalchemy.exc import DBAPIError

from .lifetime import Lifetime
from .routing.direct import Answer, AnyRow, run_alone
from .routing.replicas import ReplicaDemand, can_repeat
from .scopes import ResolvedSession, check_session, peek, resolve
from .tenant import TenantRef


class Statements:
    """Runs one statement, in one round trip where that is possible, in a session where it is not.

    Args:
        lifetime: The parts of the ``Tenancy``.
    """

    __slots__ = ("_lifetime",)

    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime

    async def fetch_all(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        tenant: TenantRef | None,
        operator: bool,
        demand: ReplicaDemand | None = None,
    ) -> list[AnyRow]:
        """Return all rows of a statement that only reads."""
        answer = await self._alone(sql, parameters, tenant, operator, demand=demand)
        if answer is not None:
            return answer.rows
        return list(await self._read(sql, parameters, tenant, operator, demand, Result.all))

    async def fetch_one(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        tenant: TenantRef | None,
        operator: bool,
        demand: ReplicaDemand | None = None,
    ) -> AnyRow | None:
        """Return its first row, or None."""
        answer = await self._alone(sql, parameters, tenant, operator, demand=demand, first_row=True)
        if answer is not None:
            return next(iter(answer.rows), None)
        found: AnyRow | None = await self._read(sql, parameters, tenant, operator, demand, Result.first)
        return found

    async def fetch_value(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        tenant: TenantRef | None,
        operator: bool,
        demand: ReplicaDemand | None = None,
    ) -> Any:
        """Return the first column of its first row, or None."""
        answer = await self._alone(sql, parameters, tenant, operator, demand=demand, first_row=True)
        if answer is not None:
            return answer.value
        return await self._read(sql, parameters, tenant, operator, demand, Result.scalar)

    async def execute(
        self, sql: str | Executable, parameters: Mapping[str, Any] | None, tenant: TenantRef | None, operator: bool
    ) -> int:
        """Run a statement, commit, and return how many rows it concerned."""
        answer = await self._alone(sql, parameters, tenant, operator, writing=True)
        if answer is not None:
            return answer.row_count
        async with self._session(tenant, operator) as session, session.begin():
            result: Any = await (await session.connection()).execute(
                _executable(sql), dict(parameters or {}), execution_options={"preserve_rowcount": True}
            )
            return int(result.rowcount)

    async def _alone(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        ref: TenantRef | None,
        operator: bool,
        *,
        writing: bool = False,
        demand: ReplicaDemand | None = None,
        first_row: bool = False,
    ) -> Answer | None:
        if not isinstance(sql, str):
            return None
        parts = self._lifetime.parts
        tenant = peek(parts.directory, ref) or await resolve(parts.directory, ref)
        check_session(tenant, operator=operator)
        return await run_alone(
            parts.router,
            tenant,
            sql,
            {} if parameters is None else parameters,
            writing=writing,
            demand=demand,
            first_row=first_row,
        )

    async def _read(
        self,
        sql: str | Executable,
        parameters: Mapping[str, Any] | None,
        tenant: TenantRef | None,
        operator: bool,
        demand: ReplicaDemand | None,
        take: Callable[[Result[Any]], Any],
    ) -> Any:
        """Read in a session; again where a replica has ended the statement, or is gone."""
        async with self._session(tenant, operator, read_only=True, replica=demand) as session:
            while True:
                try:
                    return take(await session.execute(_executable(sql), dict(parameters or {})))
                except DBAPIError as exc:
                    if not can_repeat(session.sync_session.bind, exc):
                        raise
                    await session.rollback()

    def _session(self, tenant: TenantRef | None, operator: bool, **options: Any) -> ResolvedSession:
        parts = self._lifetime.parts
        return ResolvedSession(parts.directory, parts.router, tenant, operator=operator, options=options)


def _executable(sql: str | Executable) -> Executable:
    return text(sql) if isinstance(sql, str) else sql


__all__ = ["Statements"]
