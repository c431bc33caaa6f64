"""What an operation is about to do, for a progress display."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Tell: TypeAlias = Callable[[str], None]
"""Called with each step that begins."""


def silent(_: str) -> None:
    """Tell nobody."""


__all__ = ["Tell", "silent"]
