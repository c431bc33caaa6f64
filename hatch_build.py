"""The README as a package index shows it: there, a link to a file of the repository leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def standalone(text: str, documentation: str | None) -> str:
    """Return the README with no relative link: one to a page leads to the documentation's site, others become text.

    Args:
        text: The README.
        documentation: ``Documentation`` of ``[project.urls]``: the URL of the built docs/, if there is one.
    """

    def replace(link: re.Match[str]) -> str:
        page = re.fullmatch(r"docs/(?:index|(.+))\.md(#.*)?", link[2])
        if page is None or documentation is None:
            return link[1]
        path = f"{page[1]}/" if page[1] else ""
        return f"[{link[1]}]({documentation.rstrip('/')}/{path}{page[2] or ''})"

    return _RELATIVE.sub(replace, text)


class ReadmeHook(MetadataHookInterface):
    """Sets ``readme``, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set it."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        documentation = metadata.get("urls", {}).get("Documentation")
        metadata["readme"] = {"content-type": "text/markdown", "text": standalone(text, documentation)}
