"""The function that makes the months of the audit log, for the revisions of the control database that define it."""

from typing import Final

ENSURE_PARTITIONS: Final = """
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
"""Creates or replaces ``tenancy.audit_ensure_partitions``; ``share`` is what it does for roles that read a month."""


__all__ = ["ENSURE_PARTITIONS"]
