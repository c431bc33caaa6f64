"""Row-level security: a reader for one tenant sees that tenant's rows alone, whatever its query leaves out."""

from tenancy_orm.control.scripts import run_script

revision = "0006_row_security"
down_revision = "0005_lifecycle"
branch_labels = None
depends_on = None

VIEWER = """
-- the role that reads for one tenant; ControlDatabase.upgrade creates it, since roles belong to the server, not to this
-- database
ALTER TABLE tenancy.installation ADD COLUMN viewer text;

-- The tenant that a reader reads for; NULL where none is set, which equals no tenant: no rows at all.
CREATE FUNCTION tenancy.viewing_tenant() RETURNS uuid
LANGUAGE sql STABLE
RETURN nullif(current_setting('tenancy.viewer', true), '')::uuid;

CREATE FUNCTION tenancy.protect_rows(p_table regclass, p_column name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', p_table);
    EXECUTE format(
        'CREATE POLICY tenant_rows ON %s FOR SELECT USING (%I = tenancy.viewing_tenant())', p_table, p_column);
END $$;
REVOKE ALL ON FUNCTION tenancy.protect_rows FROM PUBLIC;

-- Whoever reads every row of the log reads those of a partition that is named, as pg_dump names it.
CREATE FUNCTION tenancy.audit_share_partition(p_table regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_policy record;
BEGIN
    FOR v_policy IN
        SELECT p.polname, r.rolname FROM pg_policy AS p JOIN pg_roles AS r ON r.oid = ANY (p.polroles)
        WHERE p.polrelid = 'tenancy.audit_log'::regclass AND p.polname LIKE 'application\\_%'
            AND NOT EXISTS (SELECT FROM pg_policy AS o WHERE o.polrelid = p_table AND o.polname = p.polname)
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %I', p_table, v_policy.rolname);
        EXECUTE format(
            'CREATE POLICY %I ON %s FOR SELECT TO %I USING (true)', v_policy.polname, p_table, v_policy.rolname);
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION tenancy.audit_share_partition FROM PUBLIC;
"""

TABLES = """
SELECT tenancy.protect_rows('tenancy.tenants', 'id');
SELECT tenancy.protect_rows('tenancy.api_keys', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.domains', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.former_slugs', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.usage', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.usage_keys', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.usage_records', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.quota_holds', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.quota_blocks', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.quota_pressure', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.tenant_metrics', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.audit_log', 'tenant_id');
-- a query that names a partition is subject to the partition's own policies
SELECT tenancy.protect_rows(inhrelid::regclass, 'tenant_id')
FROM pg_inherits WHERE inhparent = 'tenancy.audit_log'::regclass;
"""

# From PostgreSQL 15 on a view can run with its reader's rights; before that it runs with its owner's, who is exempt
# from the policies.
VIEWS = """
DO $$
BEGIN
    IF current_setting('server_version_num')::integer >= 150000 THEN
        ALTER VIEW tenancy.active_tenants SET (security_invoker = true);
        ALTER VIEW tenancy.audit_summary SET (security_invoker = true);
        ALTER VIEW tenancy.tier_distribution SET (security_invoker = true);
    END IF;
END $$;
"""

# Roles that were granted the application's rights before this revision keep seeing every row; grants.py names the
# policy in the same way.
APPLICATION = """
DO $$
DECLARE
    v_role record;
    v_table regclass;
BEGIN
    FOR v_role IN
        SELECT r.rolname FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        JOIN pg_roles AS r ON r.oid = a.grantee
        WHERE c.oid = 'tenancy.tenants'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner
    LOOP
        FOR v_table IN
            SELECT oid::regclass FROM pg_class
            WHERE relnamespace = 'tenancy'::regnamespace AND relrowsecurity AND NOT relispartition
        LOOP
            EXECUTE format(
                'CREATE POLICY %I ON %s FOR %s TO %I USING (true) %s',
                'application_' || left(encode(sha256(convert_to(v_role.rolname, 'UTF8')), 'hex'), 16),
                v_table,
                CASE v_table WHEN 'tenancy.audit_log'::regclass THEN 'SELECT' ELSE 'ALL' END,
                v_role.rolname,
                CASE v_table WHEN 'tenancy.audit_log'::regclass THEN '' ELSE 'WITH CHECK (true)' END);
        END LOOP;
    END LOOP;
END $$;
"""

# with the months that retention has detached
_MONTHS = "relnamespace = 'tenancy'::regnamespace AND relkind = 'r' AND relname LIKE 'audit\\_log\\_y%'"
PARTITIONS = f"SELECT tenancy.audit_share_partition(oid::regclass) FROM pg_class WHERE {_MONTHS};"  # noqa: S608


def upgrade() -> None:
    """Protect the rows of every table that holds tenants' rows; ``audit_ensure_partitions`` protects new partitions."""
    run_script(VIEWER + TABLES + VIEWS + APPLICATION + PARTITIONS)


# the viewer loses its rights first: they were safe only under the policies
DOWNGRADE = """
DO $$
DECLARE
    v_viewer name;
    v_kind text;
    v_policy record;
BEGIN
    SELECT r.rolname INTO v_viewer FROM tenancy.installation AS i JOIN pg_roles AS r ON r.rolname = i.viewer;
    IF FOUND THEN
        FOREACH v_kind IN ARRAY ARRAY['TABLES', 'FUNCTIONS'] LOOP
            EXECUTE format('REVOKE ALL ON ALL %s IN SCHEMA tenancy FROM %I', v_kind, v_viewer);
        END LOOP;
        EXECUTE format('REVOKE ALL ON SCHEMA tenancy FROM %I', v_viewer);
    END IF;
    FOR v_policy IN
        SELECT p.polname, c.oid::regclass AS relation FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid
        WHERE c.relnamespace = 'tenancy'::regnamespace
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', v_policy.polname, v_policy.relation);
        EXECUTE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', v_policy.relation);
    END LOOP;
    IF current_setting('server_version_num')::integer >= 150000 THEN
        ALTER VIEW tenancy.active_tenants RESET (security_invoker);
        ALTER VIEW tenancy.audit_summary RESET (security_invoker);
        ALTER VIEW tenancy.tier_distribution RESET (security_invoker);
    END IF;
END $$;
"""

# before the policies are dropped, which name the roles
UNSHARE = """
DO $$
DECLARE
    v_policy record;
BEGIN
    FOR v_policy IN
        SELECT c.oid::regclass AS month, r.rolname
        FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid JOIN pg_roles AS r ON r.oid = ANY (p.polroles)
        WHERE {months} AND p.polname LIKE 'application\\_%'
    LOOP
        EXECUTE format('REVOKE SELECT ON %s FROM %I', v_policy.month, v_policy.rolname);
    END LOOP;
END $$;
"""


def downgrade() -> None:
    """Remove the policies, and the viewer's rights with them; the role stays, and can be dropped."""
    run_script(
        UNSHARE.replace("{months}", _MONTHS)
        + DOWNGRADE
        + """
        DROP FUNCTION tenancy.audit_share_partition, tenancy.protect_rows, tenancy.viewing_tenant;
        ALTER TABLE tenancy.installation DROP COLUMN viewer;
        """
    )
