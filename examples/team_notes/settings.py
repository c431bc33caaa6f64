"""The application's configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from tenancy_orm import TenancyConfig

from .models import Base

ROLES = {
    "owner": ["*"],
    "manager": ["members:read", "members:write", "notes:read", "notes:write"],
    "editor": ["notes:read", "notes:write"],
    "reader": ["notes:read"],
}
"""The scopes that each role of a member gives."""

SHORTEST_SECRET = 32

DEFAULTS = {"TENANCY_CONTROL_URL": "embedded:.tenancy"}
"""Values that the environment can override."""


@dataclass(frozen=True)
class Settings:
    """What the application needs besides tenancy_orm's own settings.

    Args:
        session_secret: Signs the cookies. The same in every process; who knows it can log in as anybody.
        webhook_secret: Signs the payloads of the payment provider.
        people_url: The database of the people, ``postgresql+asyncpg://...``. None: one on the embedded server.
    """

    session_secret: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    people_url: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """Refuse to serve without secrets. They have no default: one that is in a repository is none."""
        secrets = {"SESSION_SECRET": self.session_secret, "WEBHOOK_SECRET": self.webhook_secret}
        short = [name for name, secret in secrets.items() if len(secret) < SHORTEST_SECRET]
        if short:
            raise RuntimeError(f"set {' and '.join(short)} to {SHORTEST_SECRET} random characters or more")


def create_config(environ: Mapping[str, str] = os.environ) -> TenancyConfig:
    """Return the configuration of tenancy_orm: ``DEFAULTS``, overridden by ``TENANCY_*`` variables."""
    return TenancyConfig.from_env({**DEFAULTS, **environ}, metadata=Base.metadata, members={"roles": ROLES})


def create_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the other settings; ``check`` them before anything is served."""
    return Settings(environ.get("SESSION_SECRET", ""), environ.get("WEBHOOK_SECRET", ""), environ.get("PEOPLE_URL"))
