"""Runs: the migrations of the fleet, and what they did to each tenant."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0020_migration_runs"
down_revision = "0019_jobs"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.migration_runs (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT migration_runs_pkey PRIMARY KEY,
    command text NOT NULL CONSTRAINT migration_runs_command_check
        CHECK (command IN ('upgrade', 'downgrade', 'stamp', 'extensions', 'undo')),
    target text NOT NULL,
    -- the run that this one undoes
    undoes bigint CONSTRAINT migration_runs_undoes_fkey REFERENCES tenancy.migration_runs (id),
    actor_kind text NOT NULL,
    actor_id text,
    host text NOT NULL,
    package_version text NOT NULL,
    -- the version of the application, where it is known
    code_version text,
    -- of the revisions and their options: a process with others must not take part
    fingerprint text NOT NULL,
    -- the arguments, the waves, the concurrency
    plan jsonb NOT NULL,
    state text NOT NULL DEFAULT 'running' CONSTRAINT migration_runs_state_check
        CHECK (state IN ('running', 'paused', 'done', 'failed', 'cancelled')),
    -- the wave that runs now, from 0; -1 while the run is prepared
    wave integer NOT NULL DEFAULT -1,
    -- the process that prepares the next wave, or ends the run
    gate uuid,
    -- why it is paused, or failed as a whole
    reason text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz
);

CREATE TABLE tenancy.migration_run_tenants (
    run bigint NOT NULL
        CONSTRAINT migration_run_tenants_run_fkey REFERENCES tenancy.migration_runs (id) ON DELETE CASCADE,
    tenant_id uuid NOT NULL
        CONSTRAINT migration_run_tenants_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    server text NOT NULL,
    wave integer NOT NULL DEFAULT 0,
    -- the order within its wave
    position integer NOT NULL,
    state text NOT NULL DEFAULT 'waiting' CONSTRAINT migration_run_tenants_state_check
        CHECK (state IN ('waiting', 'running', 'done', 'failed', 'skipped')),
    -- the revision that it is brought to, where each tenant has its own
    target text,
    -- the process that migrates it, or will; of a row that waits, it has not begun to
    claim uuid,
    host text,
    attempts integer NOT NULL DEFAULT 0,
    -- how often its process was lost
    losses integer NOT NULL DEFAULT 0,
    -- the revision that it had before this run; is_read from when that was read under the tenant's lock, just before
    -- the run's first change of it
    revision_before text,
    is_read boolean NOT NULL DEFAULT false,
    revision_after text,
    changed boolean NOT NULL DEFAULT false,
    started_at timestamptz,
    ended_at timestamptz,
    seconds double precision,
    sqlstate text,
    error text,
    -- what further parts of the run keep for this tenant: progress of data migrations, for example
    detail jsonb NOT NULL DEFAULT '{}',
    CONSTRAINT migration_run_tenants_pkey PRIMARY KEY (run, tenant_id)
);
-- what can be claimed
CREATE INDEX migration_run_tenants_waiting_idx ON tenancy.migration_run_tenants (run, server, wave, position)
    WHERE state = 'waiting' AND claim IS NULL;
CREATE INDEX migration_run_tenants_tenant_id_idx ON tenancy.migration_run_tenants (tenant_id);

CREATE TABLE tenancy.migration_run_processes (
    run bigint NOT NULL
        CONSTRAINT migration_run_processes_run_fkey REFERENCES tenancy.migration_runs (id) ON DELETE CASCADE,
    id uuid NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    -- how many tenants it may migrate at once, by server
    slots jsonb NOT NULL DEFAULT '{}',
    -- until when its tenants are its own, unless it renews that
    claimed_until timestamptz NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    left_at timestamptz,
    -- it did not renew its claims in time
    is_lost boolean NOT NULL DEFAULT false,
    CONSTRAINT migration_run_processes_pkey PRIMARY KEY (run, id)
);
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.migration_run_tenants', 'tenant_id');
"""


def upgrade() -> None:
    """Add the tables."""
    tables = "tenancy.migration_runs, tenancy.migration_run_tenants, tenancy.migration_run_processes"
    grant = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO %1$I"
    policy = "CREATE POLICY %2$I ON tenancy.migration_run_tenants FOR ALL TO %1$I USING (true) WITH CHECK (true)"
    run_script(TABLES + PROTECTION + for_applications(policy) + for_applications(grant))


def downgrade() -> None:
    """Drop the tables: what earlier runs did is forgotten, and cannot be undone as a run."""
    run_script("DROP TABLE tenancy.migration_run_processes, tenancy.migration_run_tenants, tenancy.migration_runs")
