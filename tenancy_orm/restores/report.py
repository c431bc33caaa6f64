"""What a restore reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from uuid import UUID

RestoreStep = Literal["making", "upgrading", "inspect", "switching", "switched"]
"""The steps of a restore, as its operation names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """How a restore has ended.

    Attributes:
        operation: The operation's number; None where another tenant was made.
        tenant_id: The tenant.
        slug: Its slug.
        state: "done"; or "waiting", where it was stopped before the swap.
        server: The server's name.
        database: The restored database.
        replaced: The database that was in use before; None where another tenant was made, or nothing was swapped.
        kept_until: When the replaced one is dropped.
        revision: The revision of the restored database, after missing ones have run.
        differences: How the restored schema differs from what its revision makes.
        left_out: What was not restored, as ``pg_restore`` lists it.
        api_key: The key of another tenant that was made; it is shown once.
        seconds: How long it took.
        pause_seconds: How long the tenant's sessions waited.
    """

    operation: int | None
    tenant_id: UUID
    slug: str
    state: Literal["done", "waiting"]
    server: str
    database: str
    replaced: str | None = None
    kept_until: datetime | None = None
    revision: str | None = None
    differences: Sequence[str] = ()
    left_out: Sequence[str] = ()
    api_key: str | None = field(default=None, repr=False)
    seconds: float = 0.0
    pause_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepReport:
    """What housekeeping has done: operations that it ended, by number; databases dropped; and what failed."""

    ended: tuple[int, ...] = ()
    dropped: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


__all__ = ["RestoreReport", "RestoreStep", "UpkeepReport"]
