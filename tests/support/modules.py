"""Python files that tests write."""

from __future__ import annotations

from importlib.util import cache_from_source
from pathlib import Path


def write_module(path: Path, text: str) -> None:
    """Write a module, in place of what Python may have compiled of an earlier text of it.

    Bytecode is taken for current where the source has the size and the whole second that it was compiled from, so what
    replaces a module within a second, at the same length, would not be read.
    """
    path.write_text(text, "utf-8")
    Path(cache_from_source(path)).unlink(missing_ok=True)
