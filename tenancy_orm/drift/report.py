"""The report of a search for drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import SchemaDriftError, counted
from .compare import Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftGroup:
    """Tenants with the same drift.

    Args:
        tenants: Their slugs, in order of creation.
        roles: Their roles, in the same order: ``:"tenant_role"`` in the statements.
        servers: Their servers.
        revision: The revision that they are at, None for base or without migrations.
        fingerprint: That of their schemas.
        expected: That of the schema of this revision.
        differences: How they differ from it.
    """

    tenants: tuple[str, ...]
    roles: tuple[str, ...]
    servers: tuple[str, ...]
    revision: str | None
    fingerprint: str
    expected: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """What a search for drift has found; ``tenancy migrate drift``.

    Args:
        groups: The tenants that drift, by what differs; the largest group first.
        matching: How many tenants have the schema of their revision.
        errors: Why others could not be compared, by slug.
        seconds: How long it took.
    """

    groups: tuple[DriftGroup, ...]
    matching: int
    errors: Mapping[str, str]
    seconds: float

    @property
    def drifted(self) -> tuple[str, ...]:
        """The slugs of the tenants that drift."""
        return tuple(slug for group in self.groups for slug in group.tenants)

    @property
    def total(self) -> int:
        """How many tenants it was for."""
        return self.matching + len(self.drifted) + len(self.errors)

    @property
    def ok(self) -> bool:
        """Whether every tenant has the schema of its revision."""
        return not self.groups and not self.errors

    def raise_for_drift(self) -> None:
        """Raise if a tenant drifts, or could not be compared.

        Raises:
            SchemaDriftError: it has their slugs.
        """
        if not self.ok:
            raise SchemaDriftError(self.drifted, self.errors, total=self.total)

    def summary(self) -> str:
        """Return one line: how many tenants have the schema of their revision, and how many do not."""
        counts = f"{self.matching} as their revision says, {len(self.drifted)} drifted, {len(self.errors)} failed"
        return f"drift: {counted(self.total)}, {counts}, {self.seconds:.1f} s"


class DriftProgress(Protocol):
    """Receives the progress of a search, in the event loop that runs it: for a progress bar."""

    def total(self, count: int) -> None:
        """Receive the number of tenants."""

    def done(self, slug: str) -> None:
        """Receive the slug of a tenant that was read, or could not be."""


__all__ = ["DriftGroup", "DriftProgress", "DriftReport"]
