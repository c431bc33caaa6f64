"""Warm databases: cloned ahead of need, with their roles, until a creation claims them."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0021_warm_databases"
down_revision = "0020_migration_runs"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.warm_databases (
    -- of the database, and of its role
    name text CONSTRAINT warm_databases_pkey PRIMARY KEY,
    server text NOT NULL
        CONSTRAINT warm_databases_server_fkey REFERENCES tenancy.servers (name) ON DELETE CASCADE,
    -- the template that it was cloned from
    template text NOT NULL,
    -- a digest of all that decides what a new tenant's database is like: a creation claims those of its own recipe
    recipe text NOT NULL,
    revision text,
    -- only a 'ready' one can be claimed; one that stays in another state is removed
    state text NOT NULL DEFAULT 'making'
        CONSTRAINT warm_databases_state_check CHECK (state IN ('making', 'ready', 'dropping')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- when a process with this recipe last asked for it; others drop it some time later
    wanted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX warm_databases_server_idx ON tenancy.warm_databases (server, recipe, state, created_at);
"""


def upgrade() -> None:
    """Add the table."""
    run_script(TABLES + for_applications("GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.warm_databases TO %1$I"))


def downgrade() -> None:
    """Drop it: what is left on the servers is removed by reconcile."""
    run_script("DROP TABLE tenancy.warm_databases")
