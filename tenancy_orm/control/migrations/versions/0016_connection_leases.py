"""The connections of each server that each process may have, and what the servers accept."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0016_connection_leases"
down_revision = "0015_servers"
branch_labels = None
depends_on = None

TABLES = """
-- Its row is locked while the connections of a server are divided. A server is the name of one, or of a replica.
CREATE TABLE tenancy.connection_caps (
    server text CONSTRAINT connection_caps_pkey PRIMARY KEY,
    -- what the server accepts, less what it reserves
    accepted integer,
    -- connections of others than the processes, as they were counted last
    others integer,
    counted_at timestamptz
);

CREATE TABLE tenancy.connection_leases (
    server text NOT NULL
        CONSTRAINT connection_leases_server_fkey REFERENCES tenancy.connection_caps (server) ON DELETE CASCADE,
    process uuid NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    granted integer NOT NULL CONSTRAINT connection_leases_granted_check CHECK (granted >= 0),
    -- how many of them it keeps while it cannot reach this database
    guaranteed integer NOT NULL,
    wanted integer NOT NULL,
    in_use integer NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    -- set while its connections are being ended: it cannot be renewed any more
    ending_at timestamptz,
    CONSTRAINT connection_leases_pkey PRIMARY KEY (server, process)
);
"""


def upgrade() -> None:
    """Add the tables."""
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.connection_caps, tenancy.connection_leases TO %1$I"
    run_script(TABLES + for_applications(grant))


def downgrade() -> None:
    """Drop the tables: each process of the former version has a limit of its own."""
    run_script("DROP TABLE tenancy.connection_leases, tenancy.connection_caps")
