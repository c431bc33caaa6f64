"""What each template was built from, and when a process used it last."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0010_templates"
down_revision = "0009_domain_checks"
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


def upgrade() -> None:
    """Create the table; templates that exist are entered when housekeeping finds them."""
    run_script(TABLE + for_applications("GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.templates TO %I"))


def downgrade() -> None:
    """Drop the table; the templates themselves stay."""
    run_script("DROP TABLE tenancy.templates")
