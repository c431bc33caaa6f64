"""How the platform is configured."""

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
"""What holds where the environment does not say otherwise."""


def create_config(environ: Mapping[str, str] = os.environ) -> TenancyConfig:
    """Read the configuration: ``TENANCY_*`` variables over ``DEFAULTS``."""
    return TenancyConfig.from_env({**DEFAULTS, **environ}, metadata=Base.metadata, extensions=("vector",))
