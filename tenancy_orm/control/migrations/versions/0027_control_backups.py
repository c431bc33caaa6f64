"""The application's role can back the control database up: it may read sequences. Erasures know what was copied."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0027_control_backups"
down_revision = "0026_usage_headroom"
branch_labels = None
depends_on = None

ORIGINS = """
ALTER TABLE tenancy.tenants
    -- the tenant that its first contents were copied from, which an erasure names; null: none
    ADD COLUMN copied_from uuid;
ALTER TABLE tenancy.backups
    -- the processes that have it decrypted: for each its host, and until when unless it renews that
    ADD COLUMN readers jsonb;
"""


def upgrade() -> None:
    """Grant the sequences to the application's roles; add what erasures look at."""
    run_script(for_applications("GRANT SELECT ON ALL SEQUENCES IN SCHEMA tenancy TO %1$I") + ORIGINS)


def downgrade() -> None:
    """Take it back: only the owner of the tables can back the control database up."""
    run_script(for_applications("REVOKE SELECT ON ALL SEQUENCES IN SCHEMA tenancy FROM %1$I"))
    run_script("ALTER TABLE tenancy.tenants DROP COLUMN copied_from; ALTER TABLE tenancy.backups DROP COLUMN readers;")
