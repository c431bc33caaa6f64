"""Values of the TOML files of an adoption, a mapping and a plan, with errors that name where each is."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError


def load(path: Path, *, what: str = "") -> dict[str, Any]:
    """Read a file; ``what`` is what an error says before its path.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{what}{path} cannot be read: {exc}") from exc


def refuse_unknown(values: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Refuse a name that is not known.

    Raises:
        ConfigurationError: there is one.
    """
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigurationError(f"{place} has no {unknown[0]!r}; it knows {', '.join(sorted(known))}")


def text(values: Mapping[str, Any], name: str, place: str) -> str | None:
    """Return a text that is not blank, or None where there is none.

    Raises:
        ConfigurationError: it is something else.
    """
    found = values.get(name)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise ConfigurationError(f"{name} of {place} must be a string, not {found!r}")
    return found


def texts(values: Mapping[str, Any], names: Iterable[str], place: str) -> dict[str, str]:
    """Return those of some texts that are given, by name.

    Raises:
        ConfigurationError: one is something else.
    """
    return {name: found for name in names if (found := text(values, name, place)) is not None}


def names(values: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """Return a list of names, which is empty where there is none.

    Raises:
        ConfigurationError: it is something else.
    """
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise ConfigurationError(f'{name} of {place} is a list of names, as ["one", "two"]')
    return tuple(found)


def flag(values: Mapping[str, Any], name: str, place: str) -> bool:
    """Return true or false, which it is where there is none.

    Raises:
        ConfigurationError: it is something else.
    """
    found = values.get(name, False)
    if not isinstance(found, bool):
        raise ConfigurationError(f"{name} of {place} is true or false, not {found!r}")
    return found


__all__ = ["flag", "load", "names", "refuse_unknown", "text", "texts"]
