"""Request rates: a token bucket per tenant, and per address of visitors, in the process.

The generic cell rate algorithm (GCRA) stores a bucket as the time at which it will be full again, at the rate of its
last use; a full bucket needs no entry. It is written out here, in a dozen lines, since it runs on every request: a
library with storages and strategies costs tens of microseconds where this costs one. It counts in this process only:
set ``processes`` where several share a tenant's rate. For a limit that is exact over all processes, use a quota.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from uuid import UUID

from ..config import Tier
from ..context import _current, refuse_while_bound
from ..errors import CrossTenantError
from ..keys.networks import source_group
from ..loops import HomeLoop
from ..tenant import Tenant
from .overrides import REQUEST_RATE

_SWEEP_AT: Final = 10_000  # buckets


class Allowed(NamedTuple):
    """The request is within the rate.

    ``limit`` is how many requests may come at once, ``remaining`` how many still may (None: no limit), and ``reset``
    the number of seconds until ``limit`` may come again.
    """

    limit: int | None
    remaining: int | None
    reset: float

    @property
    def allowed(self) -> bool:
        """True."""
        return True


class Denied(NamedTuple):
    """The request is above the rate: repeat it after ``retry_after`` seconds. See ``Allowed`` for the other fields."""

    retry_after: float
    limit: int
    remaining: int
    reset: float

    @property
    def allowed(self) -> bool:
        """False."""
        return False


UNLIMITED: Final = Allowed(None, None, 0.0)


class Rates:
    """Limits how many requests a second each tenant may make; ``tenancy.internals.rates``.

    Args:
        tiers: The configured tiers. ``Tier.requests_per_second`` applies unless the tenant's own quotas override it.
        processes: How many processes share each tenant's rate.
        address_rate: How many requests without a tenant's credential each address may make a second; None: no limit.
            Not divided by ``processes``: a visitor's few connections may all be to one process.
        burst_seconds: How many seconds' worth of requests may come at once.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        tiers: Mapping[str, Tier],
        *,
        processes: int = 1,
        address_rate: float | None = None,
        burst_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if processes < 1 or burst_seconds <= 0:
            raise ValueError("processes must be at least 1 and burst_seconds above 0")
        self._tiers = tiers
        self._unlimited = frozenset(name for name, tier in tiers.items() if tier.requests_per_second is None)
        self._share = 1.0 / processes
        self._address_rate = address_rate
        self._burst_seconds = burst_seconds
        self._clock = clock
        self.home: HomeLoop | None = None  # of the open Tenancy that this belongs to
        # when each bucket is full again, and at which rate; an entry with a time in the past can be dropped at any time
        self._buckets: dict[UUID | str, tuple[float, float]] = {}
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        """How many buckets are stored."""
        return len(self._buckets)

    def rate(self, tenant: Tenant) -> float | None:
        """Return how many requests a second this process admits for ``tenant``; None without a limit."""
        rate = tenant.quotas.get(REQUEST_RATE)
        if rate is None:
            tier = self._tiers.get(tenant.tier)
            rate = None if tier is None else tier.requests_per_second
        return None if rate is None else rate * self._share

    def acquire(self, tenant: Tenant, cost: int = 1) -> Allowed | Denied:
        """Take ``cost`` tokens from the tenant's bucket, or none. Never waits.

        Raises:
            CrossTenantError: another tenant is bound.
            WrongEventLoopError: this is another thread than that of the open ``Tenancy``.
        """
        # written out here: it runs on every request
        if (bound := _current.get()) is not None and bound.id != tenant.id:
            raise CrossTenantError("counting a request", bound=bound.slug, requested=tenant.slug)
        if not tenant.quotas and tenant.tier in self._unlimited:
            return UNLIMITED  # the common case, without a further call
        rate = self.rate(tenant)
        if rate is None:
            return UNLIMITED
        return self._take(tenant.id, rate, cost)

    def acquire_address(self, source: str | None) -> Allowed | Denied:
        """Take a token from the bucket of the network that an address belongs to. Never waits.

        Args:
            source: The peer's address; those without one share a bucket.
        """
        rate = self._address_rate
        return UNLIMITED if rate is None else self._take("" if source is None else source_group(source), rate, 1)

    def forget(self) -> None:
        """Fill every bucket: for tests, which share a process and a tenant.

        Raises:
            CrossTenantError: a tenant is bound.
        """
        refuse_while_bound("forgetting the requests of all tenants")
        self._buckets.clear()

    def _take(self, key: UUID | str, rate: float, cost: int) -> Allowed | Denied:
        if self.home is not None:
            self.home.check_thread()
        # even the smallest rate lets one request through at a time
        burst = max(int(rate * self._burst_seconds), 1)
        interval = 1.0 / rate
        now = self._clock()
        full_at, before = self._buckets.get(key, (now, rate))
        if full_at < now:
            full_at = now
        elif before != rate:
            # as many tokens are missing as before, at most the burst; they come back at the new rate
            full_at = now + min((full_at - now) * before, burst) * interval
        after = full_at + cost * interval - now
        capacity = burst * interval
        # a millionth of a token of tolerance: rounding errors must not refuse the last token of a full bucket
        if after > capacity + interval * 1e-6:
            remaining = int((capacity - (full_at - now)) * rate + 1e-6)
            return Denied(after - capacity, burst, max(remaining, 0), full_at - now)
        self._buckets[key] = (now + after, rate)
        if len(self._buckets) > self._sweep_at:
            self._sweep(now)
        return Allowed(burst, int((capacity - after) * rate + 1e-6), after)

    def _sweep(self, now: float) -> None:
        """Drop full buckets. The next sweep comes at twice as many, so that the work per request stays small."""
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket[0] > now}
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._buckets))
