"""Servers as rows: their addresses, region, capacity, weight and state, and the region of a tenant."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0015_servers"
down_revision = "0014_schedules"
branch_labels = None
depends_on = None

COLUMNS = r"""
ALTER TABLE tenancy.servers
    ADD COLUMN region text CONSTRAINT servers_region_check CHECK (region ~ '^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$'),
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT servers_labels_check CHECK (jsonb_typeof(labels) = 'object'),
    -- how many tenants it may hold
    ADD COLUMN capacity integer CONSTRAINT servers_capacity_check CHECK (capacity >= 0),
    ADD COLUMN weight double precision NOT NULL DEFAULT 1
        CONSTRAINT servers_weight_check CHECK (weight > 0 AND weight < 'Infinity'),
    ADD COLUMN state text NOT NULL DEFAULT 'active' CONSTRAINT servers_state_check CHECK (state IN ('active', 'drain')),
    -- for all processes together; NULL: as many as the server has
    ADD COLUMN max_connections integer CONSTRAINT servers_max_connections_check CHECK (max_connections > 0),
    -- logins at once
    ADD COLUMN max_opening integer CONSTRAINT servers_max_opening_check CHECK (max_opening > 0),
    -- NULL: each process has them from its settings
    ADD COLUMN sealed_addresses bytea,
    -- which cluster it is
    ADD COLUMN identity text,
    ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now();
UPDATE tenancy.servers SET state = 'drain' WHERE NOT accepts_tenants;

ALTER TABLE tenancy.tenants
    ADD COLUMN region text CONSTRAINT tenants_region_check CHECK (region ~ '^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$');
-- the tombstone of a purged tenant does not keep its server
ALTER TABLE tenancy.tenants
    ALTER COLUMN server DROP NOT NULL,
    ADD CONSTRAINT tenants_server_check CHECK (status = 'purged' OR server IS NOT NULL),
    DROP CONSTRAINT tenants_server_fkey,
    ADD CONSTRAINT tenants_server_fkey FOREIGN KEY (server) REFERENCES tenancy.servers (name) ON DELETE SET NULL;
CREATE INDEX tenants_region_id_idx ON tenancy.tenants (region, id) WHERE region IS NOT NULL;
CREATE INDEX tenants_server_idx ON tenancy.tenants (server) WHERE status <> 'purged';
"""

FUNCTIONS = """
-- Processes of the former version read and set accepts_tenants.
CREATE FUNCTION tenancy.servers_guard() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.name <> OLD.name THEN
        RAISE EXCEPTION 'the name of a server cannot change'
            USING ERRCODE = 'TN002', TABLE = 'servers', COLUMN = 'name';
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.accepts_tenants <> OLD.accepts_tenants AND NEW.state = OLD.state THEN
        NEW.state := CASE WHEN NEW.accepts_tenants THEN 'active' ELSE 'drain' END;
    END IF;
    NEW.accepts_tenants := NEW.state = 'active';
    NEW.updated_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER servers_guard BEFORE INSERT OR UPDATE ON tenancy.servers
    FOR EACH ROW EXECUTE FUNCTION tenancy.servers_guard();

-- The row of a server is locked until the placement is committed: two creations cannot both take its last place, and
-- neither its region nor its state changes in between.
CREATE FUNCTION tenancy.check_placement() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_server record;
    v_arrives boolean := TG_OP = 'INSERT' OR NEW.server <> OLD.server;
BEGIN
    IF NEW.status = 'purged' THEN
        RETURN NULL;
    END IF;
    SELECT s.region, s.state, s.capacity INTO v_server
        FROM tenancy.servers AS s WHERE s.name = NEW.server FOR NO KEY UPDATE;
    IF NEW.region IS NOT NULL AND v_server.region IS DISTINCT FROM NEW.region THEN
        RAISE EXCEPTION 'a tenant of region % cannot be on server %, which is in %',
            NEW.region, NEW.server, coalesce('region ' || v_server.region, 'no region')
            USING ERRCODE = 'TN003', TABLE = 'tenants', COLUMN = 'region', CONSTRAINT = 'tenants_region';
    END IF;
    IF NOT v_arrives THEN
        RETURN NULL;
    END IF;
    IF v_server.state <> 'active' THEN
        RAISE EXCEPTION 'server % takes no new tenants', NEW.server
            USING ERRCODE = 'TN003', TABLE = 'tenants', COLUMN = 'server', CONSTRAINT = 'servers_state';
    END IF;
    IF v_server.capacity IS NOT NULL AND v_server.capacity < (
        SELECT count(*) FROM tenancy.tenants AS t WHERE t.server = NEW.server AND t.status <> 'purged'
    ) THEN
        RAISE EXCEPTION 'server % holds as many tenants as it may', NEW.server
            USING ERRCODE = 'TN003', TABLE = 'tenants', COLUMN = 'server', CONSTRAINT = 'servers_capacity';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER tenants_placement AFTER INSERT OR UPDATE OF server, region ON tenancy.tenants
    FOR EACH ROW EXECUTE FUNCTION tenancy.check_placement();

CREATE FUNCTION tenancy.check_server_region() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_tenant record;
BEGIN
    SELECT t.slug, t.region INTO v_tenant FROM tenancy.tenants AS t
        WHERE t.server = NEW.name AND t.status <> 'purged' AND t.region IS NOT NULL
            AND t.region IS DISTINCT FROM NEW.region
        LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'server % has tenants of region %, % for example', NEW.name, v_tenant.region, v_tenant.slug
            USING ERRCODE = 'TN003', TABLE = 'servers', COLUMN = 'region', CONSTRAINT = 'tenants_region';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER servers_region AFTER UPDATE OF region ON tenancy.servers
    FOR EACH ROW EXECUTE FUNCTION tenancy.check_server_region();

CREATE FUNCTION tenancy.notify_server() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object(
        't', NULL, 'k', NULL, 'c', 'server', 'n', CASE TG_OP WHEN 'DELETE' THEN OLD.name ELSE NEW.name END)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER servers_notify AFTER INSERT OR DELETE ON tenancy.servers
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_server();
CREATE TRIGGER servers_notify_update AFTER UPDATE ON tenancy.servers
    FOR EACH ROW WHEN (
        (OLD.region, OLD.labels, OLD.capacity, OLD.weight, OLD.state, OLD.max_connections, OLD.max_opening,
            OLD.sealed_addresses, OLD.maintenance_database, OLD.identity)
        IS DISTINCT FROM
        (NEW.region, NEW.labels, NEW.capacity, NEW.weight, NEW.state, NEW.max_connections, NEW.max_opening,
            NEW.sealed_addresses, NEW.maintenance_database, NEW.identity))
    EXECUTE FUNCTION tenancy.notify_server();
"""


def upgrade() -> None:
    """Add the columns; the addresses of the servers that there are stay in the settings."""
    run_script(COLUMNS + FUNCTIONS + for_applications("GRANT DELETE ON tenancy.servers TO %1$I"))


DOWNGRADE = """
DROP TRIGGER tenants_placement ON tenancy.tenants;
DROP TRIGGER servers_guard ON tenancy.servers;
DROP TRIGGER servers_region ON tenancy.servers;
DROP TRIGGER servers_notify ON tenancy.servers;
DROP TRIGGER servers_notify_update ON tenancy.servers;
DROP FUNCTION tenancy.check_placement, tenancy.check_server_region, tenancy.notify_server,
    tenancy.servers_guard;
-- it has to be the server of some tombstones again
INSERT INTO tenancy.servers (name, host, port, accepts_tenants)
    SELECT 'removed', '', 0, false WHERE EXISTS (SELECT FROM tenancy.tenants WHERE server IS NULL);
UPDATE tenancy.tenants SET server = 'removed' WHERE server IS NULL;
ALTER TABLE tenancy.tenants
    DROP COLUMN region, DROP CONSTRAINT tenants_server_check, ALTER COLUMN server SET NOT NULL,
    DROP CONSTRAINT tenants_server_fkey,
    ADD CONSTRAINT tenants_server_fkey FOREIGN KEY (server) REFERENCES tenancy.servers (name);
DROP INDEX tenancy.tenants_server_idx;
ALTER TABLE tenancy.servers
    DROP COLUMN region, DROP COLUMN labels, DROP COLUMN capacity, DROP COLUMN weight, DROP COLUMN state,
    DROP COLUMN max_connections, DROP COLUMN max_opening, DROP COLUMN sealed_addresses, DROP COLUMN identity,
    DROP COLUMN updated_at;
"""


def downgrade() -> None:
    """Drop the columns. A server with its address in its row alone has to be in the settings again."""
    run_script(DOWNGRADE + for_applications("REVOKE DELETE ON tenancy.servers FROM %1$I"))
