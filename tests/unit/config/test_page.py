"""docs/configuration.md lists every setting, as the code has it.

``python -m tests.unit.config.test_page`` writes the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenancy_orm import TenancyConfig
from tenancy_orm.config.schema import json_schema
from tenancy_orm.config.sources import variables_of
from tenancy_orm.config.tiers import default_tiers
from tenancy_orm.config.validation import settings_of

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
TABLES = re.compile(r"(?<=<!-- settings -->\n).*(?=\n<!-- end -->)", re.DOTALL)
TIERS = re.compile(r"(?<=<!-- tiers -->\n).*(?=\n<!-- end of tiers -->)", re.DOTALL)


def tables() -> Iterator[str]:
    """The lines of a table for each section."""
    schema = json_schema(with_texts=True)
    variables = variables_of(TenancyConfig)
    last = None
    for path in settings_of(TenancyConfig):
        model: dict[str, Any] = schema
        for section in path[:-1]:
            model = schema["$defs"][model["properties"][section]["$ref"].rpartition("/")[2]]
        if path[:-1] != last:
            last = path[:-1]
            if last:
                yield from ("", f"### `{'.'.join(last)}`", "", model["description"])
            yield from ("", "| setting | variable | default | meaning |", "|---|---|---|---|")
        found = model["properties"][path[-1]]
        meaning = found["description"].replace("``", "`").replace("|", "\\|")
        default = found.get("default")
        shown = (
            ""
            if default in (None, [], "")
            else f"`{str(default).lower() if default is True or default is False else default}`"
        )
        yield f"| `{path[-1]}` | `{variables['.'.join(path)]}` | {shown} | {meaning} |"
    yield ""


def test_the_page_lists_every_setting() -> None:
    """With its variable, its default and its meaning."""
    found = TABLES.search(PAGE.read_text())
    assert found and found[0] == "\n".join(tables()), "run: python -m tests.unit.config.test_page"
    assert "As text: `id:base64`, separated by commas" in found[0], "a variable has another form than a file's key"


def test_the_page_lists_the_default_tiers() -> None:
    """With their limits, in the same order."""
    table = TIERS.search(PAGE.read_text())
    assert table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].strip().splitlines()]
    expected = []
    for tier in default_tiers().values():
        assert set(tier.limits) == {"users", "api_calls", "storage_bytes"} and tier.limits["api_calls"].period == "day"
        users, calls, storage = (tier.limits[name].amount for name in ("users", "api_calls", "storage_bytes"))
        expected.append(
            [
                f"`{tier.name}`",
                "unlimited" if users is None else f"{users:,}",
                "unlimited" if calls is None else f"{calls:,}",
                "unlimited" if storage is None else f"{storage // 1024**3} GiB",
                str(tier.connection_limit),
            ]
        )
    assert rows[2:] == expected


if __name__ == "__main__":
    PAGE.write_text(TABLES.sub(lambda _: "\n".join(tables()), PAGE.read_text()))
