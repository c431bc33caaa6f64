"""The current tenant: one context variable that holds a frozen identity, and nothing else.

Tasks and ``asyncio.to_thread`` inherit the binding of the code that starts them; plain threads and executors do not.
Only the edge of the package reads this variable; every function below ``tenancy.py`` takes the tenant as an argument.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token, copy_context
from dataclasses import replace
from typing import Any, TypeVar
from uuid import UUID

from .errors import CrossTenantError, NoTenantError
from .tenant import Tenant, parse_id

T = TypeVar("T")

_current: ContextVar[Tenant | None] = ContextVar("tenancy_orm.tenant", default=None)


def current_tenant() -> Tenant:
    """Return the tenant this code runs for.

    Raises:
        NoTenantError: none is bound.
    """
    tenant = _current.get()
    if tenant is None:
        raise NoTenantError
    return tenant


def current_tenant_or_none() -> Tenant | None:
    """Return the tenant this code runs for, or None."""
    return _current.get()


def set_current(tenant: Tenant | None) -> Token[Tenant | None]:
    """Bind ``tenant`` (None: no tenant) for the rest of this context, whatever was bound: for the start of a request.

    The middleware calls this on every request, since uvicorn on asyncio's stock loop lets a value set during one
    request of a keep-alive connection be seen by the next (Kludex/uvicorn#2167).
    """
    if tenant is not None:
        close_generators_unbound()
    return _current.set(tenant)


def reset_current(token: Token[Tenant | None]) -> None:
    """Undo ``set_current``; in another context, which never had the binding, do nothing."""
    reset_variable(_current, token)


def reset_variable(variable: ContextVar[T], token: Token[T]) -> None:
    """Undo the ``set`` of a variable.

    Does nothing in another context than that of the ``set``, which never had the value: the event loop may close an
    async generator in one.
    """
    try:  # noqa: SIM105 - contextlib.suppress costs 0.4 us, and this runs with every message of every request
        variable.reset(token)
    except ValueError:
        pass


@contextmanager
def bind(tenant: Tenant) -> Iterator[Tenant]:
    """Run the body with ``tenant`` bound. The tenant that is bound already may be bound again; another is refused.

    Raises:
        CrossTenantError: another tenant is bound.
    """
    bound = _current.get()
    if bound is not None and bound.id != tenant.id:
        raise CrossTenantError("switching the scope", bound=bound.slug, requested=tenant.slug)
    if bound is not None and tenant.admission is not bound.admission:
        # a scope inside a request is valid for as long as the request's admission
        tenant = replace(tenant, admission=bound.admission)
    close_generators_unbound()
    token = _current.set(tenant)
    try:
        yield tenant
    finally:
        reset_current(token)


def as_reference(ref: str | UUID | Tenant) -> UUID | str:
    """Return the id, or else the slug or domain, in a reference to a tenant. Every room reads references by this."""
    if isinstance(ref, Tenant):
        return ref.id
    if isinstance(ref, UUID):
        return ref
    return parse_id(ref) or ref


def refuse_other_tenant(ref: str | UUID | Tenant) -> None:
    """Refuse a reference to another tenant than the bound one; where no tenant is bound, nothing is refused.

    An id or a slug that came with a request must not reach another tenant, whatever is done with it (CWE-639).
    The bound tenant's names pass as they were when it was bound: check the tenant that is found by one as well.

    Raises:
        CrossTenantError: another tenant is bound.
        AdmissionEndedError, TenantUnavailableError: the request's admission is no longer valid.
    """
    bound = _current.get()
    if bound is None:
        return
    named = as_reference(ref)
    if named != bound.id and named != bound.slug and named not in bound.aliases:
        requested = ref.slug if isinstance(ref, Tenant) else str(ref)
        raise CrossTenantError("naming a tenant", bound=bound.slug, requested=requested)
    if bound.admission is not None:
        bound.admission.check()


def refuse_while_bound(what: str) -> None:
    """Refuse work over the whole fleet while a tenant is bound: that is for operators, who run with none bound.

    Args:
        what: What is refused, for the error: "listing tenants".

    Raises:
        CrossTenantError: a tenant is bound.
    """
    bound = _current.get()
    if bound is not None:
        raise CrossTenantError(what, bound=bound.slug, requested=None)


class TenantInTurn:
    """The binding of a loop over tenants.

    Args:
        what: What the loop does, for the error where a tenant is bound already: "iterating over the fleet".
    """

    def __init__(self, what: str = "iterating over the fleet") -> None:
        self._bound: Tenant | None = None  # first: ``__del__`` reads it
        self._what = what
        refuse_while_bound(what)

    def bind_next(self, tenant: Tenant) -> Tenant:
        """Bind the next tenant, once the binding of the one before it has ended.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound(self._what)
        set_current(tenant)
        self._bound = tenant
        return tenant

    def release(self) -> None:
        """End the binding of the tenant returned last, if it is in force here."""
        if self._bound is not None and _current.get() is self._bound:
            set_current(None)
        self._bound = None

    def between(self) -> None:
        """End the binding before the next tenant is fetched.

        Raises:
            CrossTenantError: the body has bound a tenant of its own, which the next would replace.
        """
        self.release()
        refuse_while_bound(self._what)

    def __del__(self) -> None:
        """End the binding when the loop is left."""
        self.release()


async def run_unbound(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` with no tenant bound, and otherwise in the caller's context; cancelling the caller cancels it.

    For administrative work on a tenant, once it is certain that it is the bound one.
    """
    context = copy_context()
    context.run(_current.set, None)
    return await asyncio.get_running_loop().create_task(work, context=context)


class _UnboundFinalizer:
    """A finalizer of async generators that closes an abandoned one with no tenant bound."""

    __slots__ = ("_finalizer",)

    def __init__(self, finalizer: Callable[[AsyncGenerator[Any, Any]], None]) -> None:
        self._finalizer = finalizer

    def __call__(self, generator: AsyncGenerator[Any, Any]) -> None:
        token = _current.set(None)
        try:
            self._finalizer(generator)
        finally:
            reset_current(token)


def close_generators_unbound() -> None:
    """Have abandoned async generators run their ``finally`` with no tenant bound, rather than with another tenant's.

    The garbage collector may find such a generator while any request runs, and the event loop then closes it in a task
    with a copy of *that* request's context. The event loop sets its hook again whenever it starts to run, so this is
    called with every binding, and by the middleware with every look-up of a key.
    """
    finalizer = sys.get_asyncgen_hooks().finalizer
    if finalizer is not None and type(finalizer) is not _UnboundFinalizer:
        sys.set_asyncgen_hooks(finalizer=_UnboundFinalizer(finalizer))
