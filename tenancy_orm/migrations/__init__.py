"""Alembic on one database of many: the scripts, and the schemas that new tenants are cloned from."""

from .schema import AlembicSchema, MetadataSchema
from .services import FleetServices

__all__ = ["AlembicSchema", "FleetServices", "MetadataSchema"]
