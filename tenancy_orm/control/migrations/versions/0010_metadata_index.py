"""An index of tenants' metadata, by which webhooks find them."""

from tenancy_orm.control.scripts import run_script

revision = "0010_metadata_index"
down_revision = "0007_servers"
branch_labels = None
depends_on = None

UPGRADE = """
-- for containment (@>) alone; without a list of pending entries, which every look-up would have to read
CREATE INDEX tenants_metadata_idx ON tenancy.tenants USING gin (metadata jsonb_path_ops) WITH (fastupdate = false);
"""


def upgrade() -> None:
    """Create the index."""
    run_script(UPGRADE)


def downgrade() -> None:
    """Drop it."""
    run_script("DROP INDEX tenancy.tenants_metadata_idx")
