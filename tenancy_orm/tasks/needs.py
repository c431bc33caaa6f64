"""What a task says of itself: that it runs for a tenant, or for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__tenancy_needs__"


def needs_tenant(function: F) -> F:
    """Mark a task that runs for a tenant: sending it with none bound is refused, and so is one that arrives without.

    Write it below the queue's own decorator.
    """
    return _mark(function, "tenant")


def needs_no_tenant(function: F) -> F:
    """Mark an operator's task, over the fleet say: sending it while a tenant is bound is refused.

    Write it below the queue's own decorator.
    """
    return _mark(function, "none")


def needs_of(function: object) -> str | None:
    """What a task's function says: "tenant", "none", or None where it says nothing."""
    return getattr(function, _ATTRIBUTE, None)


def _mark(function: F, needs: str) -> F:
    if not callable(function):
        raise ConfigurationError(f"{function!r} is not a function")
    try:
        setattr(function, _ATTRIBUTE, needs)
    except AttributeError:
        raise ConfigurationError("write needs_tenant and needs_no_tenant below the queue's decorator") from None
    return function


__all__ = ["needs_no_tenant", "needs_of", "needs_tenant"]
