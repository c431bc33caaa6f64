"""Alembic's environment for the tenants' databases: see README."""

from alembic import context

from tenancy_orm import environment

# The application's tables, for `revision --autogenerate` and `check`. None means those of the setting `metadata`, in a
# settings file, in TENANCY_METADATA or in TenancyConfig(metadata=...). To name them here instead:
# from myapp.models import Base
# target_metadata = Base.metadata
target_metadata = None

environment.run(
    context,
    target_metadata=target_metadata,
    # any option of Alembic's context.configure() that does not choose the database:
    # transaction_per_migration=True,
    # compare_server_default=True,
    # include_object=...,
)
