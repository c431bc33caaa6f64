"""What is done with a task that arrives for a tenant that cannot be used now."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from ..errors import ConfigurationError

Answer: TypeAlias = Literal["retry", "reject", "drop"]


class Outcome(StrEnum):
    """What was done with a task that could not run.

    ``RETRY``: it is sent again later. ``REJECT``: it fails with ``TaskRefusedError``. ``DROP``: it ends, and does not
    count as failed.
    """

    RETRY = "retry"
    REJECT = "reject"
    DROP = "drop"


class Reason(StrEnum):
    """Why a task could not run. An ``ArrivalPolicy`` answers the first seven; the others are rejected."""

    PROVISIONING = "provisioning"
    REVISION = "revision"
    MAINTENANCE = "maintenance"
    SUSPENDED = "suspended"
    DELETED = "deleted"
    PURGED = "purged"
    UNAVAILABLE = "unavailable"
    FORGED = "forged"
    CROSS_TENANT = "cross-tenant"
    NO_TENANT = "no-tenant"
    TENANT_BOUND = "tenant-bound"


_ANSWERED = (
    Reason.PROVISIONING,
    Reason.REVISION,
    Reason.MAINTENANCE,
    Reason.SUSPENDED,
    Reason.DELETED,
    Reason.PURGED,
    Reason.UNAVAILABLE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalPolicy:
    """The answer to each status of a tenant in which a task cannot run: "retry", "reject" or "drop".

    Attributes:
        provisioning: Its database is being made, or its schema upgraded.
        revision: Its schema is at a revision that this code cannot work with.
        maintenance: An operator is at work on it.
        suspended: It may stay suspended for long.
        deleted: It may be restored.
        purged: It does not exist any more, and never will again.
        unavailable: The control database does not answer.
        retry_seconds: How long a task waits before it is tried again.
        retry_for_seconds: How long after it was sent a task is tried again; it is rejected from then on.
    """

    provisioning: Answer = "retry"
    revision: Answer = "retry"
    maintenance: Answer = "retry"
    suspended: Answer = "reject"
    deleted: Answer = "reject"
    purged: Answer = "drop"
    unavailable: Answer = "retry"
    retry_seconds: float = 60.0
    retry_for_seconds: float = 86_400.0

    def __post_init__(self) -> None:
        """Refuse an answer that there is not.

        Raises:
            ConfigurationError: an answer is unknown, or a time is not positive.
        """
        for reason in _ANSWERED:
            answer: object = getattr(self, reason.value)
            if answer not in list(Outcome):
                raise ConfigurationError(f"ArrivalPolicy({reason.value}={answer!r}): say 'retry', 'reject' or 'drop'")
        if self.retry_seconds <= 0 or self.retry_for_seconds <= 0:
            raise ConfigurationError("retry_seconds and retry_for_seconds of an ArrivalPolicy must be above 0")

    def outcome(self, reason: Reason, *, age_seconds: float) -> Outcome:
        """What to do with a task that was sent ``age_seconds`` ago."""
        answer = Outcome(getattr(self, reason.value, Outcome.REJECT))
        if answer is Outcome.RETRY and age_seconds >= self.retry_for_seconds:
            return Outcome.REJECT
        return answer


__all__ = ["Answer", "ArrivalPolicy", "Outcome", "Reason"]
