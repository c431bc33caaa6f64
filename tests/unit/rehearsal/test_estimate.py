"""What a migration takes on a few clones is extrapolated to the fleet, with bounds."""

from __future__ import annotations

import pytest

from tenancy_orm.rehearsal.estimate import Sample, estimate

MB = 10**6


def test_clones_of_different_sizes_give_a_line() -> None:
    """1 s for each, and 1 s for each 100 MB."""
    samples = [Sample(100 * MB, 2.0), Sample(300 * MB, 4.0), Sample(500 * MB, 6.0)]
    found = estimate(samples, [100 * MB] * 98 + [900 * MB] * 2, concurrency=4)
    assert found is not None
    assert found.low == pytest.approx((98 * 2.0 + 2 * 10.0) / 4)
    assert found.high == pytest.approx(found.low)
    assert [found.longest_low, found.longest_high] == pytest.approx([10.0, 10.0])
    assert (found.tenants, found.total_bytes) == (100, (98 * 100 + 2 * 900) * MB)


def test_one_that_is_slower_than_its_size_says_raises_the_upper_bound() -> None:
    samples = [Sample(100 * MB, 2.0), Sample(300 * MB, 8.0), Sample(500 * MB, 6.0)]
    found = estimate(samples, [300 * MB] * 10, concurrency=1)
    assert found is not None
    assert found.low < 10 * 8.0 <= found.high


def test_clones_of_one_size_leave_open_whether_size_matters() -> None:
    found = estimate([Sample(10 * MB, 1.0)], [10 * MB, 10 * MB, 100 * MB], concurrency=1)
    assert found is not None
    assert [found.low, found.high] == pytest.approx([3.0, 12.0])
    assert "if the time grows with the size" in found.method


def test_a_run_is_never_shorter_than_its_longest_tenant() -> None:
    found = estimate([Sample(10 * MB, 1.0)], [10 * MB] * 4, concurrency=64)
    assert found is not None
    assert found.low == pytest.approx(1.0)


def test_a_time_that_does_not_grow_with_the_size_is_one_for_each() -> None:
    found = estimate([Sample(10 * MB, 1.0), Sample(1_000 * MB, 1.0)], [10 * MB] * 10, concurrency=1)
    assert found is not None
    assert found.low == pytest.approx(10.0)


def test_nothing_is_said_without_a_measurement_or_a_tenant() -> None:
    assert estimate([], [MB], concurrency=1) is None
    assert estimate([Sample(MB, 1.0)], [], concurrency=1) is None
