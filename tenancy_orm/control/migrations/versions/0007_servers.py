"""Servers: the maintenance database in which administrators take their advisory locks."""

from tenancy_orm.control.scripts import run_script

revision = "0007_servers"
down_revision = "0006_row_security"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the first process that opens afterwards fills it."""
    run_script("ALTER TABLE tenancy.servers ADD COLUMN maintenance_database text")


def downgrade() -> None:
    """Drop the column."""
    run_script("ALTER TABLE tenancy.servers DROP COLUMN maintenance_database")
