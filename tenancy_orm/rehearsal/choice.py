"""Which tenants are cloned for a rehearsal, and how large the others are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MigrationError
from ..migrations.plan import Plan
from ..tenant import Tenant


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tenant that is behind the target, and the size of its database in bytes; None if that is not known."""

    tenant: Tenant
    size: int | None


def is_behind(plan: Plan, tenant: Tenant) -> bool:
    """Whether the registry has a tenant at a revision from which the plan has something to do."""
    heads = frozenset(filter(None, (tenant.schema_revision or "").split(",")))
    try:
        return bool(plan.path_from(heads).steps)
    except MigrationError:
        return False  # of another branch, or of newer code


def choose(candidates: Sequence[Candidate], count: int, *, max_bytes: int | None) -> list[Candidate]:
    """Choose the largest, the oldest, and others at random.

    Args:
        candidates: In order of their creation.
        count: How many.
        max_bytes: The largest size; None for any.
    """
    allowed = [one for one in candidates if max_bytes is None or (one.size is not None and one.size <= max_bytes)]
    if len(allowed) <= count:
        return allowed
    chosen = [max(allowed, key=lambda one: one.size or 0)]
    rest = [one for one in allowed if one is not chosen[0]]
    if count > 1:
        chosen.append(rest.pop(0))
    return chosen + random.sample(rest, count - len(chosen))
