"""What is said about requests that wait for a connection to one server, or are refused one: events and errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from ..errors import CheckoutRefusedError, CheckoutTimeoutError, TenancyError
from ..events import CheckoutDelayed, CheckoutRefused, CheckoutTimedOut, EventBus, TenantEvent
from .budget import Budget
from .queue import Refusal
from .shares import Account

LOOK_SECONDS: Final = 0.1
"""How often the budget looks at who waits, while somebody does."""

DELAY_SECONDS: Final = 0.1
"""How long a request waits before that is an event."""

EVENT_SECONDS: Final = 1.0
"""How often an event of one kind is emitted for one tenant, at most."""

_REMEMBERED = 1_000  # tenants and kinds of events; above that, the old ones are forgotten


class WaitRefusedError(Exception):
    """Ends the wait of a request that cannot be served before its deadline."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(slots=True)
class _Rate:
    emitted_at: float
    more: int = 0  # since then


class Contention:
    """Looks after those that wait, while some do, and tells of it.

    Args:
        server: The server's name.
        budget: Its budget.
        events: Receives events.
        explain: Says which setting to change where the budget's limit, which it is given, is too small.
        in_vain: Returns the error for the requests of a tenant (its slug), if none can be served for now.
    """

    def __init__(
        self,
        server: str,
        budget: Budget[Any],
        events: EventBus,
        *,
        explain: Callable[[int], str] = lambda _: "pool.max_connections",
        in_vain: Callable[[str], TenancyError | None] = lambda _: None,
    ) -> None:
        self._explain = explain
        self._in_vain = in_vain
        self._server = server
        self._budget = budget
        self._events = events
        self._rates: dict[tuple[type[TenantEvent], UUID], _Rate] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Look every ``LOOK_SECONDS``, as long as somebody waits."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._in_vain("") is not None:
            for share, waiter in self._budget.dismiss():
                if (error := self._in_vain(share.account.slug)) is not None:
                    waiter.set_exception(error)
        for _, waiter, refusal in self._budget.look():
            waiter.set_exception(WaitRefusedError(refusal))
        if self._budget.has_waiters:
            self.begin()

    # --- events -----------------------------------------------------------------------------------------------------

    def delayed(self, account: Account, seconds: float, waiting_for: str) -> None:
        """Emit that a request has waited and was served."""
        if seconds >= DELAY_SECONDS and (requests := self._due(CheckoutDelayed, account)):
            self._events.emit(
                CheckoutDelayed(
                    tenant_id=account.tenant_id,
                    slug=account.slug,
                    server=self._server,
                    seconds=seconds,
                    waiting_for=waiting_for,
                    requests=requests,
                )
            )

    def timed_out(self, account: Account, seconds: float) -> None:
        """Count and emit that a request has waited in vain."""
        self._budget.timed_out += 1
        if requests := self._due(CheckoutTimedOut, account):
            self._events.emit(
                CheckoutTimedOut(
                    tenant_id=account.tenant_id,
                    slug=account.slug,
                    server=self._server,
                    seconds=seconds,
                    waiting_for=self._budget.reason(account),
                    requests=requests,
                )
            )

    def refused(self, account: Account, refusal: Refusal) -> None:
        """Emit that a request was refused at once; the budget has counted it."""
        if requests := self._due(CheckoutRefused, account):
            self._events.emit(
                CheckoutRefused(
                    tenant_id=account.tenant_id,
                    slug=account.slug,
                    server=self._server,
                    reason=refusal.reason,
                    seconds=refusal.seconds,
                    retry_after=refusal.retry_after,
                    waiting_for=self._budget.reason(account),
                    requests=requests,
                )
            )

    def _due(self, kind: type[TenantEvent], account: Account) -> int:
        """How many requests the event stands for, this one included; 0 if it is not due, or nobody subscribes."""
        if not self._events.has_subscribers(kind):
            return 0
        now, key = time.monotonic(), (kind, account.tenant_id)
        rate = self._rates.get(key)
        if rate is not None and now - rate.emitted_at < EVENT_SECONDS:
            rate.more += 1
            return 0
        if len(self._rates) >= _REMEMBERED:
            before = now - EVENT_SECONDS
            self._rates = {key: rate for key, rate in self._rates.items() if rate.emitted_at > before}
        self._rates[key] = _Rate(now)
        return 1 if rate is None else 1 + rate.more

    # --- errors -----------------------------------------------------------------------------------------------------

    def timeout_error(self, account: Account, timeout: float) -> CheckoutTimeoutError:
        """Return the error for a request that has waited in vain, with the limit that was met."""
        limit, setting = self._limit_of(account)
        return CheckoutTimeoutError(
            server=self._server, tenant=account.slug, timeout=timeout, limit=limit, setting=setting
        )

    def refused_error(self, account: Account, refusal: Refusal, timeout: float) -> CheckoutRefusedError:
        """Return the error for a request that is refused at once."""
        limit, setting = self._limit_of(account)
        return CheckoutRefusedError(
            server=self._server,
            tenant=account.slug,
            timeout=timeout,
            limit=limit,
            setting=setting,
            reason=refusal.reason,
            expected=refusal.seconds,
            left=refusal.left,
            waiting=account.queued,
            retry_after=refusal.retry_after,
        )

    def _limit_of(self, account: Account) -> tuple[int, str]:
        if account.open < account.limit:
            return self._budget.limit, self._explain(self._budget.limit)
        if account.limit < self._budget.per_tenant:
            return account.limit, f"connection_limit of tier {account.tier!r}"
        return account.limit, "pool.max_connections_per_tenant"


__all__ = ["DELAY_SECONDS", "EVENT_SECONDS", "LOOK_SECONDS", "Contention", "WaitRefusedError"]
