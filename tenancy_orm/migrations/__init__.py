"""Alembic on one database of many: the scripts, and the schemas that new tenants are cloned from."""

from .checks import Check, Finding
from .data_batches import DataProgress
from .data_migrations import Batch, DataMigration, data_migration
from .preflight import PreflightOutcome, PreflightReport
from .schema import AlembicSchema, MetadataSchema
from .services import FleetServices
from .timeouts import timeouts

__all__ = [
    "AlembicSchema",
    "Batch",
    "Check",
    "DataMigration",
    "DataProgress",
    "Finding",
    "FleetServices",
    "MetadataSchema",
    "PreflightOutcome",
    "PreflightReport",
    "data_migration",
    "timeouts",
]
