"""Scheduled changes of a tenant, former slugs that redirect to it, and its own domains."""

from tenancy_orm.control.scripts import run_script

revision = "0005_lifecycle"
down_revision = "0004_keys"
branch_labels = None
depends_on = None

TABLES = """
ALTER TABLE tenancy.tenants
    -- the status and reason of a tenant before its maintenance
    ADD COLUMN former_status text CONSTRAINT tenants_former_status_check CHECK (
        former_status IN ('trial', 'active', 'suspended')),
    ADD COLUMN former_reason text,
    ADD COLUMN suspend_at timestamptz,
    ADD COLUMN suspend_reason text,
    ADD COLUMN purge_at timestamptz;
CREATE INDEX tenants_suspend_at_idx ON tenancy.tenants (suspend_at)
    WHERE suspend_at IS NOT NULL AND status IN ('trial', 'active', 'maintenance');
CREATE INDEX tenants_trial_ends_at_idx ON tenancy.tenants (trial_ends_at) WHERE status = 'trial';
CREATE INDEX tenants_purge_at_idx ON tenancy.tenants (coalesce(purge_at, deleted_at)) WHERE status = 'deleted';

-- a slug that a tenant had before it was renamed redirects to it, and is refused to others, until this time
CREATE TABLE tenancy.former_slugs (
    slug text CONSTRAINT former_slugs_pkey PRIMARY KEY,
    tenant_id uuid NOT NULL
        CONSTRAINT former_slugs_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    redirects_until timestamptz NOT NULL
);
CREATE INDEX former_slugs_tenant_id_idx ON tenancy.former_slugs (tenant_id);

-- any number of tenants may claim a domain, each with its own token; only one of them can verify it
CREATE TABLE tenancy.domains (
    domain text NOT NULL CONSTRAINT domains_domain_check CHECK (
        length(domain) <= 253
        AND domain ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+$'),
    tenant_id uuid NOT NULL
        CONSTRAINT domains_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    token text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    verified_at timestamptz,
    CONSTRAINT domains_pkey PRIMARY KEY (domain, tenant_id)
);
CREATE UNIQUE INDEX domains_verified_key ON tenancy.domains (domain) WHERE verified_at IS NOT NULL;
CREATE INDEX domains_tenant_id_idx ON tenancy.domains (tenant_id);
"""

FUNCTIONS = """
CREATE FUNCTION tenancy.reserve_slug() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_owner uuid;
    v_slug text;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.slug = OLD.slug THEN
        RETURN NEW;
    END IF;
    -- the transaction that gives a slug up and the one that takes it wait here for each other; locks are taken in one
    -- order, so that crossing renames cannot deadlock
    FOR v_slug IN
        SELECT s FROM unnest(ARRAY[NEW.slug, CASE WHEN TG_OP = 'UPDATE' THEN OLD.slug END]) AS u (s)
        WHERE s IS NOT NULL ORDER BY s
    LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended('tenancy.slug:' || v_slug, 0));
    END LOOP;
    SELECT tenant_id INTO v_owner FROM tenancy.former_slugs
    WHERE slug = NEW.slug AND redirects_until > now() AND tenant_id <> NEW.id;
    IF FOUND THEN
        RAISE EXCEPTION 'the slug still redirects to a renamed tenant'
            USING ERRCODE = '23505', CONSTRAINT = 'former_slugs_pkey', SCHEMA = 'tenancy', TABLE = 'former_slugs';
    END IF;
    DELETE FROM tenancy.former_slugs WHERE slug = NEW.slug;
    RETURN NEW;
END $$;
CREATE TRIGGER tenants_reserve_slug BEFORE INSERT OR UPDATE OF slug ON tenancy.tenants
    FOR EACH ROW EXECUTE FUNCTION tenancy.reserve_slug();

CREATE FUNCTION tenancy.notify_owner() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object(
        't', coalesce(NEW.tenant_id, OLD.tenant_id), 'k', NULL, 'c', 'tenant')::text);
    RETURN NULL;
END $$;
CREATE TRIGGER former_slugs_notify AFTER INSERT OR UPDATE OR DELETE ON tenancy.former_slugs
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_owner();
CREATE TRIGGER domains_notify AFTER INSERT OR UPDATE OR DELETE ON tenancy.domains
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_owner();
"""


def upgrade() -> None:
    """Add schedules, former slugs and domains."""
    run_script(TABLES + FUNCTIONS)


def downgrade() -> None:
    """Remove them."""
    run_script(
        """
        DROP TRIGGER tenants_reserve_slug ON tenancy.tenants;
        DROP TABLE tenancy.domains, tenancy.former_slugs;
        DROP FUNCTION tenancy.reserve_slug, tenancy.notify_owner;
        DROP INDEX tenancy.tenants_trial_ends_at_idx;
        ALTER TABLE tenancy.tenants DROP COLUMN former_status, DROP COLUMN former_reason,
            DROP COLUMN suspend_at, DROP COLUMN suspend_reason, DROP COLUMN purge_at;
        """
    )
