"""Seeds and reference data: the rows that a tenant is born with, and how existing tenants get them."""

from __future__ import annotations

from .definition import Seed, seed
from .manager import SeedManager
from .report import SeedOutcome, SeedProgress, SeedReport, SeedStatus

__all__ = ["Seed", "SeedManager", "SeedOutcome", "SeedProgress", "SeedReport", "SeedStatus", "seed"]
