"""Usage of quotas, as ``QuotaManager`` returns it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from ..config.tiers import Period


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has used of one resource in the current period.

    ``limit`` is None where there is none; ``resets_at`` (UTC) is None where the period does not end.
    """

    resource: str
    used: int
    limit: int | None
    period: Period
    resets_at: datetime | None = None

    @property
    def remaining(self) -> int | None:
        """How much is left, at least 0; None without a limit."""
        return None if self.limit is None else max(self.limit - self.used, 0)

    @property
    def fraction(self) -> float:
        """The used fraction of the limit; 0 without a limit, infinite where the limit is 0 and something is used."""
        if self.limit is None or self.used == 0:
            return 0.0
        return self.used / self.limit if self.limit else math.inf


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """A tenant's usage of one limit; ``fraction`` may be above 1 where the limit was lowered."""

    tenant_id: UUID
    slug: str
    tier: str
    fraction: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class Remaining:
    """The answer of ``check``: true where ``requested`` more would fit."""

    usage: Usage
    requested: int

    @property
    def allowed(self) -> bool:
        """Whether ``requested`` more would fit."""
        return self.usage.limit is None or self.usage.used + self.requested <= self.usage.limit

    def __bool__(self) -> bool:
        """The same as ``allowed``."""
        return self.allowed


__all__ = ["Remaining", "TenantUsage", "Usage"]
