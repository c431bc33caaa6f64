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
from tenancy_orm.config.validation import settings_of

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
TABLES = re.compile(r"(?<=<!-- settings -->\n).*(?=\n<!-- end -->)", re.DOTALL)


def tables() -> Iterator[str]:
    """The lines of a table for each section."""
    schema = json_schema()
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


if __name__ == "__main__":
    PAGE.write_text(TABLES.sub(lambda _: "\n".join(tables()), PAGE.read_text()))
