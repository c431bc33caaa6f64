"""Checks of a server's name, addresses and numbers, and what the audit log has of a row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, Final

from ..config import ServerAddresses
from ..config.placement import check_region
from ..errors import ConfigurationError, SettingError
from ..servers.rows import ServerRow

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_MAX_INTEGER = 2**31 - 1
# what is sealed is not among them
_AUDITED = (
    "host",
    "port",
    "maintenance_database",
    "region",
    "labels",
    "capacity",
    "weight",
    "state",
    "max_connections",
    "max_opening",
    "identity",
)


class Unset(Enum):
    """The type of ``UNSET``."""

    UNSET = "unset"

    def __repr__(self) -> str:
        """Return its name."""
        return "UNSET"


UNSET: Final = Unset.UNSET
"""A field that ``ServerManager.update`` leaves as it is, where None is a value."""


def check_name(name: object) -> None:
    """Refuse what is not the name of a server.

    Raises:
        ConfigurationError: it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is not the name of a server: 1 to 31 of a-z, 0-9, _ and -, from a letter")


def read_addresses(given: ServerAddresses | Mapping[str, Any] | str) -> ServerAddresses:
    """Return addresses; a URL stands for all of them, and a mapping has them by kind.

    Raises:
        ConfigurationError: the URL is malformed. The message does not have it.
    """
    if isinstance(given, ServerAddresses):
        return given
    try:
        return ServerAddresses(**({"admin": given} if isinstance(given, str) else given))
    except SettingError as exc:
        problem = "; ".join(f"{kind} {reason}" for kind, reason in exc.problems.items())
    raise ConfigurationError(f"the address of a server: {problem}")


def check_fields(**given: object) -> dict[str, Any]:
    """Return what a row has of the fields that are given; those that are ``UNSET`` are left out.

    Raises:
        ConfigurationError: one of them is malformed.
    """
    return {name: _CHECKS[name](value) for name, value in given.items() if value is not UNSET}


def _check_region(region: object) -> str | None:
    return None if region is None else check_region(region)


def _check_labels(labels: object) -> dict[str, str]:
    """Return labels as jsonb can store them.

    Raises:
        ConfigurationError: they are not text by name.
    """
    if not isinstance(labels, Mapping) or not all(
        isinstance(name, str) and name and isinstance(value, str) for name, value in labels.items()
    ):
        raise ConfigurationError("labels must be text by name")
    if "\\u0000" in json.dumps(dict(labels)):
        raise ConfigurationError("labels have a NUL character, which jsonb cannot store")
    return dict(labels)


def _check_number(name: str, value: object, *, least: int = 1) -> int | None:
    """Return a whole number, or None.

    Raises:
        ConfigurationError: it is none, or below ``least``.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_INTEGER:
        raise ConfigurationError(f"{name} must be a whole number, {least} to {_MAX_INTEGER}")
    return value


def _check_weight(weight: object) -> float:
    """Return a finite number above 0.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigurationError("weight must be a number above 0")
    return float(weight)


_CHECKS: Final[Mapping[str, Callable[[object], object]]] = {
    "region": _check_region,
    "labels": _check_labels,
    "capacity": partial(_check_number, "capacity", least=0),
    "weight": _check_weight,
    "max_connections": partial(_check_number, "max_connections"),
    "max_opening": partial(_check_number, "max_opening"),
}


def audited(row: ServerRow | None) -> dict[str, Any]:
    """Return what the audit log has of a row."""
    return {} if row is None else {field: getattr(row, field) for field in _AUDITED}


__all__ = [
    "UNSET",
    "Unset",
    "audited",
    "check_fields",
    "check_name",
    "read_addresses",
]
