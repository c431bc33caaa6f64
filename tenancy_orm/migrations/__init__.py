"""Alembic on one database of many: the scripts, and the schemas that new tenants are cloned from."""

from .checks import Check, Finding
from .preflight import PreflightOutcome, PreflightReport
from .schema import AlembicSchema, MetadataSchema
from .services import FleetServices
from .timeouts import timeouts

__all__ = [
    "AlembicSchema",
    "Check",
    "Finding",
    "FleetServices",
    "MetadataSchema",
    "PreflightOutcome",
    "PreflightReport",
    "timeouts",
]
