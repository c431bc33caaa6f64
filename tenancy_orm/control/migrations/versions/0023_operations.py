"""Operations on single tenants (restore, clone, adopt, move, export), and databases beside the one in use."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0023_operations"
down_revision = "0022_tenant_upgrades"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.operations (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT operations_pkey PRIMARY KEY,
    kind text NOT NULL
        CONSTRAINT operations_kind_check CHECK (kind IN ('restore', 'clone', 'adopt', 'move', 'export', 'erasure')),
    tenant_id uuid NOT NULL
        CONSTRAINT operations_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- 'waiting' for an operator's decision
    state text NOT NULL DEFAULT 'running'
        CONSTRAINT operations_state_check CHECK (state IN ('running', 'waiting', 'done', 'failed', 'undone')),
    -- the step that was begun last: what a process that takes over looks at
    step text NOT NULL,
    -- what the steps need and have found; no secrets
    detail jsonb NOT NULL DEFAULT '{}'::jsonb,
    actor_kind text NOT NULL,
    actor_id text,
    -- who does it now, and until when nobody else does
    claim uuid,
    host text,
    pid integer,
    claimed_until timestamptz,
    error text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz
);
CREATE INDEX operations_tenant_id_idx ON tenancy.operations (tenant_id, id);
-- one at a time of those that change where a tenant's data is
CREATE UNIQUE INDEX operations_unfinished_key ON tenancy.operations (tenant_id)
    WHERE state IN ('running', 'waiting') AND kind IN ('restore', 'adopt', 'move');

-- beside the one in use, which the tenant's own row names
CREATE TABLE tenancy.tenant_databases (
    server text NOT NULL
        CONSTRAINT tenant_databases_server_fkey REFERENCES tenancy.servers (name),
    name text NOT NULL,
    tenant_id uuid NOT NULL
        CONSTRAINT tenant_databases_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- the operation that makes it, or has left it behind
    operation bigint
        CONSTRAINT tenant_databases_operation_fkey REFERENCES tenancy.operations (id) ON DELETE SET NULL,
    -- the role that uses it, or would
    role_name text NOT NULL,
    schema_revision text,
    -- 'kept' is what a switch has left behind, and what it can go back to
    state text NOT NULL CONSTRAINT tenant_databases_state_check CHECK (state IN ('making', 'kept', 'dropping')),
    -- NULL: until somebody decides
    kept_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT tenant_databases_pkey PRIMARY KEY (server, name)
);
CREATE INDEX tenant_databases_tenant_id_idx ON tenancy.tenant_databases (tenant_id);
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.operations', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.tenant_databases', 'tenant_id');
"""


def upgrade() -> None:
    """Add the tables."""
    statements = [TABLES, PROTECTION]
    for table in ("operations", "tenant_databases"):
        statements.append(
            for_applications(f"CREATE POLICY %2$I ON tenancy.{table} FOR ALL TO %1$I USING (true) WITH CHECK (true)")
        )
        statements.append(for_applications(f"GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.{table} TO %1$I"))
    run_script("".join(statements))


def downgrade() -> None:
    """Remove them: the databases that they name are reported by reconcile as unknown from then on."""
    run_script("DROP TABLE tenancy.tenant_databases; DROP TABLE tenancy.operations;")
