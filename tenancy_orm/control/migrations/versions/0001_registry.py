"""Tenants, their servers, tiers and keys, with the checks and triggers that guard them."""

from tenancy_orm.control.scripts import run_script

revision = "0001_registry"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.installation (
    singleton boolean NOT NULL DEFAULT true CONSTRAINT installation_pkey PRIMARY KEY
        CONSTRAINT installation_singleton_check CHECK (singleton),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenancy.servers (
    name text CONSTRAINT servers_pkey PRIMARY KEY,
    host text NOT NULL,
    port integer NOT NULL,
    accepts_tenants boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenancy.tiers (
    name text CONSTRAINT tiers_pkey PRIMARY KEY
        CONSTRAINT tiers_name_check CHECK (name ~ '^[a-z][a-z0-9_-]{0,30}$'),
    rank integer NOT NULL DEFAULT 0,
    limits jsonb NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenancy.tenants (
    id uuid CONSTRAINT tenants_pkey PRIMARY KEY,
    slug text NOT NULL CONSTRAINT tenants_slug_check CHECK (slug ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    status text NOT NULL CONSTRAINT tenants_status_check CHECK (
        status IN ('provisioning', 'trial', 'active', 'suspended', 'maintenance', 'deleted', 'purged')),
    tier text NOT NULL
        CONSTRAINT tenants_tier_fkey REFERENCES tenancy.tiers (name)
        CONSTRAINT tenants_tier_check CHECK (tier ~ '^[a-z][a-z0-9_-]{0,30}$'),
    server text NOT NULL CONSTRAINT tenants_server_fkey REFERENCES tenancy.servers (name),
    database_name text NOT NULL,
    role_name text NOT NULL,
    sealed_password bytea,
    schema_revision text,
    metadata jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT tenants_metadata_check CHECK (jsonb_typeof(metadata) = 'object'),
    quotas jsonb NOT NULL DEFAULT '{}' CONSTRAINT tenants_quotas_check CHECK (jsonb_typeof(quotas) = 'object'),
    reason text,
    timezone text NOT NULL DEFAULT 'UTC',
    trial_ends_at timestamptz,
    next_status text CONSTRAINT tenants_next_status_check CHECK (
        next_status IN ('trial', 'active', 'suspended', 'maintenance')),
    step text,
    step_error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    purge_started_at timestamptz,
    purged_at timestamptz,
    CONSTRAINT tenants_sealed_password_check CHECK (status = 'purged' OR sealed_password IS NOT NULL),
    CONSTRAINT tenants_deleted_at_check CHECK ((status IN ('deleted', 'purged')) = (deleted_at IS NOT NULL))
);
CREATE UNIQUE INDEX tenants_slug_key ON tenancy.tenants (slug) WHERE status <> 'purged';
CREATE UNIQUE INDEX tenants_database_name_key ON tenancy.tenants (server, database_name);
CREATE INDEX tenants_status_id_idx ON tenancy.tenants (status, id);
CREATE INDEX tenants_tier_id_idx ON tenancy.tenants (tier, id);
CREATE INDEX tenants_unfinished_idx ON tenancy.tenants (id)
    WHERE status = 'provisioning' OR (status = 'deleted' AND purge_started_at IS NOT NULL);

CREATE TABLE tenancy.api_keys (
    id text CONSTRAINT api_keys_pkey PRIMARY KEY CONSTRAINT api_keys_id_check CHECK (id ~ '^[0-9A-Za-z]{16}$'),
    tenant_id uuid NOT NULL
        CONSTRAINT api_keys_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    name text NOT NULL DEFAULT '',
    prefix text NOT NULL DEFAULT '',
    digest bytea NOT NULL CONSTRAINT api_keys_digest_check CHECK (octet_length(digest) = 32),
    digest_version text NOT NULL DEFAULT '0',
    scopes text[] NOT NULL DEFAULT '{}',
    networks cidr[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    revoked_reason text,
    last_used_at timestamptz,
    rotated_from text
);
CREATE INDEX api_keys_tenant_id_idx ON tenancy.api_keys (tenant_id, created_at);
"""

# A test compares this with lifecycle.TRANSITIONS, so that code and database cannot drift apart unnoticed.
TRANSITIONS = """
CREATE TABLE tenancy.status_transitions (
    before text NOT NULL,
    after text NOT NULL,
    CONSTRAINT status_transitions_pkey PRIMARY KEY (before, after)
);
INSERT INTO tenancy.status_transitions VALUES
    ('provisioning', 'trial'), ('provisioning', 'active'),
    ('trial', 'active'), ('trial', 'suspended'), ('trial', 'maintenance'), ('trial', 'deleted'),
    ('active', 'suspended'), ('active', 'maintenance'), ('active', 'deleted'),
    ('suspended', 'trial'), ('suspended', 'active'), ('suspended', 'maintenance'), ('suspended', 'deleted'),
    ('maintenance', 'trial'), ('maintenance', 'active'), ('maintenance', 'suspended'), ('maintenance', 'deleted'),
    ('deleted', 'trial'), ('deleted', 'active'), ('deleted', 'suspended'), ('deleted', 'maintenance'),
    ('deleted', 'purged');
"""

FUNCTIONS = """
CREATE FUNCTION tenancy.tenants_guard() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.status <> 'provisioning' THEN
            RAISE EXCEPTION 'a new tenant must have the status provisioning, not %', NEW.status
                USING ERRCODE = 'TN001', TABLE = 'tenants', COLUMN = 'status';
        END IF;
        RETURN NEW;
    END IF;
    IF TG_OP = 'DELETE' THEN
        -- only the row of an unfinished creation is deleted; every other tenant leaves a tombstone
        IF OLD.status <> 'provisioning' THEN
            RAISE EXCEPTION 'tenant % is % and cannot be deleted; purge it, which keeps a tombstone', OLD.id, OLD.status
                USING ERRCODE = 'TN002', TABLE = 'tenants';
        END IF;
        RETURN OLD;
    END IF;
    IF NEW.id <> OLD.id THEN
        RAISE EXCEPTION 'the id of a tenant cannot change' USING ERRCODE = 'TN002', TABLE = 'tenants', COLUMN = 'id';
    END IF;
    NEW.created_at := OLD.created_at;
    IF NEW IS NOT DISTINCT FROM OLD THEN
        RETURN NEW;
    END IF;
    IF NEW.status <> OLD.status THEN
        IF NOT EXISTS (
            SELECT 1 FROM tenancy.status_transitions WHERE before = OLD.status AND after = NEW.status
        ) OR (OLD.purge_started_at IS NOT NULL AND NEW.status <> 'purged') THEN
            RAISE EXCEPTION 'a tenant cannot change from % to %', OLD.status, NEW.status
                USING ERRCODE = 'TN001', TABLE = 'tenants', COLUMN = 'status';
        END IF;
        IF NEW.status = 'deleted' THEN
            NEW.deleted_at := now();
        ELSIF NEW.status <> 'purged' THEN
            NEW.deleted_at := NULL;
        END IF;
        IF NEW.status = 'purged' THEN
            NEW.purged_at := now();
        END IF;
    END IF;
    NEW.updated_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER tenants_guard BEFORE INSERT OR UPDATE OR DELETE ON tenancy.tenants
    FOR EACH ROW EXECUTE FUNCTION tenancy.tenants_guard();

CREATE FUNCTION tenancy.notify_tenant() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    v_kind text := 'tenant';
BEGIN
    -- a tenant becomes active in its database, as its role, with its password: what a process has opened is right
    IF TG_OP = 'UPDATE' AND OLD.status = 'provisioning' AND NEW.status <> 'provisioning'
        AND (OLD.slug, OLD.tier, OLD.server, OLD.database_name, OLD.role_name, OLD.sealed_password)
            = (NEW.slug, NEW.tier, NEW.server, NEW.database_name, NEW.role_name, NEW.sealed_password) THEN
        v_kind := 'created';
    END IF;
    PERFORM pg_notify('tenancy', jsonb_build_object('t', OLD.id, 'k', NULL, 'c', v_kind)::text);
    RETURN NULL;
END $$;
-- only columns that another process may have cached; the progress of a creation is not among them
CREATE TRIGGER tenants_notify AFTER UPDATE OF
        slug, status, tier, server, database_name, role_name, sealed_password, metadata, quotas, timezone,
        trial_ends_at, reason ON tenancy.tenants
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_tenant();
CREATE TRIGGER tenants_notify_delete AFTER DELETE ON tenancy.tenants
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_tenant();

CREATE FUNCTION tenancy.notify_key() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object('t', OLD.tenant_id, 'k', OLD.id, 'c', 'key')::text);
    RETURN NULL;
END $$;
CREATE TRIGGER api_keys_notify AFTER UPDATE OF
        tenant_id, digest, digest_version, scopes, networks, expires_at, revoked_at ON tenancy.api_keys
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_key();
CREATE TRIGGER api_keys_notify_delete AFTER DELETE ON tenancy.api_keys
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_key();
"""


def upgrade() -> None:
    """Create the registry and its installation id."""
    run_script(TABLES + TRANSITIONS + FUNCTIONS)
    run_script("INSERT INTO tenancy.installation (id) VALUES (gen_random_uuid())")


def downgrade() -> None:
    """Drop the registry, but not the tenants' databases; the schema holds Alembic's version table and stays."""
    run_script(
        """
        DROP TABLE tenancy.api_keys, tenancy.tenants, tenancy.tiers, tenancy.servers, tenancy.installation,
            tenancy.status_transitions;
        DROP FUNCTION tenancy.tenants_guard, tenancy.notify_tenant, tenancy.notify_key;
        """
    )
