"""What moves of many tenants report: how each has ended, and what housekeeping has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOutcome:
    """How the move of one tenant ended.

    Attributes:
        slug: The tenant's.
        operation: The move's number; None where it was not begun.
        moved_from: The server that it was on.
        moved_to: The server that it is on, or was to be.
        error: Why it was not moved.
        reverse: "following" where the former database follows, so that there is a way back; else why there is none.
    """

    slug: str
    operation: int | None
    moved_from: str
    moved_to: str | None
    error: str | None = None
    reverse: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveReport:
    """What ``move_all`` or ``rebalance`` has done."""

    outcomes: tuple[MoveOutcome, ...] = ()

    @property
    def failures(self) -> tuple[MoveOutcome, ...]:
        """The tenants that were not moved."""
        return tuple(one for one in self.outcomes if one.error is not None)

    @property
    def ok(self) -> bool:
        """Whether every tenant was moved."""
        return not self.failures


class MoveProgress(Protocol):
    """Receives the progress of many moves, in the event loop that runs them."""

    def total(self, count: int) -> None:
        """Receive the number of tenants."""

    def done(self, outcome: MoveOutcome) -> None:
        """Receive the result of one tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TidyReport:
    """What housekeeping has done about moves, by the numbers of their operations; ``removed`` are things left over."""

    resumed: tuple[int, ...] = ()
    confirmed: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    removed: tuple[str, ...] = ()
    errors: tuple[str, ...] = field(default=())


__all__ = ["MoveOutcome", "MoveProgress", "MoveReport", "TidyReport"]
