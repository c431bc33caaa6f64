"""The platform's configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tenancy_orm import TenancyConfig

from .models import Base

DEFAULTS = {
    "TENANCY_CONTROL_URL": "embedded:.tenancy",
    "TENANCY_MIGRATIONS": str(Path(__file__).with_name("migrations")),
}
"""Values that the environment can override."""


def create_config(environ: Mapping[str, str] = os.environ) -> TenancyConfig:
    """Return the configuration: ``DEFAULTS``, overridden by ``TENANCY_*`` variables."""
    return TenancyConfig.from_env({**DEFAULTS, **environ}, metadata=Base.metadata, extensions=("vector",))
