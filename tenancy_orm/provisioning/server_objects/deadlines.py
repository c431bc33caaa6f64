"""Time limits that leave the caller a moment before its own deadline."""

from __future__ import annotations

import asyncio

# for the caller to report an error before its own deadline passes
_MARGIN_SECONDS = 0.05


def timeout_before(deadline: float) -> asyncio.Timeout:
    """Return a timeout that ends shortly before ``deadline``, a time of the event loop's clock."""
    return asyncio.timeout_at(deadline - _MARGIN_SECONDS)
