"""Switches of tenants to another database: until when a tenant's sessions wait."""

from tenancy_orm.control.scripts import run_script

revision = "0025_switches"
down_revision = "0024_backups"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE tenancy.tenants
    -- until when its sessions wait, since its database is being exchanged for another one
    ADD COLUMN paused_until timestamptz;
"""

# What is open goes on in the other database: a pause is no change of the tenant that would end it.
FUNCTIONS = """
CREATE FUNCTION tenancy.notify_pause() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object(
        't', NEW.id, 'k', NULL, 'c', CASE WHEN NEW.paused_until IS NULL THEN 'tenant' ELSE 'paused' END)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER tenants_notify_pause AFTER UPDATE OF paused_until ON tenancy.tenants
    FOR EACH ROW WHEN (OLD.paused_until IS DISTINCT FROM NEW.paused_until)
    EXECUTE FUNCTION tenancy.notify_pause();
"""


def upgrade() -> None:
    """Add the column, and the notification that all processes receive."""
    run_script(COLUMNS + FUNCTIONS)


def downgrade() -> None:
    """Remove them: nobody waits any more, and a switch under way ends sessions instead."""
    run_script(
        """
        DROP TRIGGER tenants_notify_pause ON tenancy.tenants;
        DROP FUNCTION tenancy.notify_pause;
        ALTER TABLE tenancy.tenants DROP COLUMN paused_until;
        """
    )
