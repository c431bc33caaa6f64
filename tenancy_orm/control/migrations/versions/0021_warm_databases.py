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


# A tenant becomes active in its database, as its role, with its password: what a process has opened for it is right.
FUNCTIONS = """
CREATE OR REPLACE FUNCTION tenancy.notify_tenant() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    v_kind text := 'tenant';
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.status = 'provisioning' AND NEW.status <> 'provisioning'
        AND (OLD.slug, OLD.tier, OLD.server, OLD.database_name, OLD.role_name, OLD.sealed_password)
            = (NEW.slug, NEW.tier, NEW.server, NEW.database_name, NEW.role_name, NEW.sealed_password) THEN
        v_kind := 'created';
    END IF;
    PERFORM pg_notify('tenancy', jsonb_build_object('t', OLD.id, 'k', NULL, 'c', v_kind)::text);
    RETURN NULL;
END $$;
"""

FORMER_FUNCTIONS = """
CREATE OR REPLACE FUNCTION tenancy.notify_tenant() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object('t', OLD.id, 'k', NULL, 'c', 'tenant')::text);
    RETURN NULL;
END $$;
"""


def upgrade() -> None:
    """Add the table, and tell a creation from other changes of a tenant."""
    run_script(
        TABLES + FUNCTIONS + for_applications("GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.warm_databases TO %1$I")
    )


def downgrade() -> None:
    """Drop it: what is left on the servers is removed by reconcile."""
    run_script("DROP TABLE tenancy.warm_databases;" + FORMER_FUNCTIONS)
