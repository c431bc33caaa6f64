"""The application's role can back the control database up: it may read sequences, and partitions by name."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0027_control_backups"
down_revision = "0026_usage_headroom"
branch_labels = None
depends_on = None

FUNCTION = """
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

# as revision 0002 has it, but for {share}
ENSURE_PARTITIONS = """
CREATE OR REPLACE FUNCTION tenancy.audit_ensure_partitions(p_months integer DEFAULT 3) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    v_head tenancy.audit_head;
    v_first timestamp;
    v_month timestamp;
    v_name text;
    v_grantee text;
    v_made integer := 0;
BEGIN
    IF p_months NOT BETWEEN 0 AND 120 THEN
        RAISE EXCEPTION 'months must be 0 to 120, not %', p_months USING ERRCODE = '22023';
    END IF;
    SELECT * INTO STRICT v_head FROM tenancy.audit_head FOR UPDATE;
    v_first := date_trunc('month', greatest(clock_timestamp(), v_head.occurred_at) AT TIME ZONE 'UTC');
    FOR v_ahead IN 0..p_months LOOP
        v_month := v_first + make_interval(months => v_ahead);
        v_name := 'audit_log_' || to_char(v_month, '"y"YYYY"m"MM');
        IF to_regclass('tenancy.' || v_name) IS NOT NULL THEN
            CONTINUE;
        END IF;
        -- created first and then attached: PARTITION OF would lock out every reader of the log (ACCESS EXCLUSIVE)
        EXECUTE format('CREATE TABLE tenancy.%I (LIKE tenancy.audit_log INCLUDING ALL)', v_name);
        EXECUTE format(
            'CREATE TRIGGER audit_log_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON tenancy.%I '
            'FOR EACH STATEMENT EXECUTE FUNCTION tenancy.audit_refuse()', v_name);
        EXECUTE format('ALTER TABLE tenancy.%I ENABLE ALWAYS TRIGGER audit_log_refuse', v_name);
        -- default privileges apply to it: a role that may create a trigger here could run code as the role that appends
        FOR v_grantee IN
            SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
            FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
            WHERE c.oid = format('tenancy.%I', v_name)::regclass AND a.grantee <> c.relowner
        LOOP
            EXECUTE format('REVOKE ALL ON tenancy.%I FROM %s', v_name, v_grantee);
        END LOOP;
        -- neither INCLUDING ALL nor attaching copies row-level security, which revision 0006 enables
        IF (SELECT relrowsecurity FROM pg_class WHERE oid = 'tenancy.audit_log'::regclass) THEN
            PERFORM tenancy.protect_rows(format('tenancy.%I', v_name)::regclass, 'tenant_id');{share}
        END IF;
        EXECUTE format(
            'ALTER TABLE tenancy.audit_log ATTACH PARTITION tenancy.%I FOR VALUES FROM (%L) TO (%L)',
            v_name, v_month AT TIME ZONE 'UTC', (v_month + interval '1 month') AT TIME ZONE 'UTC');
        v_made := v_made + 1;
    END LOOP;
    UPDATE tenancy.audit_head
    SET partitioned_until = greatest(
        partitioned_until, (v_first + make_interval(months => p_months + 1)) AT TIME ZONE 'UTC');
    RETURN v_made;
END $$;
"""
SHARE = """
            PERFORM tenancy.audit_share_partition(format('tenancy.%I', v_name)::regclass);"""

# with the months that retention has detached
_MONTHS = "relnamespace = 'tenancy'::regnamespace AND relkind = 'r' AND relname LIKE 'audit\\_log\\_y%'"
EXISTING = f"SELECT tenancy.audit_share_partition(oid::regclass) FROM pg_class WHERE {_MONTHS};"  # noqa: S608

ORIGINS = """
ALTER TABLE tenancy.tenants
    -- the tenant that its first contents were copied from, which an erasure names; null: none
    ADD COLUMN copied_from uuid;
ALTER TABLE tenancy.backups
    -- the processes that have it decrypted: for each its host, and until when unless it renews that
    ADD COLUMN readers jsonb;
"""


def upgrade() -> None:
    """Share the partitions with the application's roles, those of later months too; add what erasures look at."""
    run_script(
        FUNCTION
        + ENSURE_PARTITIONS.replace("{share}", SHARE)
        + EXISTING
        + for_applications("GRANT SELECT ON ALL SEQUENCES IN SCHEMA tenancy TO %1$I")
        + ORIGINS
    )


UNSHARE = """
DROP FUNCTION tenancy.audit_share_partition;
DO $$
DECLARE
    v_policy record;
BEGIN
    FOR v_policy IN
        SELECT p.polname, c.oid::regclass AS month, r.rolname
        FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid JOIN pg_roles AS r ON r.oid = ANY (p.polroles)
        WHERE {months} AND p.polname LIKE 'application\\_%'
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', v_policy.polname, v_policy.month);
        EXECUTE format('REVOKE SELECT ON %s FROM %I', v_policy.month, v_policy.rolname);
    END LOOP;
END $$;
"""


def downgrade() -> None:
    """Take it back: only the owner of the tables can back the control database up."""
    statements = (
        ENSURE_PARTITIONS.replace("{share}", ""),
        UNSHARE.replace("{months}", _MONTHS),
        for_applications("REVOKE SELECT ON ALL SEQUENCES IN SCHEMA tenancy FROM %1$I"),
        "ALTER TABLE tenancy.tenants DROP COLUMN copied_from; ALTER TABLE tenancy.backups DROP COLUMN readers;",
    )
    run_script("".join(statements))
