"""Backups of tenants' databases, and the keys that they are encrypted with."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0024_backups"
down_revision = "0023_operations"
branch_labels = None
depends_on = None

TABLES = """
-- a tenant's own key: without it, its backups cannot be read
CREATE TABLE tenancy.backup_keys (
    id text CONSTRAINT backup_keys_pkey PRIMARY KEY,
    -- NULL: the control database's own
    tenant_id uuid CONSTRAINT backup_keys_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- the age recipient
    recipient text NOT NULL,
    -- the age identity; NULL once it is destroyed
    sealed_identity bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    destroyed_at timestamptz,
    CONSTRAINT backup_keys_destroyed_check CHECK ((sealed_identity IS NULL) = (destroyed_at IS NOT NULL))
);
CREATE INDEX backup_keys_tenant_id_idx ON tenancy.backup_keys (tenant_id, created_at);

CREATE TABLE tenancy.backups (
    id uuid CONSTRAINT backups_pkey PRIMARY KEY,
    -- NULL: of the control database
    tenant_id uuid CONSTRAINT backups_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- where the database was, for the cap on a server's backups at once
    server text,
    -- the store, without credentials, and where it is in there
    store text NOT NULL,
    path text NOT NULL,
    key_id text NOT NULL,
    state text NOT NULL DEFAULT 'running'
        CONSTRAINT backups_state_check CHECK (state IN ('running', 'done', 'failed', 'pruned')),
    -- the process that makes it, and until when nobody else does
    claim uuid,
    host text,
    claimed_until timestamptz,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    -- encrypted, in the store
    bytes bigint,
    manifest jsonb,
    error text,
    verified_at timestamptz,
    verify_error text,
    -- never pruned before; NULL: by the retention policy alone
    kept_until timestamptz,
    pruned_at timestamptz
);
CREATE INDEX backups_tenant_id_idx ON tenancy.backups (tenant_id, started_at);
CREATE INDEX backups_running_idx ON tenancy.backups (server) WHERE state = 'running';
-- one at a time of each tenant
CREATE UNIQUE INDEX backups_running_key ON tenancy.backups (COALESCE(tenant_id, '00000000-0000-0000-0000-000000000000'))
    WHERE state = 'running';
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.backup_keys', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.backups', 'tenant_id');
"""


def upgrade() -> None:
    """Add the tables."""
    statements = [TABLES, PROTECTION]
    for table in ("backup_keys", "backups"):
        statements.append(
            for_applications(f"CREATE POLICY %2$I ON tenancy.{table} FOR ALL TO %1$I USING (true) WITH CHECK (true)")
        )
        statements.append(for_applications(f"GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.{table} TO %1$I"))
    run_script("".join(statements))


def downgrade() -> None:
    """Remove them: backups in the stores cannot be read any more, unless their keys were exported."""
    run_script("DROP TABLE tenancy.backups; DROP TABLE tenancy.backup_keys;")
