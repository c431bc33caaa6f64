"""The tenants that a command over the fleet is for: named, or chosen by tier and status, or all that are usable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from ..errors import UnknownTierError, counted
from ..queries import USABLE, Chosen
from ..tenancy import Tenancy
from ..tenant import Status, Tenant
from .output import note
from .runtime import confirm, fail

Named = Annotated[list[str] | None, typer.Argument(metavar="TENANT", help="Slugs, former slugs, domains, or ids.")]
Also = Annotated[list[str] | None, typer.Option("--tenant", "-t", help="This tenant; repeatable.")]
Tiers = Annotated[list[str] | None, typer.Option("--tier", help="The tenants of this tier; repeatable.")]
Statuses = Annotated[
    list[Status] | None,
    typer.Option("--status", help="The tenants of this status; repeatable. In trial or active if not given."),
]
All = Annotated[bool, typer.Option("--all", help="All tenants in trial or active.")]
Concurrency = Annotated[int, typer.Option(min=1, max=64, help="How many tenants of one server at once.")]


@dataclass(frozen=True, slots=True)
class Selection:
    """What was given on the command line."""

    tenants: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    statuses: tuple[Status, ...] = ()
    everyone: bool = False

    @classmethod
    def of(
        cls,
        tenants: Sequence[str] | None,
        tiers: Sequence[str] | None,
        statuses: Sequence[Status] | None,
        everyone: bool,
    ) -> Selection:
        """Read the options. Nothing, or named tenants beside a choice, exits with an error."""
        found = cls(tuple(tenants or ()), tuple(tiers or ()), tuple(statuses or ()), everyone)
        if not (found.tenants or found.tiers or found.statuses or found.everyone):
            fail("no tenants are named: give slugs or ids, --tier, --status or --all", kind="ConfigurationError")
        if found.tenants and (found.tiers or found.statuses or found.everyone):
            fail("name tenants, or choose them by --tier, --status or --all; not both", kind="ConfigurationError")
        return found

    def __str__(self) -> str:
        """Say who is meant, for a question and for the audit log."""
        if self.tenants:
            return ", ".join(self.tenants)
        statuses = " or ".join(status.value for status in self.statuses or USABLE)
        tiers = f" of tier {' or '.join(self.tiers)}" if self.tiers else ""
        return f"all tenants{tiers} in status {statuses}"

    async def find(self, tenancy: Tenancy) -> list[Tenant]:
        """Look the tenants up, in order of creation; where none match, say so.

        Raises:
            TenantNotFoundError, TenantProvisioningError: a named tenant does not exist, or is being created.
            UnknownTierError: there is no such tier.
        """
        for tier in self.tiers:
            if tier not in tenancy.config.tiers:
                raise UnknownTierError(tier, tuple(tenancy.config.tiers))
        chosen = Chosen.of(self.tenants or None, self.tiers, self.statuses)
        found = await chosen.find(tenancy.internals.registry)
        if not found:
            note(f"there are no tenants: {self}")
        return found

    def ask(self, what: str, tenants: Sequence[Tenant], *, yes: bool) -> None:
        """Ask before something is changed; exits where the answer is no."""
        who = ", ".join(tenant.slug for tenant in tenants[:5]) + (", ..." if len(tenants) > 5 else "")
        if tenants and not yes and not confirm(f"{what} {counted(len(tenants))} ({who})?"):
            fail("nothing was changed")


__all__ = ["All", "Also", "Concurrency", "Named", "Selection", "Statuses", "Tiers"]
