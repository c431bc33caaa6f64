"""The ``TENANCY_*`` variables of a test run: none of them leads to production."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

NOWHERE = "postgresql://tests@127.0.0.1:1/use_the_fixture_tenancy"
"""What variables name until the tests' own server is known: nothing listens at port 1."""

_SECRETS = ("TENANCY_SECRETS_", "TENANCY_KEYS_PEPPER")
_SERVER_NAME = re.compile(r"(?:^|[\s,])([^\s,=.]+)(?:\.\w+)?=")


def hide_production() -> dict[str, str | None]:
    """Change the variables that say where production is, and return what they were: None where there was none."""
    changes: dict[str, str | None] = {"TENANCY_CONTROL_URL": NOWHERE, "TENANCY_CONTROL_LISTEN_URL": None}
    if servers := os.environ.get("TENANCY_SERVERS"):
        # the names stay: other settings refer to them
        names = dict.fromkeys(_SERVER_NAME.findall(servers))
        changes["TENANCY_SERVERS"] = " ".join(f"{name}={NOWHERE}" for name in names) or None
    changes |= {
        name: None for name in os.environ if name.startswith(_SECRETS) and name.upper() != "TENANCY_SECRETS_DIR"
    }
    return apply(changes)


def apply(changes: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables, or remove those that are None, and return what they were."""
    before = {name: os.environ.get(name) for name in changes}
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


__all__ = ["NOWHERE", "apply", "hide_production"]
