"""Metadata on the command line: ``name=text``, ``name:=JSON``, or a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError

_FORMS = "NAME=TEXT, NAME:=JSON or a JSON object; repeatable."

Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", help=f"Its metadata: {_FORMS}", metavar="NAME=TEXT|NAME:=JSON|JSON")
]
NewMetadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata", help=f"Metadata that replaces all it has: {_FORMS}", metavar="NAME=TEXT|NAME:=JSON|JSON"
    ),
]
MetadataFilter = Annotated[
    list[str] | None,
    typer.Option("--metadata", help=f"Only with this in their metadata: {_FORMS}", metavar="NAME=TEXT|NAME:=JSON|JSON"),
]
SetMetadata = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help=f"Merge this into its metadata; the rest stays: {_FORMS}", metavar="NAME=TEXT|NAME:=JSON|JSON"
    ),
]
UnsetMetadata = Annotated[
    list[str] | None, typer.Option("--unset", help="Remove this name from its metadata; repeatable.", metavar="NAME")
]


def parse_metadata(given: Iterable[str] | None, option: str = "--metadata") -> dict[str, Any] | None:
    """Return what the options say together, later ones over earlier ones; None where none is given.

    Raises:
        ConfigurationError: one of them has none of the three forms.
    """
    if given is None:
        return None
    found: dict[str, Any] = {}
    for text in given:
        found |= _parse(text, option)
    return found


def parse_merge(given: Iterable[str] | None, removed: Iterable[str] | None) -> dict[str, Any] | None:
    """Return the merge patch of ``--set`` and ``--unset``; None where neither is given.

    Raises:
        ConfigurationError: one of them is malformed, or a name is set and removed.
    """
    patch = parse_metadata(given, "--set") or {}
    for name in removed or ():
        if name in patch:
            raise ConfigurationError(f"{name!r} is given to --set and to --unset")
        patch[name] = None
    return patch or None


def _parse(text: str, option: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        value: dict[str, Any] = _load(text, option)
        return value
    name, separator, value_text = text.partition("=")
    if not separator or not name.removesuffix(":"):
        raise ConfigurationError(f"{option} {text!r} is not NAME=TEXT, NAME:=JSON or a JSON object")
    if name.endswith(":"):
        return {name.removesuffix(":"): _load(value_text, option)}
    return {name: value_text}


def _load(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigurationError(f"{option} is not JSON: {exc}") from None
