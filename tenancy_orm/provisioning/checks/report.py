"""``ReconcileReport``: what a reconciliation has found and done."""

from __future__ import annotations

from dataclasses import dataclass, field

from .differences import Difference


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """What ``reconcile`` has done. Tenants are given by slug, databases and roles by name.

    Args:
        finished: Creations that were nearly complete, or that an older backup of the registry took for interrupted;
            they are active now. They have no API key: issue one.
        removed: Creations that were removed; their slugs are free again.
        purged: Purges that were finished.
        corrected: Tenants with a role that did not agree with the registry: it could log in although the tenant is
            suspended or deleted, or could not although it is neither; or it had another connection limit than its tier;
            or it had given itself settings or members.
        orphans: Databases and roles that were dropped because the registry does not know them, roles of purged tenants
            that could not be dropped before, and temporary logins that have expired.
        unknown: Databases that the registry does not know, but that have belonged to a tenant: kept, since they may
            hold data. Register them again (``tenancy rebuild``), or drop them by ``reconcile(drop_unknown=True)``,
            which spares those of tenants with rows that are older than a restore or a move.
        differences: How tenants' databases and roles differed from what provisioning makes, mended or not.
        errors: What could not be done or checked, and why. Everything else was.
    """

    finished: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    purged: tuple[str, ...] = ()
    corrected: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was found. After a check, this is whether a reconcile would have nothing to do."""
        return self == ReconcileReport()

    @property
    def complete(self) -> bool:
        """Whether everything is as it should be now: no errors, and nothing that differs is left."""
        return not self.errors and all(difference.mended for difference in self.differences)


@dataclass(slots=True)
class Findings:
    """What a reconciliation has found so far."""

    finished: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    purged: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def report(self) -> ReconcileReport:
        """Return all of it, in order."""
        names = [name for name in self.__slots__ if name != "differences"]
        differences = sorted(self.differences, key=lambda one: (one.tenant, one.mended, not one.dangerous, one.kind))
        return ReconcileReport(
            **{name: tuple(sorted(getattr(self, name))) for name in names}, differences=tuple(differences)
        )

    def correct(self, slug: str) -> None:
        """Note that a tenant is corrected, once however much there was to do."""
        if slug not in self.corrected:
            self.corrected.append(slug)


__all__ = ["Findings", "ReconcileReport"]
