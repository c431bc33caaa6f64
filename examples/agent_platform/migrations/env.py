"""Alembic's environment for the tenants' databases: see README."""

from alembic import context

from examples.agent_platform.models import Base
from tenancy_orm import environment

environment.run(context, target_metadata=Base.metadata)
