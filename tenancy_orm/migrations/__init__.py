"""Alembic over the fleet: the schemas of all tenants, and of the templates that new tenants are cloned from."""

from .catch_up import CatchUpReport
from .fleet import FleetMigrator
from .report import FleetReport, Progress, TenantOutcome
from .schema import AlembicSchema, MetadataSchema
from .services import FleetServices
from .status import TenantRevision

__all__ = [
    "AlembicSchema",
    "CatchUpReport",
    "FleetMigrator",
    "FleetReport",
    "FleetServices",
    "MetadataSchema",
    "Progress",
    "TenantOutcome",
    "TenantRevision",
]
