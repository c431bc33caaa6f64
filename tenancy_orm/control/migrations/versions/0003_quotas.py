"""Quotas and usage: the database resolves limits and counts use, so that neither can be stale."""

from tenancy_orm.control.scripts import run_script

revision = "0003_quotas"
down_revision = "0002_audit"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.usage (
    tenant_id uuid NOT NULL CONSTRAINT usage_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    resource text NOT NULL CONSTRAINT usage_resource_check CHECK (resource ~ '^[a-z][a-z0-9_.-]{0,62}$'),
    period text NOT NULL
        CONSTRAINT usage_period_check CHECK (period IN ('lifetime', 'day', 'month', 'concurrent')),
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL,
    used bigint NOT NULL DEFAULT 0 CONSTRAINT usage_used_check CHECK (used >= 0),
    -- the highest soft limit that was announced, the limit that it is a fraction of, and when
    soft_reached double precision NOT NULL DEFAULT 0,
    soft_limit bigint,
    soft_at timestamptz,
    -- when the period was closed and its usage record made: nothing is counted in it from then on
    closed_at timestamptz,
    CONSTRAINT usage_pkey PRIMARY KEY (tenant_id, resource, period, period_start),
    CONSTRAINT usage_period_end_check CHECK (period_end > period_start)
) WITH (fillfactor = 50);  -- leaves room on the page for heap-only updates, which touch no index
CREATE INDEX usage_open_idx ON tenancy.usage (period_end) WHERE closed_at IS NULL;

CREATE TABLE tenancy.usage_keys (
    tenant_id uuid NOT NULL CONSTRAINT usage_keys_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    key text NOT NULL CONSTRAINT usage_keys_key_check CHECK (length(key) BETWEEN 1 AND 200),
    resource text NOT NULL,
    amount bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT usage_keys_pkey PRIMARY KEY (tenant_id, key)
);
CREATE INDEX usage_keys_created_at_idx ON tenancy.usage_keys (created_at);

-- places of limits on concurrency that are taken now; one that was not given back ends at expires_at
CREATE TABLE tenancy.quota_holds (
    id uuid CONSTRAINT quota_holds_pkey PRIMARY KEY,
    tenant_id uuid NOT NULL CONSTRAINT quota_holds_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    resource text NOT NULL,
    amount bigint NOT NULL CONSTRAINT quota_holds_amount_check CHECK (amount > 0),
    expires_at timestamptz NOT NULL
);
CREATE INDEX quota_holds_tenant_id_idx ON tenancy.quota_holds (tenant_id, resource);

-- what a process took in advance and had not spent when it last reported; it counts as used until it is returned
CREATE TABLE tenancy.quota_blocks (
    id uuid CONSTRAINT quota_blocks_pkey PRIMARY KEY,
    tenant_id uuid NOT NULL
        CONSTRAINT quota_blocks_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    resource text NOT NULL,
    period text NOT NULL,
    period_start timestamptz NOT NULL,
    unspent bigint NOT NULL CONSTRAINT quota_blocks_unspent_check CHECK (unspent > 0),
    expires_at timestamptz NOT NULL,
    -- another use was refused for lack of it
    reclaim boolean NOT NULL DEFAULT false
);
CREATE INDEX quota_blocks_tenant_id_idx ON tenancy.quota_blocks (tenant_id, resource, period, period_start);

-- since when a tenant has been near a limit of its tier, for the policies that propose a higher tier
CREATE TABLE tenancy.quota_pressure (
    tenant_id uuid NOT NULL
        CONSTRAINT quota_pressure_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    policy text NOT NULL,
    resource text NOT NULL,
    tier text NOT NULL,
    since timestamptz NOT NULL,
    proposed_at timestamptz,
    -- until then one process is changing the tier; after that another may, in case the first one died
    claimed_until timestamptz,
    CONSTRAINT quota_pressure_pkey PRIMARY KEY (tenant_id, policy)
);

-- the outbox of billing: one record per closed period, sent at least once under an idempotency key
CREATE TABLE tenancy.usage_records (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT usage_records_pkey PRIMARY KEY,
    tenant_id uuid NOT NULL
        CONSTRAINT usage_records_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    resource text NOT NULL,
    period text NOT NULL,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL,
    quantity bigint NOT NULL,
    idempotency_key text NOT NULL,
    -- the metadata of a tenant that has been purged, which may name who pays; kept until the record is sent
    metadata jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    failed_at timestamptz,
    error text,
    CONSTRAINT usage_records_period_key UNIQUE (tenant_id, resource, period, period_start),
    CONSTRAINT usage_records_idempotency_key_key UNIQUE (idempotency_key)
);
CREATE INDEX usage_records_due_idx ON tenancy.usage_records (due_at) WHERE sent_at IS NULL AND failed_at IS NULL;

-- what the sampler measured; the counters are PostgreSQL's, cumulative since its statistics were last reset
CREATE TABLE tenancy.tenant_metrics (
    tenant_id uuid NOT NULL
        CONSTRAINT tenant_metrics_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    sampled_at timestamptz NOT NULL,
    size_bytes bigint NOT NULL,
    connections integer NOT NULL,
    queries bigint NOT NULL,
    errors bigint NOT NULL,
    CONSTRAINT tenant_metrics_pkey PRIMARY KEY (tenant_id, sampled_at)
);
CREATE INDEX tenant_metrics_sampled_at_idx ON tenancy.tenant_metrics (sampled_at);
"""

# Functions in PL/pgSQL pin their search_path. Those with a body of standard SQL need not: their names were resolved
# when the function was created, and without a SET clause PostgreSQL can inline them.
PERIODS = """
-- The first instant at which the clocks of a time zone show this date. AT TIME ZONE reads a midnight that happens twice
-- as the second, and one that is skipped by the offset before the change, which is the instant of the change.
CREATE FUNCTION tenancy.local_midnight(p_date date, p_timezone text) RETURNS timestamptz
LANGUAGE sql STABLE STRICT
RETURN (
    SELECT coalesce(min(s.at - e.earlier) FILTER (
        WHERE (s.at - e.earlier) AT TIME ZONE p_timezone = p_date::timestamp), min(s.at))
    FROM (SELECT p_date::timestamp AT TIME ZONE p_timezone AS at) AS s,
        (VALUES (interval '0'), (interval '30 minutes'), (interval '1 hour'), (interval '2 hours')) AS e (earlier)
);

CREATE FUNCTION tenancy.quota_period(
    p_period text, p_timezone text, p_at timestamptz, OUT starts_at timestamptz, OUT ends_at timestamptz
) LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_first date;
BEGIN
    IF p_period = 'day' THEN
        v_first := (p_at AT TIME ZONE p_timezone)::date;
        starts_at := tenancy.local_midnight(v_first, p_timezone);
        ends_at := tenancy.local_midnight(v_first + 1, p_timezone);
    ELSIF p_period = 'month' THEN
        v_first := date_trunc('month', p_at AT TIME ZONE p_timezone)::date;
        starts_at := tenancy.local_midnight(v_first, p_timezone);
        ends_at := tenancy.local_midnight((v_first + interval '1 month')::date, p_timezone);
    ELSE
        starts_at := 'epoch';
        ends_at := 'infinity';
    END IF;
END $$;

-- The period that use at this time counts in. A period that has begun is finished first, and none overlaps another. One
-- that a change of the time zone would cut short lasts until the next boundary, so that a tenant that keeps changing
-- its time zone does not get a fresh quota each time.
CREATE FUNCTION tenancy.quota_current(
    p_tenant_id uuid, p_resource text, p_period text, p_timezone text, p_at timestamptz,
    OUT starts_at timestamptz, OUT ends_at timestamptz, OUT used bigint
) LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_last timestamptz;
BEGIN
    SELECT u.period_start, u.period_end, u.used INTO starts_at, ends_at, used
    FROM tenancy.usage AS u
    WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource AND u.period = p_period AND u.period_start <= p_at
    ORDER BY u.period_start DESC LIMIT 1;
    IF ends_at > p_at THEN
        RETURN;
    END IF;
    v_last := ends_at;
    SELECT p.starts_at, p.ends_at, 0 INTO starts_at, ends_at, used
    FROM tenancy.quota_period(p_period, p_timezone, p_at) AS p;
    IF v_last > starts_at THEN
        starts_at := v_last;
        -- a full day; a month may lack the 26 hours by which time zones differ
        IF ends_at - starts_at < (CASE p_period WHEN 'day' THEN interval '24 hours' ELSE interval '26 days' END) THEN
            SELECT p.ends_at INTO ends_at FROM tenancy.quota_period(p_period, p_timezone, ends_at) AS p;
        END IF;
    END IF;
    SELECT least(ends_at, min(u.period_start)) INTO ends_at
    FROM tenancy.usage AS u
    WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource AND u.period = p_period AND u.period_start > p_at;
END $$;
"""

LIMITS = """
-- An override replaces part of the tier's limit: a number replaces the amount, an object the fields that it has.
CREATE FUNCTION tenancy.quota_merge(p_tier jsonb, p_override jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE
RETURN CASE
    WHEN p_override IS NULL THEN p_tier
    WHEN jsonb_typeof(p_override) = 'object' THEN coalesce(p_tier, '{}') || p_override
    ELSE coalesce(p_tier, '{}') || jsonb_build_object('amount', p_override)
END;

CREATE FUNCTION tenancy.quota_soft(p_limit jsonb) RETURNS double precision[]
LANGUAGE sql IMMUTABLE
RETURN ARRAY(
    SELECT f.value::double precision
    FROM jsonb_array_elements_text(coalesce(p_limit -> 'soft', '[0.8, 1]')) AS f ORDER BY 1);

CREATE FUNCTION tenancy.quota_limits(p_tenant_id uuid)
RETURNS TABLE (resource text, amount bigint, period text, soft double precision[])
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT
        r.resource, (m.merged ->> 'amount')::bigint, coalesce(m.merged ->> 'period', 'lifetime'),
        tenancy.quota_soft(m.merged)
    FROM tenancy.tenants AS t
    JOIN tenancy.tiers AS i ON i.name = t.tier
    CROSS JOIN LATERAL (
        SELECT k.resource FROM jsonb_object_keys(i.limits) AS k (resource)
        UNION
        SELECT k.resource FROM jsonb_object_keys(t.quotas) AS k (resource)
    ) AS r
    CROSS JOIN LATERAL (
        SELECT tenancy.quota_merge(i.limits -> r.resource, t.quotas -> r.resource) AS merged
    ) AS m
    WHERE t.id = p_tenant_id AND r.resource <> 'requests_per_second';
END;

-- every process has taken blocks under the tier's former limits
CREATE FUNCTION tenancy.notify_tier() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object('t', NULL, 'k', NULL, 'c', 'tier')::text);
    RETURN NULL;
END $$;
CREATE TRIGGER tiers_notify AFTER UPDATE OF limits ON tenancy.tiers
    FOR EACH ROW WHEN (OLD.limits IS DISTINCT FROM NEW.limits) EXECUTE FUNCTION tenancy.notify_tier();
"""

STATE = """
CREATE TYPE tenancy.quota_state AS (
    outcome text,  -- no_tenant, unknown, period, closed, counted, replayed, mismatched, exceeded
    slug text,
    amount_limit bigint,
    period text,
    used bigint,
    starts_at timestamptz,
    ends_at timestamptz,
    at timestamptz,
    soft double precision[],
    crossed double precision[],
    granted bigint,
    in_blocks bigint
);

-- One quota as it is now, read by every statement: no process can act on a limit that has been changed.
CREATE FUNCTION tenancy.quota_find(
    p_tenant_id uuid, p_resource text, p_at timestamptz, p_concurrent boolean DEFAULT false
) RETURNS tenancy.quota_state
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
    v_merged jsonb;
    v_timezone text;
BEGIN
    v_state.at := coalesce(p_at, clock_timestamp());
    SELECT t.slug, t.timezone, tenancy.quota_merge(i.limits -> p_resource, t.quotas -> p_resource)
    INTO v_state.slug, v_timezone, v_merged
    FROM tenancy.tenants AS t JOIN tenancy.tiers AS i ON i.name = t.tier
    WHERE t.id = p_tenant_id AND t.status <> 'purged';
    IF NOT FOUND THEN
        v_state.outcome := 'no_tenant';
        RETURN v_state;
    END IF;
    IF v_merged IS NULL OR p_resource = 'requests_per_second' THEN
        v_state.outcome := 'unknown';
        RETURN v_state;
    END IF;
    v_state.amount_limit := (v_merged ->> 'amount')::bigint;
    v_state.period := coalesce(v_merged ->> 'period', 'lifetime');
    IF (v_state.period = 'concurrent') <> p_concurrent THEN
        v_state.outcome := 'period';
        RETURN v_state;
    END IF;
    SELECT c.starts_at, c.ends_at, c.used INTO v_state.starts_at, v_state.ends_at, v_state.used
    FROM tenancy.quota_current(p_tenant_id, p_resource, v_state.period, v_timezone, v_state.at) AS c;
    v_state.soft := tenancy.quota_soft(v_merged);
    IF p_at IS NOT NULL AND EXISTS (
        SELECT 1 FROM tenancy.usage AS u
        WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource AND u.period = v_state.period
            AND u.period_start = v_state.starts_at AND u.closed_at IS NOT NULL
    ) THEN
        v_state.outcome := 'closed';
    END IF;
    RETURN v_state;
END $$;

-- Whether this much more surely exceeds the limit: no process has a block that it could return. A block that has
-- expired is a dead process's. It writes nothing, so that a tenant that keeps asking at its limit costs only a read.
CREATE FUNCTION tenancy.quota_surely_exceeded(
    p_tenant_id uuid, p_resource text, p_state tenancy.quota_state, p_amount bigint
) RETURNS boolean
LANGUAGE sql STABLE
RETURN coalesce((p_state).used + p_amount > (p_state).amount_limit, false) AND NOT EXISTS (
    SELECT 1 FROM tenancy.quota_blocks AS l
    WHERE l.tenant_id = p_tenant_id AND l.resource = p_resource AND l.period = (p_state).period
        AND l.period_start = (p_state).starts_at AND l.expires_at > statement_timestamp()
);

-- Whether a use under an idempotency key that was used before is the same use again, or another one by mistake.
CREATE FUNCTION tenancy.quota_replay(p_tenant_id uuid, p_resource text, p_amount bigint, p_key text) RETURNS text
LANGUAGE sql STABLE
RETURN (
    SELECT CASE WHEN k.resource = p_resource AND k.amount = p_amount THEN 'replayed' ELSE 'mismatched' END
    FROM tenancy.usage_keys AS k WHERE k.tenant_id = p_tenant_id AND k.key = p_key
);

-- Lock the row of this quota's period and return it; insert it where it is missing.
CREATE FUNCTION tenancy.quota_lock(p_tenant_id uuid, p_resource text, p_state tenancy.quota_state)
RETURNS tenancy.usage
LANGUAGE sql
BEGIN ATOMIC
    INSERT INTO tenancy.usage AS u (tenant_id, resource, period, period_start, period_end)
    VALUES (p_tenant_id, p_resource, (p_state).period, (p_state).starts_at, (p_state).ends_at)
    ON CONFLICT (tenant_id, resource, period, period_start) DO UPDATE SET used = u.used
    RETURNING u;
END;

-- The highest soft limit that counts as announced at this use. One that use has fallen a tenth below is announced again
-- when use reaches it again.
CREATE FUNCTION tenancy.quota_rearm(p_reached double precision, p_used bigint, p_limit bigint) RETURNS double precision
LANGUAGE sql IMMUTABLE
RETURN least(p_reached, p_used / (0.9 * nullif(p_limit, 0)));

-- Which soft limits the usage has reached, each once per period and limit; the caller holds the row's lock.
CREATE FUNCTION tenancy.quota_cross(
    p_tenant_id uuid, p_resource text, p_state tenancy.quota_state, p_reached double precision, p_reached_limit bigint
) RETURNS double precision[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_crossed double precision[];
BEGIN
    IF p_state.amount_limit IS NULL OR p_state.amount_limit = 0 THEN
        RETURN NULL;
    END IF;
    v_crossed := ARRAY(
        SELECT f FROM unnest(p_state.soft) AS f
        WHERE p_state.used >= f * p_state.amount_limit
            AND (p_reached_limit IS DISTINCT FROM p_state.amount_limit OR f > p_reached)
        ORDER BY f);
    IF v_crossed = '{}' THEN
        RETURN NULL;
    END IF;
    UPDATE tenancy.usage
    SET soft_reached = v_crossed[array_upper(v_crossed, 1)], soft_limit = p_state.amount_limit,
        soft_at = p_state.at
    WHERE tenant_id = p_tenant_id AND resource = p_resource
        AND period = p_state.period AND period_start = p_state.starts_at;
    RETURN v_crossed;
END $$;

-- Ask the processes that have blocks of this quota to return them, and return how much is in them at most. The caller
-- has locked the usage row, which every statement on blocks locks before the blocks.
CREATE FUNCTION tenancy.quota_reclaim_blocks(p_tenant_id uuid, p_resource text, p_state tenancy.quota_state, p_own uuid)
RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_unspent bigint;
BEGIN
    UPDATE tenancy.quota_blocks
    SET reclaim = true
    WHERE tenant_id = p_tenant_id AND resource = p_resource AND period = p_state.period
        AND period_start = p_state.starts_at AND id IS DISTINCT FROM p_own AND NOT reclaim;
    -- a block that has expired is a dead process's: what it had not spent is lost
    SELECT sum(unspent) INTO v_unspent
    FROM tenancy.quota_blocks
    WHERE tenant_id = p_tenant_id AND resource = p_resource AND period = p_state.period
        AND period_start = p_state.starts_at AND id IS DISTINCT FROM p_own AND expires_at > clock_timestamp();
    RETURN coalesce(v_unspent, 0);
END $$;
"""

CONSUME = """
CREATE FUNCTION tenancy.quota_consume(
    p_tenant_id uuid, p_resource text, p_amount bigint, p_key text DEFAULT NULL, p_at timestamptz DEFAULT NULL
) RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
    v_reached double precision;
    v_reached_limit bigint;
    v_row tenancy.usage;
BEGIN
    v_state := tenancy.quota_find(p_tenant_id, p_resource, p_at);
    -- what was counted stays counted, even if its period has been closed since
    IF p_key IS NOT NULL AND (v_state.outcome IS NULL OR v_state.outcome = 'closed') THEN
        v_state.outcome := coalesce(
            tenancy.quota_replay(p_tenant_id, p_resource, p_amount, p_key), v_state.outcome);
    END IF;
    IF v_state.outcome IS NOT NULL THEN
        RETURN v_state;
    END IF;
    IF v_state.used + p_amount > v_state.amount_limit
        AND tenancy.quota_surely_exceeded(p_tenant_id, p_resource, v_state, p_amount)
    THEN
        v_state.outcome := 'exceeded';
        RETURN v_state;
    END IF;
    IF p_key IS NOT NULL THEN
        -- of two at once with the same key, the second waits here for the first
        INSERT INTO tenancy.usage_keys (tenant_id, key, resource, amount)
        VALUES (p_tenant_id, p_key, p_resource, p_amount) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            v_state.outcome := tenancy.quota_replay(p_tenant_id, p_resource, p_amount, p_key);
            RETURN v_state;
        END IF;
    END IF;
    -- one statement on one locked row checks and counts: however many processes, the limit is never exceeded, and
    -- nothing is counted that billing misses
    INSERT INTO tenancy.usage AS u (tenant_id, resource, period, period_start, period_end, used)
    SELECT p_tenant_id, p_resource, v_state.period, v_state.starts_at, v_state.ends_at, p_amount
    WHERE p_amount <= v_state.amount_limit OR v_state.amount_limit IS NULL
    ON CONFLICT (tenant_id, resource, period, period_start) DO UPDATE SET used = u.used + p_amount
    WHERE u.closed_at IS NULL
        AND (u.used + p_amount <= v_state.amount_limit OR v_state.amount_limit IS NULL)
    RETURNING u.used, u.soft_reached, u.soft_limit INTO v_state.used, v_reached, v_reached_limit;
    IF FOUND THEN
        v_state.outcome := 'counted';
        -- soft limits are in ascending order
        IF v_state.used >= v_state.soft[1] * v_state.amount_limit THEN
            v_state.crossed := tenancy.quota_cross(p_tenant_id, p_resource, v_state, v_reached, v_reached_limit);
        END IF;
        RETURN v_state;
    END IF;
    DELETE FROM tenancy.usage_keys WHERE tenant_id = p_tenant_id AND key = p_key;
    v_row := tenancy.quota_lock(p_tenant_id, p_resource, v_state);
    v_state.used := v_row.used;
    IF v_row.closed_at IS NOT NULL THEN
        v_state.outcome := 'closed';
        RETURN v_state;
    END IF;
    v_state.outcome := 'exceeded';
    v_state.in_blocks := tenancy.quota_reclaim_blocks(p_tenant_id, p_resource, v_state, NULL);
    RETURN v_state;
END $$;

CREATE FUNCTION tenancy.quota_release(
    p_tenant_id uuid, p_resource text, p_amount bigint, p_at timestamptz DEFAULT NULL
) RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
BEGIN
    v_state := tenancy.quota_find(p_tenant_id, p_resource, p_at);
    IF v_state.outcome IS NOT NULL THEN
        RETURN v_state;
    END IF;
    UPDATE tenancy.usage AS u
    SET used = greatest(u.used - p_amount, 0),
        -- each soft limit is announced once per day or month; a lifetime announces it again
        soft_reached = CASE WHEN u.period = 'lifetime'
            THEN tenancy.quota_rearm(u.soft_reached, greatest(u.used - p_amount, 0), v_state.amount_limit)
            ELSE u.soft_reached END
    WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource
        AND u.period = v_state.period AND u.period_start = v_state.starts_at AND u.closed_at IS NULL
    RETURNING u.used INTO v_state.used;
    v_state.outcome := 'counted';
    IF NOT FOUND THEN
        -- nothing was used, or the period was closed since it was looked up
        SELECT u.used, 'closed' INTO v_state.used, v_state.outcome
        FROM tenancy.usage AS u
        WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource
            AND u.period = v_state.period AND u.period_start = v_state.starts_at AND u.closed_at IS NOT NULL;
        v_state.used := coalesce(v_state.used, 0);
        v_state.outcome := coalesce(v_state.outcome, 'counted');
    END IF;
    RETURN v_state;
END $$;

-- Record a measured amount, such as the size of a database, whether or not it exceeds the limit.
CREATE FUNCTION tenancy.quota_measure(p_tenant_id uuid, p_resource text, p_value bigint) RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
    v_row tenancy.usage;
BEGIN
    v_state := tenancy.quota_find(p_tenant_id, p_resource, NULL);
    IF v_state.outcome IS NOT NULL THEN
        RETURN v_state;
    END IF;
    v_row := tenancy.quota_lock(p_tenant_id, p_resource, v_state);
    IF v_row.closed_at IS NOT NULL THEN
        v_state.outcome := 'closed';
        RETURN v_state;
    END IF;
    v_row.soft_reached := tenancy.quota_rearm(v_row.soft_reached, p_value, v_state.amount_limit);
    UPDATE tenancy.usage AS u SET used = p_value, soft_reached = v_row.soft_reached
    WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource
        AND u.period = v_state.period AND u.period_start = v_state.starts_at;
    v_state.used := p_value;
    v_state.outcome := 'counted';
    v_state.crossed := tenancy.quota_cross(p_tenant_id, p_resource, v_state, v_row.soft_reached, v_row.soft_limit);
    RETURN v_state;
END $$;
"""

HOLDS = """
CREATE FUNCTION tenancy.quota_hold(
    p_tenant_id uuid, p_resource text, p_amount bigint, p_id uuid, p_seconds double precision
) RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
    v_row tenancy.usage;
BEGIN
    v_state := tenancy.quota_find(p_tenant_id, p_resource, NULL, true);
    IF v_state.outcome IS NOT NULL THEN
        RETURN v_state;
    END IF;
    v_row := tenancy.quota_lock(p_tenant_id, p_resource, v_state);
    DELETE FROM tenancy.quota_holds
    WHERE tenant_id = p_tenant_id AND resource = p_resource AND expires_at <= clock_timestamp();
    SELECT coalesce(sum(amount), 0) INTO v_state.used
    FROM tenancy.quota_holds WHERE tenant_id = p_tenant_id AND resource = p_resource;
    IF v_state.used + p_amount > v_state.amount_limit THEN
        v_state.outcome := 'exceeded';
        RETURN v_state;
    END IF;
    INSERT INTO tenancy.quota_holds (id, tenant_id, resource, amount, expires_at)
    VALUES (p_id, p_tenant_id, p_resource, p_amount, clock_timestamp() + make_interval(secs => p_seconds));
    v_state.used := v_state.used + p_amount;
    v_state.outcome := 'counted';
    -- holds come and go all the time: a soft limit on them is announced once a day at most
    IF v_row.soft_at < v_state.at - interval '1 day' THEN
        v_row.soft_reached := 0;
    END IF;
    v_state.crossed := tenancy.quota_cross(p_tenant_id, p_resource, v_state, v_row.soft_reached, v_row.soft_limit);
    RETURN v_state;
END $$;
"""

BLOCKS = """
-- Take p_amount, of which the process has p_held unspent, and with it a block in advance. Near the limit the block
-- shrinks to what is needed, so that no process keeps what another is refused. What is unspent moves from the block
-- p_previous to the new one: should the answer be lost, which of them exists shows whether this was done.
CREATE FUNCTION tenancy.quota_take_block(
    p_tenant_id uuid, p_resource text, p_id uuid, p_previous uuid, p_held bigint, p_amount bigint, p_block bigint,
    p_seconds double precision
) RETURNS tenancy.quota_state
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_state tenancy.quota_state;
    v_row tenancy.usage;
    v_needed bigint := p_amount - p_held;
    v_left bigint;
BEGIN
    v_state := tenancy.quota_find(p_tenant_id, p_resource, NULL);
    IF v_state.outcome IS NOT NULL THEN
        RETURN v_state;
    END IF;
    IF tenancy.quota_surely_exceeded(p_tenant_id, p_resource, v_state, v_needed) THEN
        v_state.outcome := 'exceeded';
        RETURN v_state;
    END IF;
    v_row := tenancy.quota_lock(p_tenant_id, p_resource, v_state);
    v_state.used := v_row.used;
    IF v_row.closed_at IS NOT NULL THEN
        v_state.outcome := 'closed';
        RETURN v_state;
    END IF;
    v_left := v_state.amount_limit - v_row.used;
    IF v_left < v_needed THEN
        v_state.outcome := 'exceeded';
        v_state.in_blocks := tenancy.quota_reclaim_blocks(p_tenant_id, p_resource, v_state, p_previous);
        IF p_held = 0 THEN
            DELETE FROM tenancy.quota_blocks WHERE id = p_previous;
        END IF;
        RETURN v_state;
    END IF;
    v_state.granted := greatest(v_needed, least(p_block, coalesce(v_left / 8, p_block)));
    UPDATE tenancy.usage AS u SET used = u.used + v_state.granted
    WHERE u.tenant_id = p_tenant_id AND u.resource = p_resource
        AND u.period = v_state.period AND u.period_start = v_state.starts_at
    RETURNING u.used INTO v_state.used;
    DELETE FROM tenancy.quota_blocks WHERE id = p_previous;
    IF v_state.granted > v_needed THEN
        INSERT INTO tenancy.quota_blocks (id, tenant_id, resource, period, period_start, unspent, expires_at)
        VALUES (p_id, p_tenant_id, p_resource, v_state.period, v_state.starts_at, v_state.granted - v_needed,
            clock_timestamp() + make_interval(secs => p_seconds));
    END IF;
    v_state.outcome := 'counted';
    v_state.crossed := tenancy.quota_cross(p_tenant_id, p_resource, v_state, v_row.soft_reached, v_row.soft_limit);
    RETURN v_state;
END $$;

-- Return what is unspent of a block; false where the block does not exist, or its period has been closed.
CREATE FUNCTION tenancy.quota_return_block(p_id uuid, p_unspent bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_block tenancy.quota_blocks;
BEGIN
    SELECT * INTO v_block FROM tenancy.quota_blocks WHERE id = p_id;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- the usage row is locked first, as everywhere
    PERFORM 1 FROM tenancy.usage AS u
    WHERE u.tenant_id = v_block.tenant_id AND u.resource = v_block.resource
        AND u.period = v_block.period AND u.period_start = v_block.period_start FOR UPDATE;
    DELETE FROM tenancy.quota_blocks WHERE id = p_id RETURNING * INTO v_block;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE tenancy.usage AS u SET used = greatest(u.used - least(p_unspent, v_block.unspent), 0)
    WHERE u.tenant_id = v_block.tenant_id AND u.resource = v_block.resource
        AND u.period = v_block.period AND u.period_start = v_block.period_start AND u.closed_at IS NULL;
    RETURN FOUND;
END $$;
"""

READING = """
CREATE FUNCTION tenancy.quota_usage(p_tenant_id uuid, p_at timestamptz DEFAULT NULL)
RETURNS TABLE (resource text, amount_limit bigint, period text, used bigint, starts_at timestamptz, ends_at timestamptz)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT
        l.resource, l.amount, l.period,
        CASE WHEN l.period = 'concurrent' THEN (
            SELECT coalesce(sum(h.amount), 0)::bigint FROM tenancy.quota_holds AS h
            WHERE h.tenant_id = t.id AND h.resource = l.resource AND h.expires_at > clock_timestamp())
        ELSE c.used END,
        c.starts_at, c.ends_at
    FROM tenancy.tenants AS t
    CROSS JOIN LATERAL tenancy.quota_limits(t.id) AS l
    CROSS JOIN LATERAL tenancy.quota_current(
        t.id, l.resource, l.period, t.timezone, coalesce(p_at, statement_timestamp())) AS c
    WHERE t.id = p_tenant_id AND t.status <> 'purged'
    ORDER BY l.resource;
END;

-- How much of its limits each tenant uses in the current periods; only where there is a limit and use.
CREATE FUNCTION tenancy.quota_utilisation(p_at timestamptz DEFAULT NULL)
RETURNS TABLE (
    tenant_id uuid, slug text, tier text, resource text, period text, used bigint, amount_limit bigint,
    fraction double precision, ends_at timestamptz)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT
        t.id, t.slug, t.tier, u.resource, u.period, u.used, l.amount,
        CASE WHEN l.amount = 0 THEN 'infinity' ELSE u.used::double precision / l.amount END, u.period_end
    FROM tenancy.usage AS u
    JOIN tenancy.tenants AS t ON t.id = u.tenant_id
    JOIN tenancy.tiers AS i ON i.name = t.tier
    CROSS JOIN LATERAL (
        SELECT tenancy.quota_merge(i.limits -> u.resource, t.quotas -> u.resource) AS merged
    ) AS m
    CROSS JOIN LATERAL (SELECT (m.merged ->> 'amount')::bigint AS amount) AS l
    WHERE u.used > 0
        AND u.period = coalesce(m.merged ->> 'period', 'lifetime')
        AND u.period <> 'concurrent'
        AND u.closed_at IS NULL
        AND u.period_start <= coalesce(p_at, statement_timestamp())
        AND u.period_end > coalesce(p_at, statement_timestamp())
        AND l.amount IS NOT NULL
        AND t.status IN ('trial', 'active', 'suspended', 'maintenance');
END;

CREATE FUNCTION tenancy.quota_at_risk(p_fraction double precision, p_at timestamptz DEFAULT NULL)
RETURNS TABLE (
    tenant_id uuid, slug text, tier text, resource text, period text, used bigint, amount_limit bigint,
    fraction double precision, ends_at timestamptz)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT u.* FROM tenancy.quota_utilisation(p_at) AS u WHERE u.fraction >= p_fraction;
END;

-- Record which tenants are at p_fraction of a limit now, delete those that no longer are, and return those that have
-- been for p_seconds and have no proposal of a higher tier yet, or (p_apply) do not have that tier yet. Another tier
-- has other limits, so that a change of the tier starts the time again.
CREATE FUNCTION tenancy.quota_update_pressure(
    p_policy text, p_resource text, p_fraction double precision, p_seconds double precision, p_apply boolean,
    p_at timestamptz DEFAULT NULL
) RETURNS TABLE (tenant_id uuid, slug text, tier text, used bigint, amount_limit bigint, since timestamptz)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    v_at timestamptz := coalesce(p_at, statement_timestamp());
BEGIN
    DELETE FROM tenancy.quota_pressure AS p
    WHERE p.policy = p_policy AND NOT EXISTS (
        SELECT 1 FROM tenancy.quota_at_risk(p_fraction, v_at) AS r
        WHERE r.tenant_id = p.tenant_id AND r.tier = p.tier AND r.resource = p.resource AND r.resource = p_resource);
    INSERT INTO tenancy.quota_pressure (tenant_id, policy, resource, tier, since)
    SELECT r.tenant_id, p_policy, p_resource, r.tier, v_at
    FROM tenancy.quota_at_risk(p_fraction, v_at) AS r WHERE r.resource = p_resource
    ON CONFLICT DO NOTHING;
    RETURN QUERY
    SELECT r.tenant_id, r.slug, r.tier, r.used, r.amount_limit, p.since
    FROM tenancy.quota_pressure AS p
    JOIN tenancy.quota_at_risk(p_fraction, v_at) AS r
        ON r.tenant_id = p.tenant_id AND r.tier = p.tier AND r.resource = p.resource
    WHERE p.policy = p_policy AND (p_apply OR p.proposed_at IS NULL)
        AND p.since <= v_at - make_interval(secs => p_seconds)
    ORDER BY p.since;
END $$;

-- Close periods that ended p_seconds ago, 10,000 at a time, and make a usage record of each that was used. Where
-- p_tenant_id is given: that tenant's periods alone, including those that have not ended.
CREATE FUNCTION tenancy.usage_close(
    p_seconds double precision, p_at timestamptz DEFAULT NULL, p_tenant_id uuid DEFAULT NULL,
    OUT closed integer, OUT made integer
) LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_at timestamptz := coalesce(p_at, statement_timestamp());
    v_until timestamptz := CASE
        WHEN p_tenant_id IS NULL THEN v_at - make_interval(secs => p_seconds) ELSE 'infinity' END;
BEGIN
    WITH ended AS (
        UPDATE tenancy.usage AS u SET closed_at = v_at
        FROM (
            SELECT o.tenant_id, o.resource, o.period, o.period_start FROM tenancy.usage AS o
            WHERE o.closed_at IS NULL AND o.period IN ('day', 'month') AND o.period_end <= v_until
                AND (p_tenant_id IS NULL OR o.tenant_id = p_tenant_id)
            ORDER BY o.period_end LIMIT 10000
            FOR UPDATE SKIP LOCKED
        ) AS o
        WHERE u.tenant_id = o.tenant_id AND u.resource = o.resource AND u.period = o.period
            AND u.period_start = o.period_start
        RETURNING u.tenant_id, u.resource, u.period, u.period_start, u.period_end, u.used
    ), recorded AS (
    INSERT INTO tenancy.usage_records (
        tenant_id, resource, period, period_start, period_end, quantity, due_at, idempotency_key)
    SELECT
        c.tenant_id, c.resource, c.period, c.period_start, least(c.period_end, v_at), c.used, v_at,
        -- derived from the record's subject, so that a record that is lost and made again has the same key
        encode(sha256(convert_to(concat_ws('|', i.id, c.tenant_id, c.resource, c.period,
            extract(epoch FROM c.period_start)), 'UTF8')), 'hex')
    FROM ended AS c CROSS JOIN tenancy.installation AS i
    WHERE c.used > 0
    ON CONFLICT DO NOTHING
    RETURNING 1
    )
    SELECT (SELECT count(*) FROM ended), (SELECT count(*) FROM recorded) INTO closed, made;
END $$;

-- Close all periods of a tenant that is being purged, and keep its metadata, which may name who pays, with every record
-- that is not sent yet.
CREATE FUNCTION tenancy.usage_close_tenant(p_tenant_id uuid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- wait for a use that is being counted now, which usage_close would skip
    PERFORM 1 FROM tenancy.usage WHERE tenant_id = p_tenant_id AND closed_at IS NULL
    ORDER BY resource, period, period_start FOR UPDATE;
    PERFORM tenancy.usage_close(0, NULL, p_tenant_id);
    UPDATE tenancy.usage_records AS r SET metadata = t.metadata
    FROM tenancy.tenants AS t
    WHERE t.id = p_tenant_id AND r.tenant_id = p_tenant_id AND r.sent_at IS NULL;
END $$;
"""

VIEWS = """
-- tenants in use, with the sampler's last measurement
CREATE VIEW tenancy.active_tenants AS
SELECT
    t.id, t.slug, t.status, t.tier, t.server, t.created_at,
    m.sampled_at, m.size_bytes, m.connections, m.queries, m.errors
FROM tenancy.tenants AS t
LEFT JOIN LATERAL (
    SELECT s.* FROM tenancy.tenant_metrics AS s WHERE s.tenant_id = t.id ORDER BY s.sampled_at DESC LIMIT 1
) AS m ON true
WHERE t.status IN ('trial', 'active');

CREATE VIEW tenancy.tier_distribution AS
SELECT
    i.name AS tier,
    i.rank,
    count(t.id) FILTER (WHERE t.status NOT IN ('purged', 'provisioning')) AS tenants,
    count(t.id) FILTER (WHERE t.status IN ('trial', 'active')) AS active,
    count(t.id) FILTER (WHERE t.status = 'trial') AS trials,
    count(t.id) FILTER (WHERE t.status = 'suspended') AS suspended
FROM tenancy.tiers AS i
LEFT JOIN tenancy.tenants AS t ON t.tier = i.name
GROUP BY i.name, i.rank;
"""


def upgrade() -> None:
    """Create the tables of usage, the functions that count it, and the views that summarise it."""
    run_script(TABLES + PERIODS + LIMITS + STATE + CONSUME + HOLDS + BLOCKS + READING + VIEWS)


def downgrade() -> None:
    """Drop them, with all usage that was counted."""
    run_script(
        """
        DROP VIEW tenancy.active_tenants, tenancy.tier_distribution;
        DROP TRIGGER tiers_notify ON tenancy.tiers;
        DROP FUNCTION tenancy.notify_tier;
        DROP FUNCTION tenancy.usage_close_tenant, tenancy.usage_close, tenancy.quota_update_pressure,
            tenancy.quota_at_risk, tenancy.quota_utilisation, tenancy.quota_usage, tenancy.quota_return_block,
            tenancy.quota_take_block, tenancy.quota_hold, tenancy.quota_measure, tenancy.quota_release,
            tenancy.quota_consume, tenancy.quota_reclaim_blocks, tenancy.quota_cross, tenancy.quota_rearm,
            tenancy.quota_lock, tenancy.quota_replay, tenancy.quota_surely_exceeded, tenancy.quota_find,
            tenancy.quota_limits, tenancy.quota_soft, tenancy.quota_merge, tenancy.quota_current,
            tenancy.quota_period, tenancy.local_midnight;
        DROP TYPE tenancy.quota_state;
        DROP TABLE tenancy.tenant_metrics, tenancy.usage_records, tenancy.quota_pressure, tenancy.quota_blocks,
            tenancy.quota_holds, tenancy.usage_keys, tenancy.usage;
        """
    )
