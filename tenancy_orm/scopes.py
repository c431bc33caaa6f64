"""What code runs within: a session on the tenant that is named or bound, and a loop that binds each tenant in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncSession

from .authentication.directory import Directory
from .context import current_tenant_or_none, refuse_while_bound, set_current
from .errors import NoTenantError
from .registry.lifecycle import check_usable
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
    if ref is not None:
        return await directory.tenant(ref)
    bound = current_tenant_or_none()
    if bound is None:
        raise NoTenantError
    return await directory.tenant(bound.id)


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

    async def __aenter__(self) -> AsyncSession:
        tenant = await resolve(self._directory, self._tenant)
        bound = current_tenant_or_none()
        check_usable(tenant, operator=self._operator or (bound is not None and bound.operator))
        self._inner = self._router.session(tenant, **self._options)
        session = await self._inner.__aenter__()
        if bound is not None and bound.admission is not None:
            session.sync_session.admission = bound.admission  # type: ignore[attr-defined]
        return session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._inner is None:
            return None
        return await self._inner.__aexit__(kind, error, traceback)


class BoundTenants:
    """An iterator over tenants that binds each in turn.

    An ``async for`` tells its iterator nothing when the loop is left early. This is a plain object, so that CPython
    finalises it right there, in the same context, and the binding ends with the loop; an async generator would be
    closed later, elsewhere.
    """

    def __init__(self, source: AsyncIterator[Tenant]) -> None:
        refuse_while_bound("iterating over the fleet")
        self._source = source
        self._bound: Tenant | None = None

    def __aiter__(self) -> Self:
        """Return itself."""
        return self

    async def __anext__(self) -> Tenant:
        """Bind and return the next tenant.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, which this would replace.
        """
        self.release()
        refuse_while_bound("iterating over the fleet")
        tenant = await anext(self._source)
        set_current(tenant)
        self._bound = tenant
        return tenant

    def release(self) -> None:
        """End the binding of the tenant returned last, if it is in force here."""
        if self._bound is not None and current_tenant_or_none() is self._bound:
            set_current(None)
        self._bound = None

    def __del__(self) -> None:
        """End the binding when the loop is left."""
        self.release()


__all__ = ["BoundTenants", "ResolvedSession", "resolve"]
