"""Schedules per tenant: what was sent to whom, and what is being sent."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0014_schedules"
down_revision = "0013_members"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.schedules (
    name text CONSTRAINT schedules_pkey PRIMARY KEY
        CONSTRAINT schedules_name_check CHECK (length(name) BETWEEN 1 AND 100),
    -- nothing is due before
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenancy.schedule_runs (
    schedule text NOT NULL
        CONSTRAINT schedule_runs_schedule_fkey REFERENCES tenancy.schedules (name) ON DELETE CASCADE,
    tenant_id uuid NOT NULL
        CONSTRAINT schedule_runs_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- the time that was sent last
    sent_for timestamptz,
    sent_at timestamptz,
    -- the time that somebody is sending now, until when nobody else does, and who
    claimed_for timestamptz,
    claimed_until timestamptz,
    claim uuid,
    -- how often sending it was begun
    attempts integer NOT NULL DEFAULT 0,
    CONSTRAINT schedule_runs_pkey PRIMARY KEY (schedule, tenant_id)
);
CREATE INDEX schedule_runs_tenant_id_idx ON tenancy.schedule_runs (tenant_id);
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.schedule_runs', 'tenant_id');
"""


def upgrade() -> None:
    """Add the tables."""
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.schedules, tenancy.schedule_runs TO %1$I"
    policy = "CREATE POLICY %2$I ON tenancy.schedule_runs FOR ALL TO %1$I USING (true) WITH CHECK (true)"
    run_script(TABLES + PROTECTION + for_applications(policy) + for_applications(grant))


def downgrade() -> None:
    """Drop the tables: what was sent is forgotten, and is due again only from the next time on."""
    run_script("DROP TABLE tenancy.schedule_runs, tenancy.schedules")
