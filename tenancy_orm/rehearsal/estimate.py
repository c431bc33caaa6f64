"""How long the upgrade of the fleet may take, from what it took on a few clones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .report import Estimate

_SPREAD = 2.0  # sizes that differ by less tell nothing of their influence


@dataclass(frozen=True, slots=True)
class Sample:
    """The size of a tenant's database in bytes, and how long the upgrade of its clone took in seconds."""

    size: int
    seconds: float


def estimate(samples: Sequence[Sample], sizes: Sequence[int], *, concurrency: int) -> Estimate | None:
    """Extrapolate.

    Args:
        samples: What was measured.
        sizes: Those of the databases to upgrade.
        concurrency: How many tenants are upgraded at once.

    Returns:
        None without a sample.
    """
    if not samples or not sizes:
        return None
    low, high, method = _models(samples)

    def total(model: _Model) -> float:
        each = [model(size) for size in sizes]
        return max(sum(each) / concurrency, *each)

    bounds = sorted((total(low), total(high)))
    longest = sorted((max(map(low, sizes)), max(map(high, sizes))))
    return Estimate(
        tenants=len(sizes),
        total_bytes=sum(sizes),
        concurrency=concurrency,
        low=bounds[0],
        high=bounds[1],
        longest_low=longest[0],
        longest_high=longest[1],
        method=method,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """Seconds for a database: some for each, and some for each byte."""

    fixed: float
    per_byte: float

    def __call__(self, size: int) -> float:
        return self.fixed + self.per_byte * size


def _models(samples: Sequence[Sample]) -> tuple[_Model, _Model, str]:
    count = len(samples)
    smallest, largest = min(one.size for one in samples), max(one.size for one in samples)
    mean_size = sum(one.size for one in samples) / count
    mean_seconds = sum(one.seconds for one in samples) / count
    if largest >= _SPREAD * smallest:
        variance = sum((one.size - mean_size) ** 2 for one in samples)
        covariance = sum((one.size - mean_size) * (one.seconds - mean_seconds) for one in samples)
        per_byte = min(max(0.0, covariance / variance), mean_seconds / mean_size)
        line = _Model(mean_seconds - per_byte * mean_size, per_byte)
        slowest = max(((one.seconds / line(one.size)) if line(one.size) > 0 else 1.0) for one in samples)
        worst = _Model(line.fixed * max(1.0, slowest), line.per_byte * max(1.0, slowest))
        return line, worst, f"a line through {count} clones of different sizes; the upper bound by the slowest of them"
    clones = f"{count} clone{'s' * (count != 1)} of similar size"
    return (
        _Model(mean_seconds, 0.0),
        _Model(0.0, mean_seconds / mean_size) if mean_size else _Model(mean_seconds, 0.0),
        f"{clones}: one bound if every tenant takes as long, the other if the time grows with the size",
    )
