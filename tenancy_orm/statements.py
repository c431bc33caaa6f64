"""One statement on a tenant's database, without a session of the caller's: ``tenancy.fetch_all`` and its like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Executable, text

from .lifetime import Lifetime
from .routing.direct import Answer, AnyRow, run_alone
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
        self, sql: str | Executable, parameters: Mapping[str, Any] | None, tenant: TenantRef | None, operator: bool
    ) -> list[AnyRow]:
        """Return all rows of a statement that only reads."""
        answer = await self._alone(sql, parameters, tenant, operator)
        if answer is not None:
            return answer.rows
        async with self._session(tenant, operator, read_only=True) as session:
            return list((await session.execute(_executable(sql), dict(parameters or {}))).all())

    async def fetch_one(
        self, sql: str | Executable, parameters: Mapping[str, Any] | None, tenant: TenantRef | None, operator: bool
    ) -> AnyRow | None:
        """Return its first row, or None."""
        answer = await self._alone(sql, parameters, tenant, operator, first_row=True)
        if answer is not None:
            return next(iter(answer.rows), None)
        async with self._session(tenant, operator, read_only=True) as session:
            return (await session.execute(_executable(sql), dict(parameters or {}))).first()

    async def fetch_value(
        self, sql: str | Executable, parameters: Mapping[str, Any] | None, tenant: TenantRef | None, operator: bool
    ) -> Any:
        """Return the first column of its first row, or None."""
        answer = await self._alone(sql, parameters, tenant, operator, first_row=True)
        if answer is not None:
            return answer.value
        async with self._session(tenant, operator, read_only=True) as session:
            return await session.scalar(_executable(sql), dict(parameters or {}))

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
        first_row: bool = False,
    ) -> Answer | None:
        if not isinstance(sql, str):
            return None
        parts = self._lifetime.parts
        tenant = peek(parts.directory, ref) or await resolve(parts.directory, ref)
        check_session(tenant, operator=operator)
        return await run_alone(
            parts.router, tenant, sql, {} if parameters is None else parameters, writing=writing, first_row=first_row
        )

    def _session(self, tenant: TenantRef | None, operator: bool, *, read_only: bool = False) -> ResolvedSession:
        parts = self._lifetime.parts
        return ResolvedSession(
            parts.directory, parts.router, tenant, operator=operator, options={"read_only": read_only}
        )


def _executable(sql: str | Executable) -> Executable:
    return text(sql) if isinstance(sql, str) else sql


__all__ = ["Statements"]
