"""Check values of the configured keys, so that another key under a known id is noticed when a process opens."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0012_key_checks"
down_revision = "0011_fleet_revision"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE tenancy.key_checks (
    kind text NOT NULL,
    id text NOT NULL,
    value bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, id),
    CONSTRAINT key_checks_kind_check CHECK (kind IN ('encryption', 'pepper')),
    CONSTRAINT key_checks_value_check CHECK (octet_length(value) = 32)
);
"""


def upgrade() -> None:
    """Add ``key_checks``; the first process that opens fills it."""
    run_script(TABLE + for_applications("GRANT SELECT, INSERT ON tenancy.key_checks TO %I"))


def downgrade() -> None:
    """Remove it."""
    run_script("DROP TABLE tenancy.key_checks")
