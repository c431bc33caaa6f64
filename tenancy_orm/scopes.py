"""What code runs within: a session on the tenant that is named or bound, and a loop that binds each tenant in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .authentication.directory import Directory
from .context import TenantInTurn, current_tenant_or_none
from .errors import NoTenantError
from .registry.lifecycle import check_revision, check_usable
from .routing import Router
from .tenant import Tenant, TenantRef


async def resolve(directory: Directory, ref: TenantRef | None) -> Tenant:
    """The tenant that code may use now, as the directory knows it: the bound one, or the one it names.

    An ambient binding is never widened: while a tenant is bound, no other can be named.

    Raises:
        NoTenantError: none is named and none is bound.
        CrossTenantError: another tenant is bound.
        TenantNotFoundError: there is no such tenant.
    """
    return await directory.tenant(_named_or_bound(ref))


def peek(directory: Directory, ref: TenantRef | None) -> Tenant | None:
    """The tenant that ``resolve`` would return, if no look-up is needed.

    Raises:
        NoTenantError, CrossTenantError: as ``resolve``.
    """
    return directory.peek_tenant(_named_or_bound(ref))


def _named_or_bound(ref: TenantRef | None) -> TenantRef:
    if ref is not None:
        return ref
    bound = current_tenant_or_none()
    if bound is None:
        raise NoTenantError
    return bound.id


def check_session(tenant: Tenant, *, operator: bool) -> None:
    """Check that a session may be opened on a tenant now.

    Raises:
        TenantUnavailableError: its status admits no session, or its revision none of this code.
    """
    bound = current_tenant_or_none()
    check_usable(tenant, operator=operator or (bound is not None and bound.operator))
    if not operator:
        # an operator's request is served by the same code as everybody's
        check_revision(tenant)


def admit(session: Session) -> None:
    """Have a session check the admission of the request that opens it, whoever uses it later."""
    bound = current_tenant_or_none()
    if bound is not None and bound.admission is not None:
        session.admission = bound.admission  # type: ignore[attr-defined]


class ResolvedSession:
    """``async with tenancy.session()``: resolves the tenant, then is the router's session."""

    __slots__ = ("_directory", "_inner", "_operator", "_options", "_router", "_tenant")

    def __init__(
        self,
        directory: Directory,
        router: Router,
        tenant: TenantRef | None,
        *,
        operator: bool,
        options: dict[str, Any],
    ) -> None:
        self._directory = directory
        self._router = router
        self._tenant = tenant
        self._operator = operator
        self._options = options
        self._inner: AbstractAsyncContextManager[AsyncSession] | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"no session is open yet, so it has no {name!r}; use: async with tenancy.session() as session: ...",
            name=name,
            obj=self,
        )

    async def __aenter__(self) -> AsyncSession:
        tenant = await resolve(self._directory, self._tenant)
        check_session(tenant, operator=self._operator)
        self._inner = self._router.session(tenant, **self._options)
        session = await self._inner.__aenter__()
        admit(session.sync_session)
        return session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._inner is None:
            return None
        return await self._inner.__aexit__(kind, error, traceback)


class BoundTenants(TenantInTurn):
    """An iterator over tenants that binds each in turn.

    An ``async for`` tells its iterator nothing when the loop is left early. This is a plain object, so that CPython
    finalises it right there, in the same context, and the binding ends with the loop; an async generator would be
    closed later, elsewhere.
    """

    def __init__(self, source: AsyncIterator[Tenant]) -> None:
        super().__init__()
        self._source = source

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Tenant:
        """Bind and return the next tenant.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, which this would replace.
        """
        self.between()
        return self.bind_next(await anext(self._source))


__all__ = ["BoundTenants", "ResolvedSession", "admit", "check_session", "peek", "resolve"]
