"""Until when the running code would wait for a connection, and the clock of what expires."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

from .context import reset_variable
from .errors import ConfigurationError

_deadline: ContextVar[float] = ContextVar("tenancy_orm.deadline", default=math.inf)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Have the body wait for connections for so many seconds from now on, and no longer.

    ``with deadline(0.5): ...``, in asynchronous and in synchronous code. A session in the body that gets no connection
    until then raises ``CheckoutTimeoutError``; one that cannot get one until then raises ``CheckoutRefusedError`` at
    once. It bounds no statement, and nothing that has a connection. Within another ``deadline`` the sooner one counts,
    and ``pool.checkout_timeout`` always does. It holds in tasks that are started in the body, too.

    Args:
        seconds: How long the body would wait, for all its checkouts together; above 0.

    Raises:
        ConfigurationError: ``seconds`` is not above 0.
    """
    token = set_deadline(check_deadline(seconds))
    try:
        yield
    finally:
        reset_deadline(token)


def check_deadline(seconds: object) -> float:
    """Return a number of seconds.

    Raises:
        ConfigurationError: it is not above 0.
    """
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
        raise ConfigurationError(f"a deadline must be a number of seconds above 0, not {seconds!r}")
    return seconds


def set_deadline(seconds: float) -> Token[float]:
    """Set the deadline of this context, unless a sooner one is set."""
    return _deadline.set(min(_deadline.get(), time.monotonic() + seconds))


def reset_deadline(token: Token[float]) -> None:
    """Undo ``set_deadline``; in another context, which never had it, do nothing."""
    reset_variable(_deadline, token)


def current_deadline() -> float:
    """Return until when the running code would wait (``time.monotonic()``); infinity where no ``deadline`` is set."""
    return _deadline.get()


def clock() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


__all__ = ["check_deadline", "clock", "current_deadline", "deadline", "reset_deadline", "set_deadline"]
