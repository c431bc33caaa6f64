"""Functions that take their tenant along, into threads, executors and callbacks: see ``Tenancy.wrap``."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, Self

from .context import current_tenant, current_tenant_or_none, refuse_other_tenant, reset_current, set_current
from .correlation import current_labels, reset_labels, set_labels
from .errors import ConfigurationError, ControlUnavailableError, CrossTenantError, WrongEventLoopError
from .lifetime import Lifetime
from .registry.lifecycle import check_usable
from .scopes import resolve
from .tenant import Tenant, TenantRef

_LOOK_UP_SECONDS = 30.0  # longer than the look-up's own time-outs: an event loop that was stopped never answers


class Binding:
    """The tenant that a wrapped function runs for: the one that is bound when this is made, or the one named.

    Args:
        lifetime: The parts of the ``Tenancy``, for the look-up of a tenant that is named.
        tenant: The tenant that is named, or None for the bound one.

    Raises:
        NoTenantError: none is named and none is bound.
        CrossTenantError: another one is bound.
        AdmissionEndedError, TenantUnavailableError: the request's admission is no longer valid.
    """

    __slots__ = ("_captured", "_labels", "_lifetime", "_named")

    def __init__(self, lifetime: Lifetime, tenant: TenantRef | None) -> None:
        if tenant is not None:
            refuse_other_tenant(tenant)
        self._lifetime = lifetime
        # a name adds nothing to what is bound, and would lose the request's admission
        self._captured = current_tenant() if tenant is None else current_tenant_or_none()
        self._named = tenant
        self._labels = current_labels() if self._captured is not None else None

    async def find(self) -> Tenant:
        """Return the tenant, once it is certain that it may be used now.

        Raises:
            AdmissionEndedError, TenantUnavailableError, TenantNotFoundError: it may not.
            CrossTenantError: another one is bound here.
        """
        return await self._look_up() if self._captured is None else self._admitted(self._captured)

    def find_in_thread(self) -> Tenant:
        """Return the tenant as ``find`` does; wait for the look-up of one that is named.

        Raises:
            ConfigurationError: this is the event loop's own thread, which cannot wait for it.
            WrongEventLoopError: the event loop does not run.
        """
        if self._captured is not None:
            return self._admitted(self._captured)
        loop = self._lifetime.loop
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            raise ConfigurationError(
                "a plain function that is wrapped for a named tenant looks the tenant up when it is called, and the "
                "event loop's own thread cannot wait for that; wrap a coroutine function, or wrap it within "
                "tenancy.scope(...) and name no tenant"
            )
        if not loop.is_running():
            raise WrongEventLoopError
        looking = asyncio.run_coroutine_threadsafe(self._look_up(), loop)
        try:
            return looking.result(_LOOK_UP_SECONDS)
        except TimeoutError:
            looking.cancel()
            raise ControlUnavailableError("the event loop of this Tenancy does not answer") from None

    @contextmanager
    def bound(self, tenant: Tenant) -> Iterator[None]:
        """Bind the tenant for the body, with the id of its request.

        Where the tenant is bound already, nothing that is refused here becomes possible.

        Raises:
            CrossTenantError: another one is bound here.
        """
        here = current_tenant_or_none()
        if here is not None:
            if here.id != tenant.id:
                raise CrossTenantError("calling a wrapped function", bound=here.slug, requested=tenant.slug)
            admission = tenant.admission if here.admission is None else here.admission
            tenant = replace(tenant, admission=admission, operator=tenant.operator and here.operator)
        token = set_current(tenant)
        labelled = set_labels(current_labels() or self._labels)
        try:
            yield
        finally:
            reset_labels(labelled)
            reset_current(token)

    @staticmethod
    def _admitted(tenant: Tenant) -> Tenant:
        if tenant.admission is not None:
            tenant.admission.check()
        return tenant

    async def _look_up(self) -> Tenant:
        tenant = await resolve(self._lifetime.parts.directory, self._named)
        check_usable(tenant)
        return tenant


class WrappedFunction:
    """A plain function that runs with its tenant bound; it has the attributes of the function.

    Args:
        func: The function.
        binding: Its tenant.
    """

    def __init__(self, func: Callable[..., Any], binding: Binding) -> None:
        functools.update_wrapper(self, func)
        # after the function's own attributes: it may be one of these itself
        self._func = func
        self._binding = binding

    def __repr__(self) -> str:
        """Name the function."""
        return f"<wrapped {self._func!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function. A coroutine that it returns runs with the tenant bound as well.

        Raises:
            ConfigurationError: it returns a generator.
            TenancyError: the tenant may not be used now; and whatever the function raises.
        """
        binding = self._binding
        tenant = binding.find_in_thread()
        with binding.bound(tenant):
            outcome = self._func(*args, **kwargs)
        if inspect.iscoroutine(outcome):
            return _finish(binding, outcome)
        if inspect.isgenerator(outcome) or inspect.isasyncgen(outcome):
            raise _no_generators()
        return outcome

    def __copy__(self) -> Self:
        """Return itself, as a function does."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Return itself, as a function does."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: neither the admission nor an open ``Tenancy`` goes to another process.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"{self!r} cannot be sent to another process; send the tenant's id, and bind it there: "
            "each process opens a Tenancy of its own"
        )


def wrap(func: Any, binding: Binding) -> Callable[..., Any]:
    """Return ``func`` bound to a tenant: a coroutine function for a coroutine function, else a ``WrappedFunction``.

    Raises:
        ConfigurationError: it cannot be called, or its body would run after the call: a generator function.
    """
    if inspect.iscoroutine(func):
        func.close()
        raise ConfigurationError("wrap takes the function, and not the coroutine that a call of it returns")
    if not callable(func):
        raise ConfigurationError(f"wrap takes a function, not {type(func).__name__}")
    looked_at = [func] if isinstance(func, type) else [func, type(func).__call__]
    if any(inspect.isgeneratorfunction(found) or inspect.isasyncgenfunction(found) for found in looked_at):
        raise _no_generators()
    if not any(inspect.iscoroutinefunction(found) for found in looked_at):
        return WrappedFunction(func, binding)

    @functools.wraps(func)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        with binding.bound(await binding.find()):
            return await func(*args, **kwargs)

    return wrapped


async def _finish(binding: Binding, coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        tenant = await binding.find()
    except BaseException:
        coroutine.close()
        raise
    with binding.bound(tenant):
        return await coroutine


def _no_generators() -> ConfigurationError:
    return ConfigurationError(
        "a generator cannot be wrapped, since its body runs later, wherever it is iterated; wrap the function that "
        "iterates it"
    )


__all__ = ["Binding", "WrappedFunction", "wrap"]
