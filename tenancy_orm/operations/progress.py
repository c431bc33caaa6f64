"""How operations say what they do next: the type of a function that their callers pass as ``progress``."""

from __future__ import annotations

from collections.abc import Callable

StepProgress = Callable[[str], None]
"""Called with each step that begins, in words: for a progress display."""


def silent(_: str) -> None:
    """Show nothing."""


__all__ = ["StepProgress", "silent"]
