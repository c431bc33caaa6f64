"""What differs between a tenant's database and role and what provisioning makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a tenant's database or role is not as provisioning makes it.

    Args:
        tenant: The tenant's slug.
        server: Its server.
        database: The database in which ``remedy`` is to be run.
        kind: What differs, for programs: "database.public" for example.
        detail: What was found, for people.
        dangerous: Whether other tenants may get at this one's data by it, or this one at more than its own. If not, it
            is the tenant itself that misses something.
        mended: Whether it has been mended.
        remedy: The SQL that mends it; a superuser has to run it if ``reconcile`` has left it.
    """

    tenant: str
    server: str
    database: str
    kind: str
    detail: str
    dangerous: bool
    mended: bool = False
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Deviation:
    """What was found, before it is known whether it can be mended. The statements mend it, unless it is spared."""

    kind: str
    detail: str
    dangerous: bool
    statements: tuple[str, ...] = ()
    spared: bool = False

    def difference(self, tenant: str, server: str, database: str, *, mended: bool = False) -> Difference:
        """This as a part of the report."""
        remedy = "; ".join(self.statements)
        return Difference(tenant, server, database, self.kind, self.detail, self.dangerous, mended, remedy)


def enumeration(items: Iterable[str]) -> str:
    """Some of the items, and how many there are if these are not all."""
    found: Sequence[str] = sorted(set(items))
    shown = ", ".join(found[:_EXAMPLES])
    return shown if len(found) <= _EXAMPLES else f"{shown} and {len(found) - _EXAMPLES} more"
