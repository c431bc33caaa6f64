"""Jobs: work that one process at a time does, whichever claims it."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0019_jobs"
down_revision = "0018_tier_weights"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.jobs (
    name text CONSTRAINT jobs_pkey PRIMARY KEY CONSTRAINT jobs_name_check CHECK (length(name) BETWEEN 1 AND 200),
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- who does it now, and until when nobody else does
    claim uuid,
    host text,
    pid integer,
    claimed_until timestamptz,
    started_at timestamptz,
    ended_at timestamptz,
    -- how often in a row it failed, and with what
    failures integer NOT NULL DEFAULT 0,
    error text,
    result jsonb
);
CREATE INDEX jobs_due_at_idx ON tenancy.jobs (due_at);
"""


def upgrade() -> None:
    """Add the table."""
    run_script(TABLES + for_applications("GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.jobs TO %1$I"))


def downgrade() -> None:
    """Drop it: what is due is found again."""
    run_script("DROP TABLE tenancy.jobs")
