"""Waves as text: ``--wave`` on the command line, and a TOML file."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigurationError
from .waves import Wave, Waves

# a name ends with a colon and a space, which no value of a selection has
_NAME = re.compile(r"\s*([\w][\w .-]*):(?:\s+|$)(.*)", re.DOTALL)
_WAVE_NAMED = re.compile(r"^wave (?:'[^']*'|\"[^\"]*\"):? ")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What a file of waves says: the waves, and the options of the run that it may have."""

    waves: Waves | None
    max_failures: int | None = None
    concurrency: int | None = None


def parse_wave(text: str) -> Wave:
    """Read a wave from an option: ``canary: tenant=acme,globex wait=10m``, ``5%``, ``tier=free pause``, ``rest``.

    Raises:
        ConfigurationError: a word is unknown, or a value is malformed.
    """
    named = _NAME.fullmatch(text)
    name, rest = (named[1].strip(), named[2]) if named else ("", text)
    table: dict[str, Any] = {"name": name} if name else {}
    try:
        words = shlex.split(rest)
    except ValueError as exc:
        raise ConfigurationError(f"the wave {text!r} cannot be read: {exc}") from exc
    for word in words:
        _add(table, word, text)
    return _wave(table, f"the wave {text!r}", Path.cwd())


def parse_waves(texts: Iterable[str], *, seed: str = "") -> Waves:
    """Read waves from options; ``parse_wave`` says how.

    Raises:
        ConfigurationError: as ``parse_wave``.
    """
    return Waves(tuple(parse_wave(text) for text in texts), seed)


def read_plan(path: str | Path) -> PlanFile:
    """Read a TOML file: a table ``[[wave]]`` for each wave; it may have ``seed``, ``max_failures`` and ``concurrency``.

    Raises:
        ConfigurationError: the file cannot be read, or says what cannot be meant.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as exc:
        raise ConfigurationError(f"the plan {str(path)!r} cannot be read: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"the plan {str(path)!r} is not TOML: {exc}") from exc
    known = ("wave", "seed", "max_failures", "concurrency")
    if unknown := [key for key in document if key not in known]:
        raise ConfigurationError(f"the plan {str(path)!r}: unknown {unknown[0]!r}; there are {', '.join(known)}")
    tables = document.get("wave", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise ConfigurationError(f"the plan {str(path)!r}: give at least one table [[wave]]")
    seed = document.get("seed", "")
    if not isinstance(seed, str):
        raise ConfigurationError(f"the plan {str(path)!r}: seed is a text")
    waves = [
        _wave(table, f"the plan {str(path)!r}, wave {number}", path.parent) for number, table in enumerate(tables, 1)
    ]
    numbers = {name: _number(document, name, path) for name in ("max_failures", "concurrency")}
    return PlanFile(Waves(tuple(waves), seed), **numbers)


def _number(document: Mapping[str, Any], name: str, path: Path) -> int | None:
    value = document.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"the plan {str(path)!r}: {name} is a number of at least 1")
    return value


def _add(table: dict[str, Any], word: str, text: str) -> None:
    """Add a word of an option to the table that the same wave has in a file."""
    key, equals, value = word.partition("=")
    if not equals:
        if found := _PERCENT.fullmatch(word):
            table["percent"] = float(found[1])
        elif word.isdecimal():
            table["count"] = int(word)
        elif word in _FLAGS:
            table[word] = True
        else:
            raise ConfigurationError(
                f"the wave {text!r}: {word!r} is not understood; write 5%, a number, rest, pause, or one of "
                f"{', '.join(f'{name}=...' for name in _KEYS if name not in _FLAGS)}; "
                "a name comes first, with a colon: 'canary: tenant=acme'"
            )
    elif key == "label":
        name, has_value, values = value.partition("=")
        table.setdefault("label", {})[name] = values.split(",") if has_value else True
    elif key in _LISTED:
        table.setdefault(key, []).extend(filter(None, value.split(",")))
    elif key in ("command", "function"):
        table.setdefault(key, []).append(value)
    else:
        table[key] = value


# --- one wave ---------------------------------------------------------------------------------------------------------


def _wave(table: Mapping[str, Any], where: str, directory: Path) -> Wave:
    if unknown := [key for key in table if key not in _KEYS]:
        raise ConfigurationError(f"{where}: unknown {unknown[0]!r}; there are {', '.join(_KEYS)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        name, read = _KEYS[key]
        values[name] = read(value, f"{where}: {key}")
    values["tenants"] = [name for given in values.get("tenants", ()) for name in _listed(given, where, directory)]
    try:
        return Wave(**values)
    except ConfigurationError as exc:
        # it begins with the wave's name, which is in the text of an option
        raise ConfigurationError(f"{where}: {_WAVE_NAMED.sub('', str(exc))}") from exc


def _listed(given: str, where: str, directory: Path) -> list[str]:
    """Return the tenants of ``@file``, one a line; what is no file is a tenant."""
    if not given.startswith("@"):
        return [given]
    path = directory / given[1:]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{where}: the list of tenants {str(path)!r} cannot be read: {exc}") from exc
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def _refuse(where: str, expected: str, value: object) -> NoReturn:
    raise ConfigurationError(f"{where} is {expected}, not {value!r}")


def _text(value: object, where: str) -> str:
    return value if isinstance(value, str) else _refuse(where, "a text", value)


def _texts(value: object, where: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
        _refuse(where, "a text, or a list of texts", value)
    return values


def _flag(value: object, where: str) -> bool:
    given = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    return given if isinstance(given, bool) else _refuse(where, "true or false", value)


def _whole(value: object, where: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    _refuse(where, "a number", value)


def _percent(value: object, where: str) -> float:
    text = value.removesuffix("%") if isinstance(value, str) else value
    return _float(text, where, "a number of per cent, such as 5")


def _share(value: object, where: str) -> float:
    if isinstance(value, str) and value.endswith("%"):
        return _float(value[:-1], where, "a share, such as 0.02 or 2%") / 100
    return _float(value, where, "a share, such as 0.02 or 2%")


def _seconds(value: object, where: str) -> float:
    expected = "a time with its unit, such as 90s, 10m or 2h"
    if isinstance(value, str):
        # without a unit it would be seconds, and a slip for minutes would let the fleet go
        found = _DURATION.fullmatch(value)
        return float(found[1]) * _UNITS[found[2]] if found else _refuse(where, expected, value)
    return _float(value, where, expected)


def _float(value: object, where: str, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        _refuse(where, expected, value)
    try:
        return float(value)
    except ValueError:
        _refuse(where, expected, value)


def _labels(value: object, where: str) -> dict[str, list[str] | None]:
    """Read ``{cohort = "beta", size = ["s", "m"], trusted = true}``; true is any value."""
    if not isinstance(value, dict) or not value:
        _refuse(where, "a table, such as { cohort = 'beta' }", value)
    return {key: None if values is True else _texts(values, f"{where}.{key}") for key, values in value.items()}


_KEYS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "name": ("name", _text),
    "tenant": ("tenants", _texts),
    "tier": ("tiers", _texts),
    "status": ("statuses", _texts),
    "region": ("regions", _texts),
    "server": ("servers", _texts),
    "label": ("labels", _labels),
    "percent": ("percent", _percent),
    "count": ("count", _whole),
    "rest": ("rest", _flag),
    "error_budget": ("error_budget", _share),
    "wait": ("wait", _seconds),
    "command": ("commands", _texts),
    "function": ("functions", _texts),
    "check_timeout": ("check_timeout", _seconds),
    "pause": ("pause", _flag),
}
_FLAGS = ("rest", "pause")
_LISTED = ("tenant", "tier", "status", "region", "server")

__all__ = ["PlanFile", "parse_wave", "parse_waves", "read_plan"]
