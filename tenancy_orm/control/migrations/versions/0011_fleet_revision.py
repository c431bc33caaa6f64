"""The fleet's revision: what the last successful migration of all tenants brought about."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0011_fleet_revision"
down_revision = "0010_templates"
branch_labels = None
depends_on = None

UPGRADE = """
-- one row; no revision where it is not known, as after a migration that failed for a tenant
CREATE TABLE tenancy.fleet_revision (
    singleton boolean PRIMARY KEY DEFAULT true CONSTRAINT fleet_revision_singleton_check CHECK (singleton),
    revision text,
    set_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO tenancy.fleet_revision DEFAULT VALUES;

-- when a migration last changed the tenant's revision; NULL: it has the revision that it was created with
ALTER TABLE tenancy.tenants ADD COLUMN migrated_at timestamptz;
"""


def upgrade() -> None:
    """Add the fleet's revision."""
    run_script(UPGRADE + for_applications("GRANT SELECT, UPDATE ON tenancy.fleet_revision TO %I"))


def downgrade() -> None:
    """Remove it."""
    run_script("DROP TABLE tenancy.fleet_revision; ALTER TABLE tenancy.tenants DROP COLUMN migrated_at")
