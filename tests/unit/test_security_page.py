"""The page on security names a test for each attack, and each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    """By file and function; ``::name`` alone is in the file named before it."""
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(?:[a-z/_]*/)?(test_[a-z_]+\.py)?(?:::(test_\w+))?`", page)
    missing, source, count = [], "", 0
    for file, function in named:
        source = files.get(file, "") if file else source
        count += bool(file or function)
        if (file and not source) or (function and f"def {function}(" not in source):
            missing.append(f"{file}::{function}")
    assert count > 20
    assert missing == []
