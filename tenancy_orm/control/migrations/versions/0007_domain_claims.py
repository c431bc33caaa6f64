"""Any number of tenants may claim a domain, each with a token of its own; one of them can verify it."""

from tenancy_orm.control.scripts import run_script

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Key claims by domain and tenant, and verified domains by their name alone."""
    run_script(
        """
        ALTER TABLE tenancy.domains DROP CONSTRAINT domains_pkey;
        ALTER TABLE tenancy.domains ADD CONSTRAINT domains_pkey PRIMARY KEY (domain, tenant_id);
        CREATE UNIQUE INDEX domains_verified_key ON tenancy.domains (domain) WHERE verified_at IS NOT NULL;
        """
    )


def downgrade() -> None:
    """Keep the verified claim of each domain, or the oldest."""
    run_script(
        """
        DELETE FROM tenancy.domains AS d USING tenancy.domains AS o
        WHERE o.domain = d.domain AND o.tenant_id <> d.tenant_id
            AND (o.verified_at IS NULL, o.created_at, o.tenant_id) < (d.verified_at IS NULL, d.created_at, d.tenant_id);
        DROP INDEX tenancy.domains_verified_key;
        ALTER TABLE tenancy.domains DROP CONSTRAINT domains_pkey;
        ALTER TABLE tenancy.domains ADD CONSTRAINT domains_pkey PRIMARY KEY (domain);
        """
    )
