"""What is used, and what remains."""

from __future__ import annotations

import math

from tenancy_orm.quotas.usage import Remaining, Usage


def test_usage_knows_what_remains() -> None:
    """Also where the limit was lowered below what is used, is zero, or is none."""
    assert (Usage("r", 3, 10, "day").remaining, Usage("r", 3, 10, "day").fraction) == (7, 0.3)
    assert (Usage("r", 12, 10, "day").remaining, Usage("r", 12, 10, "day").fraction) == (0, 1.2)
    assert (Usage("r", 3, None, "day").remaining, Usage("r", 3, None, "day").fraction) == (None, 0.0)
    assert (Usage("r", 1, 0, "day").fraction, Usage("r", 0, 0, "day").fraction) == (math.inf, 0.0)


def test_remaining_is_true_where_it_fits() -> None:
    """To the last one."""
    assert Remaining(Usage("r", 9, 10, "day"), 1)
    assert not Remaining(Usage("r", 9, 10, "day"), 2)
    assert Remaining(Usage("r", 9, None, "day"), 10**12)
