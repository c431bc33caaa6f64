"""Refused credentials and requests, counted by kind in bounded memory. State without I/O.

Refused credentials and cross-tenant requests are counted apart: a flood of invalid credentials must not keep a request
that named another tenant out of the audit log.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple
from uuid import UUID

from ..audit.actor import ActorKind

MAX_KINDS = 1_000  # kinds that are counted one by one until the next write
MAX_WRITTEN = 20  # kinds that are written one by one
MAX_CALLERS = 100  # credentials with a count of their further cross-tenant requests each

_REJECTED = "credential.reject"
_CROSS_TENANT = "request.cross_tenant"

_Owner = tuple[UUID, str] | tuple[None, None]


class Refusal(NamedTuple):
    """One kind of refusal. Of a cross-tenant request ``named`` is the other tenant, read by ``resolver``."""

    action: str
    actor_id: str | None = None
    source: str | None = None
    reason: str | None = None
    tenant_id: UUID | None = None
    slug: str | None = None
    named: str | None = None
    resolver: str | None = None
    kind: ActorKind = "key"

    @classmethod
    def rejected(
        cls,
        reason: str,
        credential_id: str | None,
        source: str | None,
        owner: _Owner,
        kind: ActorKind = "key",
    ) -> Refusal:
        """A credential that was refused."""
        tenant_id, slug = owner
        return cls(_REJECTED, credential_id, source, reason, tenant_id, slug, kind=kind)

    @classmethod
    def cross_tenant_request(
        cls,
        named: str,
        resolver: str,
        subject: str,
        source: str | None,
        owner: _Owner,
        kind: ActorKind = "key",
    ) -> Refusal:
        """A request that named a tenant that its credential does not allow."""
        tenant_id, slug = owner
        return cls(_CROSS_TENANT, subject, source, None, tenant_id, slug, named, resolver, kind)

    @property
    def rest(self) -> Refusal:
        """The kind that counts it where there are too many: by its credential, where that is valid, or by action."""
        if self.action == _CROSS_TENANT:
            return self._replace(source=None, named=None, resolver=None)
        return self.others

    @property
    def others(self) -> Refusal:
        """The kind that counts all refusals of this action."""
        return Refusal(self.action)


class RefusalCounter:
    """Counts refusals by kind; past ``MAX_KINDS`` kinds, by ``rest``."""

    def __init__(self) -> None:
        self.kinds: Counter[Refusal] = Counter()
        self.rests: Counter[Refusal] = Counter()

    def __len__(self) -> int:
        """How many kinds are counted."""
        return len(self.kinds) + len(self.rests)

    def add(self, refusal: Refusal, count: int = 1) -> None:
        """Count a refusal."""
        if refusal in self.kinds or len(self.kinds) < MAX_KINDS:
            self.kinds[refusal] += count
        else:
            self._add_rest(refusal.rest, count)

    def add_all(self, other: RefusalCounter) -> None:
        """Add the counts of ``other``, which could not be written, within the same bounds."""
        for refusal, count in other.kinds.items():
            self.add(refusal, count)
        for rest, count in other.rests.items():
            self._add_rest(rest, count)

    def _add_rest(self, rest: Refusal, count: int) -> None:
        if rest not in self.rests and len(self.rests) >= MAX_KINDS:
            rest = rest.others
        self.rests[rest] += count

    def entries(self) -> list[tuple[Refusal, dict[str, Any]]]:
        """Return entries for the audit log with their details: the most frequent kinds one by one, then the rest."""
        ranked = self.kinds.most_common()
        rests = Counter(self.rests)
        names: dict[Refusal, set[str | None]] = {}
        for refusal, count in ranked[MAX_WRITTEN:]:
            rests[refusal.rest] += count
            names.setdefault(refusal.rest, set()).add(refusal.named)
        entries = [(refusal, _detail(refusal, count)) for refusal, count in ranked[:MAX_WRITTEN]]
        by_caller = [(rest, count) for rest, count in rests.most_common() if rest.actor_id is not None][:MAX_CALLERS]
        for rest, count in by_caller:
            # a lower bound: names past MAX_KINDS are not kept
            entries.append((rest, {"reason": "others", "count": count, "names": len(names.get(rest, ()))}))
        written = {rest for rest, _ in by_caller}
        others: Counter[Refusal] = Counter()
        for rest, count in rests.items():
            if rest not in written:
                others[rest.others] += count
        return entries + [(rest, {"reason": "others", "count": count}) for rest, count in others.items()]


def _detail(refusal: Refusal, count: int) -> dict[str, Any]:
    if refusal.action == _CROSS_TENANT:
        return {"named": refusal.named, "resolver": refusal.resolver, "count": count}
    return {"reason": refusal.reason, "count": count}
