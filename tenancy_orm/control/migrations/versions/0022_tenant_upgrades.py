"""Upgrades of single tenants before their use, and what a migration that runs brings a tenant to."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0022_tenant_upgrades"
down_revision = "0021_warm_databases"
branch_labels = None
depends_on = None

TABLES = """
ALTER TABLE tenancy.tenants
    -- the revision that a migration brings it to now ('base' for none), and until when that can last
    ADD COLUMN migrating_to text,
    ADD COLUMN migrating_until timestamptz,
    -- when an operator last moved it to another revision than by an upgrade; NULL since its next upgrade
    ADD COLUMN held_at timestamptz;

-- an upgrade before a tenant's use that runs now, or has failed
CREATE TABLE tenancy.tenant_upgrades (
    tenant_id uuid CONSTRAINT tenant_upgrades_pkey PRIMARY KEY
        CONSTRAINT tenant_upgrades_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    target text NOT NULL,
    -- who does it now, and until when nobody else does
    claim uuid,
    host text,
    claimed_until timestamptz,
    -- how often in a row it has failed, with what, and until when it is not tried again
    failures integer NOT NULL DEFAULT 0,
    error text,
    sqlstate text,
    failed_at timestamptz,
    next_at timestamptz
);
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.tenant_upgrades', 'tenant_id');
"""


def upgrade() -> None:
    """Add the table and the columns."""
    policy = "CREATE POLICY %2$I ON tenancy.tenant_upgrades FOR ALL TO %1$I USING (true) WITH CHECK (true)"
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.tenant_upgrades TO %1$I"
    run_script(TABLES + PROTECTION + for_applications(policy) + for_applications(grant))


def downgrade() -> None:
    """Remove them: a tenant that an operator has moved back may be upgraded before its use again."""
    run_script(
        """
        DROP TABLE tenancy.tenant_upgrades;
        ALTER TABLE tenancy.tenants DROP COLUMN migrating_to, DROP COLUMN migrating_until, DROP COLUMN held_at;
        """
    )
