"""Headroom of quotas: up to which usage the next uses need no look at limits, so that counting them is one UPDATE."""

from tenancy_orm.control.scripts import run_script

revision = "0026_usage_headroom"
down_revision = "0025_switches"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE tenancy.usage
    -- usage below this reaches neither the limit nor a soft limit that is not announced; null: not known
    ADD COLUMN headroom_below bigint,
    -- the limit; and what the headroom follows from, which it is of no use without: the limit of the tier, what the
    -- tenant has in its place, and the soft limit that was announced last
    ADD COLUMN headroom_limit bigint,
    ADD COLUMN headroom_tier jsonb,
    ADD COLUMN headroom_override jsonb,
    ADD COLUMN headroom_reached double precision,
    ADD COLUMN headroom_soft_limit bigint;
"""

# PostgreSQL looks at every constraint of a table in each update, whatever that changes; these columns never change.
CHECKS = """
ALTER TABLE tenancy.usage DROP CONSTRAINT usage_resource_check, DROP CONSTRAINT usage_period_check,
    DROP CONSTRAINT usage_period_end_check;
CREATE FUNCTION tenancy.check_usage() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF NEW.resource !~ '^[a-z][a-z0-9_.-]{0,62}$' OR NEW.period NOT IN ('lifetime', 'day', 'month', 'concurrent')
        OR NEW.period_end <= NEW.period_start
    THEN
        RAISE check_violation USING MESSAGE = format('no usage can be counted for %s, per %s from %s to %s',
            NEW.resource, NEW.period, NEW.period_start, NEW.period_end);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER usage_check BEFORE INSERT ON tenancy.usage FOR EACH ROW EXECUTE FUNCTION tenancy.check_usage();
"""

FUNCTION = """
-- A use now, without a key, in a period without headroom: count it as any use, and note the headroom of those to come.
CREATE FUNCTION tenancy.quota_consume_and_look_ahead(p_tenant_id uuid, p_resource text, p_amount bigint)
RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
BEGIN
    v_state := tenancy.quota_consume(p_tenant_id, p_resource, p_amount);
    IF v_state.outcome = 'counted' THEN
        UPDATE tenancy.usage AS u
        SET headroom_below = CASE WHEN l.amount IS NULL THEN 4611686018427387904 ELSE least(l.amount + 1, (
                SELECT min(ceil(f * l.amount))::bigint FROM unnest(tenancy.quota_soft(l.merged)) AS f
                WHERE u.soft_limit IS DISTINCT FROM l.amount OR f > u.soft_reached)) END,
            headroom_limit = l.amount, headroom_tier = l.of_tier, headroom_override = l.override,
            headroom_reached = u.soft_reached, headroom_soft_limit = u.soft_limit
        FROM (
            SELECT m.of_tier, m.override, m.merged, (m.merged ->> 'amount')::bigint AS amount
            FROM (
                SELECT i.limits -> p_resource AS of_tier, t.quotas -> p_resource AS override,
                    tenancy.quota_merge(i.limits -> p_resource, t.quotas -> p_resource) AS merged
                FROM tenancy.tenants AS t JOIN tenancy.tiers AS i ON i.name = t.tier
                WHERE t.id = p_tenant_id
            ) AS m
            -- the limit may have been changed since the use was counted
            WHERE coalesce(m.merged ->> 'period', 'lifetime') = v_state.period
        ) AS l
        WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource
            AND u.period = v_state.period AND u.period_start = v_state.starts_at;
    END IF;
    RETURN v_state;
END $$;
"""


def upgrade() -> None:
    """Add the columns and the function, and check a row where it is inserted."""
    run_script(COLUMNS + CHECKS + FUNCTION)


def downgrade() -> None:
    """Remove them: every use looks at the limits again."""
    run_script(
        """
        DROP FUNCTION tenancy.quota_consume_and_look_ahead;
        DROP TRIGGER usage_check ON tenancy.usage;
        DROP FUNCTION tenancy.check_usage;
        ALTER TABLE tenancy.usage
            ADD CONSTRAINT usage_resource_check CHECK (resource ~ '^[a-z][a-z0-9_.-]{0,62}$'),
            ADD CONSTRAINT usage_period_check CHECK (period IN ('lifetime', 'day', 'month', 'concurrent')),
            ADD CONSTRAINT usage_period_end_check CHECK (period_end > period_start);
        ALTER TABLE tenancy.usage
            DROP COLUMN headroom_below, DROP COLUMN headroom_limit,
            DROP COLUMN headroom_tier, DROP COLUMN headroom_override,
            DROP COLUMN headroom_reached, DROP COLUMN headroom_soft_limit;
        """
    )
