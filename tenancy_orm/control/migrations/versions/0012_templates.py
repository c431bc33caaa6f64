"""What each template was built from, and when a process used it last."""

from tenancy_orm.control.scripts import run_script

revision = "0012_templates"
down_revision = "0011_domain_checks"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE tenancy.templates (
    server text NOT NULL,
    name text NOT NULL,
    -- the digest of what is known before a build: revisions, extensions, rights
    base text NOT NULL,
    revision text,
    -- the further files that the build used, each with its digest
    inputs jsonb NOT NULL,
    built_at timestamptz DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    last_used_by text,
    -- replaced by a rebuild
    retired boolean NOT NULL DEFAULT false,
    CONSTRAINT templates_pkey PRIMARY KEY (server, name)
);
CREATE INDEX templates_base_idx ON tenancy.templates (server, base);
"""

# roles that were granted the application's rights before this revision
GRANTS = """
DO $$
DECLARE
    v_role name;
BEGIN
    FOR v_role IN
        SELECT r.rolname FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        JOIN pg_roles AS r ON r.oid = a.grantee
        WHERE c.oid = 'tenancy.tenants'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.templates TO %I', v_role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    """Create the table; templates that exist are entered when housekeeping finds them."""
    run_script(TABLE + GRANTS)


def downgrade() -> None:
    """Drop the table; the templates themselves stay."""
    run_script("DROP TABLE tenancy.templates")
