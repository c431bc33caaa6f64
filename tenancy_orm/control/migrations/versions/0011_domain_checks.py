"""When domains were looked up again, since when they have failed, and until when claims hold."""

from tenancy_orm.control.scripts import run_script

revision = "0011_domain_checks"
down_revision = "0010_metadata_index"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE tenancy.domains
    -- the last look-up of a verified domain
    ADD COLUMN checked_at timestamptz,
    -- the first look-up in a row that found no token, and how many there were since
    ADD COLUMN failing_since timestamptz,
    ADD COLUMN failures integer NOT NULL DEFAULT 0,
    -- when a verified domain became a claim again
    ADD COLUMN lapsed_at timestamptz;
CREATE INDEX domains_checked_at_idx ON tenancy.domains (coalesce(checked_at, verified_at))
    WHERE verified_at IS NOT NULL;
CREATE INDEX domains_claimed_at_idx ON tenancy.domains (greatest(created_at, lapsed_at)) WHERE verified_at IS NULL;

-- not at every look-up: only what another process may have cached
DROP TRIGGER domains_notify ON tenancy.domains;
CREATE TRIGGER domains_notify AFTER INSERT OR DELETE OR UPDATE OF domain, tenant_id, verified_at ON tenancy.domains
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_owner();
"""


def upgrade() -> None:
    """Add the columns."""
    run_script(UPGRADE)


def downgrade() -> None:
    """Remove them; a domain that has lapsed stays a claim."""
    run_script(
        """
        DROP TRIGGER domains_notify ON tenancy.domains;
        CREATE TRIGGER domains_notify AFTER INSERT OR UPDATE OR DELETE ON tenancy.domains
            FOR EACH ROW EXECUTE FUNCTION tenancy.notify_owner();
        ALTER TABLE tenancy.domains DROP COLUMN checked_at, DROP COLUMN failing_since, DROP COLUMN failures,
            DROP COLUMN lapsed_at;
        """
    )
