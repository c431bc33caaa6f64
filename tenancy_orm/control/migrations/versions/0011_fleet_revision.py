"""The fleet's revision: what the last successful migration of all tenants brought about."""

from tenancy_orm.control.scripts import run_script

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

-- roles that were granted the application's rights before this revision
DO $$
DECLARE
    v_role record;
BEGIN
    FOR v_role IN
        SELECT r.rolname FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        JOIN pg_roles AS r ON r.oid = a.grantee
        WHERE c.oid = 'tenancy.tenants'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT, UPDATE ON tenancy.fleet_revision TO %I', v_role.rolname);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    """Add the fleet's revision."""
    run_script(UPGRADE)


def downgrade() -> None:
    """Remove it."""
    run_script("DROP TABLE tenancy.fleet_revision; ALTER TABLE tenancy.tenants DROP COLUMN migrated_at")
