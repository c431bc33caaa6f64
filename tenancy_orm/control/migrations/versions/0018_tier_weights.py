"""The weights of tiers, by which their tenants share connections."""

from tenancy_orm.control.scripts import run_script

revision = "0018_tier_weights"
down_revision = "0016_connection_leases"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE tenancy.tiers ADD COLUMN weight double precision NOT NULL DEFAULT 1
    CONSTRAINT tiers_weight_check CHECK (weight > 0);

-- every process shares its connections by them
DROP TRIGGER tiers_notify ON tenancy.tiers;
CREATE TRIGGER tiers_notify AFTER UPDATE OF limits, weight ON tenancy.tiers
    FOR EACH ROW WHEN (OLD.limits IS DISTINCT FROM NEW.limits OR OLD.weight IS DISTINCT FROM NEW.weight)
    EXECUTE FUNCTION tenancy.notify_tier();
"""

DOWNGRADE = """
DROP TRIGGER tiers_notify ON tenancy.tiers;
CREATE TRIGGER tiers_notify AFTER UPDATE OF limits ON tenancy.tiers
    FOR EACH ROW WHEN (OLD.limits IS DISTINCT FROM NEW.limits) EXECUTE FUNCTION tenancy.notify_tier();
ALTER TABLE tenancy.tiers DROP COLUMN weight;
"""


def upgrade() -> None:
    """Add the column."""
    run_script(UPGRADE)


def downgrade() -> None:
    """Drop it: tiers weigh the same then."""
    run_script(DOWNGRADE)
