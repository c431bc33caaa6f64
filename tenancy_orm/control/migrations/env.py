"""Alembic environment of the control database; ``ControlDatabase.upgrade`` runs it with an open connection."""

from alembic import context

from tenancy_orm.control.models import SCHEMA, metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table="alembic_version",
    version_table_schema=SCHEMA,
    include_schemas=True,
)
with context.begin_transaction():
    context.run_migrations()
