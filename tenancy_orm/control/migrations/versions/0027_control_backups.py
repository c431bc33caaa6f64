"""The application's role can back the control database up: it may read sequences, and partitions by name."""

from tenancy_orm.control.audit_partitions import ENSURE_PARTITIONS
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
        + ENSURE_PARTITIONS.format(share=SHARE)
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
        ENSURE_PARTITIONS.format(share=""),
        UNSHARE.replace("{months}", _MONTHS),
        for_applications("REVOKE SELECT ON ALL SEQUENCES IN SCHEMA tenancy FROM %1$I"),
        "ALTER TABLE tenancy.tenants DROP COLUMN copied_from; ALTER TABLE tenancy.backups DROP COLUMN readers;",
    )
    run_script("".join(statements))
