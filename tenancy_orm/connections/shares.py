"""How many connections of a server each process may have: arithmetic alone, without I/O, clock or state.

The cap is divided as evenly as what the processes want allows: nobody gets more than it wants, and what one leaves
unused is divided among the others. So a process that wants it gets its guaranteed part, the cap divided by the number
of processes, and one that is alone gets nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN_CAP = 10
"""The cap of a server that has never said how many connections it accepts."""

LEAST = 1
"""How many connections a process wants even if it needs none now, so that a single request need not ask for one."""

HEADROOM = 4
"""How many connections a process takes beyond what it needs now, where they are free."""

_MARGIN = 10  # one connection in ten is left to those that are not counted at the moment, and at least:
_LEAST_MARGIN = 3


@dataclass(frozen=True, slots=True)
class Claim:
    """A process's part of a server: how many connections it has been ``granted``, and how many it ``wanted``."""

    granted: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What a process does.

    Attributes:
        limit: How many connections it may have from now on. Where that is more than it had, they are free.
        share: How many it gets if it wants that many; the others give back what they have above their own.
        debtors: The positions of the other processes that have to give some back for this one.
        creditors: The positions of the other processes that can use what this one gives back.
    """

    limit: int
    share: int
    debtors: tuple[int, ...] = ()
    creditors: tuple[int, ...] = ()


def cap_of(accepted: int | None, others: int | None, configured: int | None) -> int:
    """Return how many connections all processes together may have to a server.

    Args:
        accepted: How many the server accepts, less those that it reserves; None if that was never found out.
        others: How many connections are not these processes'; None if they were never counted.
        configured: The cap in the server's row; nothing else counts then.
    """
    if configured is not None:
        return configured
    if accepted is None:
        return UNKNOWN_CAP
    margin = max(_LEAST_MARGIN, math.ceil(accepted / _MARGIN))
    return max(1, accepted - margin - (margin if others is None else others))


def fair_shares(cap: int, wanted: Sequence[int]) -> list[int]:
    """Return each process's share of the cap; the processes are in the order of their age, the oldest first.

    Nobody's is smaller than what it wants or ``cap // len(wanted)``, whichever is less. Of those that want the same the
    oldest gets what is left over: where there are more processes than connections, an added one takes none from others.
    """
    shares = [0] * len(wanted)
    left = max(0, cap)
    # the most modest first: what they leave is divided among the others
    order = sorted(range(len(wanted)), key=lambda position: (wanted[position], -position))
    for served, position in enumerate(order):
        shares[position] = min(wanted[position], left // (len(order) - served))
        left -= shares[position]
    return shares


def decide(cap: int, claims: Sequence[Claim], own: int, *, keep: int | None = None, take: int = 0) -> Decision:
    """Decide how many connections a process may have.

    Args:
        cap: How many all processes may have.
        claims: The processes' claims, the oldest process first.
        own: The position of the process that decides.
        keep: How many it keeps while nobody misses them; as many as it has where None.
        take: How many it takes beyond what it wants while nobody misses them, if they are free.
    """
    shares = fair_shares(cap, [claim.wanted for claim in claims])
    have, want, share = claims[own].granted, claims[own].wanted, shares[own]
    others = [(position, claim) for position, claim in enumerate(claims) if position != own]
    free = cap - sum(claim.granted for _, claim in others)
    missed = sum(max(0, shares[position] - claim.granted) for position, claim in others)
    kept = have if keep is None else min(have, keep)
    # no more than the others miss is given back, and nothing of the own share
    limit = max(share, have - missed) if missed else max(kept, want, take)
    # where the cap has become smaller, those that have more than their share make up for it
    limit = max(min(limit, free), min(have, share), 0)
    return Decision(
        limit,
        share,
        tuple(p for p, claim in others if claim.granted > shares[p]) if limit < share else (),
        tuple(p for p, claim in others if claim.granted < claim.wanted) if limit < have else (),
    )


__all__ = ["HEADROOM", "LEAST", "UNKNOWN_CAP", "Claim", "Decision", "cap_of", "decide", "fair_shares"]
