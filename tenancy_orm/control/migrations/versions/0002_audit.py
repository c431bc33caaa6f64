"""The audit log: append-only, one hash chain, partitioned by month."""

from tenancy_orm.control.scripts import run_script

revision = "0002_audit"
down_revision = "0001_registry"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.audit_log (
    sequence bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    action text NOT NULL CONSTRAINT audit_log_action_check CHECK (action ~ '^[a-z][a-z0-9_.]{0,99}$'),
    tenant_id uuid,
    slug text,
    actor_kind text NOT NULL
        CONSTRAINT audit_log_actor_kind_check CHECK (actor_kind IN ('system', 'operator', 'key')),
    actor_id text,
    before jsonb,
    after jsonb,
    detail jsonb,
    request_id text,
    source text,
    database_role text NOT NULL,
    previous_hash bytea NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT audit_log_pkey PRIMARY KEY (sequence, occurred_at),
    CONSTRAINT audit_log_hash_check CHECK (octet_length(hash) = 32 AND octet_length(previous_hash) = 32)
) PARTITION BY RANGE (occurred_at);

-- times never run backwards along the chain, so the order (occurred_at, sequence) is the chain's own, and PostgreSQL
-- reads the newest partition first and stops there
CREATE INDEX audit_log_occurred_at_idx ON tenancy.audit_log (occurred_at, sequence);
CREATE INDEX audit_log_tenant_id_idx ON tenancy.audit_log (tenant_id, occurred_at, sequence);
CREATE INDEX audit_log_slug_idx ON tenancy.audit_log (slug, occurred_at, sequence);
CREATE INDEX audit_log_actor_idx ON tenancy.audit_log (actor_kind, actor_id, occurred_at, sequence);
CREATE INDEX audit_log_action_idx ON tenancy.audit_log (action, occurred_at, sequence);
-- for audit_summary by day; in a table that only grows, a BRIN index takes a few bytes and hardly any work
CREATE INDEX audit_log_day_idx ON tenancy.audit_log USING brin (((occurred_at AT TIME ZONE 'UTC')::date));

-- the one row that every append locks, so that the chain cannot fork
CREATE TABLE tenancy.audit_head (
    singleton boolean NOT NULL DEFAULT true
        CONSTRAINT audit_head_pkey PRIMARY KEY
        CONSTRAINT audit_head_singleton_check CHECK (singleton),
    sequence bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    hash bytea NOT NULL,
    partitioned_until timestamptz NOT NULL
) WITH (fillfactor = 10);
INSERT INTO tenancy.audit_head (sequence, occurred_at, hash, partitioned_until)
VALUES (0, 'epoch', decode(repeat('00', 32), 'hex'), 'epoch');

-- what retention removed: all entries up to this sequence number; the next entry continues from its hash
CREATE TABLE tenancy.audit_cuts (
    sequence bigint CONSTRAINT audit_cuts_pkey PRIMARY KEY,
    occurred_at timestamptz NOT NULL,
    hash bytea NOT NULL CONSTRAINT audit_cuts_hash_check CHECK (octet_length(hash) = 32),
    cut_at timestamptz NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL
);

-- public keys that signed cuts and checkpoints, each signed by a newer key. Without a key nobody can add a row that
-- counts; and since the signature is the primary key, no forged row can keep a genuine one out
CREATE TABLE tenancy.audit_keys (
    signature bytea CONSTRAINT audit_keys_pkey PRIMARY KEY,
    key_id text NOT NULL,
    public_key bytea NOT NULL,
    signed_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
"""

GUARDS = """
CREATE FUNCTION tenancy.audit_refuse() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only: % on % is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'TN010', TABLE = TG_TABLE_NAME;
END $$;

-- a statement-level trigger fires for the table that the statement names: the parent has one here, and each partition
-- gets its own when it is created
CREATE TRIGGER audit_log_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON tenancy.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION tenancy.audit_refuse();
ALTER TABLE tenancy.audit_log ENABLE ALWAYS TRIGGER audit_log_refuse;
CREATE TRIGGER audit_cuts_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON tenancy.audit_cuts
    FOR EACH STATEMENT EXECUTE FUNCTION tenancy.audit_refuse();
ALTER TABLE tenancy.audit_cuts ENABLE ALWAYS TRIGGER audit_cuts_refuse;
CREATE TRIGGER audit_keys_refuse BEFORE UPDATE OR DELETE OR TRUNCATE ON tenancy.audit_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tenancy.audit_refuse();
ALTER TABLE tenancy.audit_keys ENABLE ALWAYS TRIGGER audit_keys_refuse;
CREATE TRIGGER audit_head_refuse BEFORE DELETE OR TRUNCATE ON tenancy.audit_head
    FOR EACH STATEMENT EXECUTE FUNCTION tenancy.audit_refuse();
ALTER TABLE tenancy.audit_head ENABLE ALWAYS TRIGGER audit_head_refuse;
"""

FUNCTIONS = """
-- makes the months of the log, up to so many ahead
CREATE FUNCTION tenancy.audit_ensure_partitions(p_months integer DEFAULT 3) RETURNS integer
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
        -- neither INCLUDING ALL nor attaching copies row-level security, which revision 0006 enables; it makes both of
        -- these functions too
        IF (SELECT relrowsecurity FROM pg_class WHERE oid = 'tenancy.audit_log'::regclass) THEN
            PERFORM tenancy.protect_rows(format('tenancy.%I', v_name)::regclass, 'tenant_id');
            PERFORM tenancy.audit_share_partition(format('tenancy.%I', v_name)::regclass);
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

-- the text that is hashed: a JSON array of numbers, strings and nulls, as both jsonb and Python's json.dumps write it
CREATE FUNCTION tenancy.audit_canonical(p_entry tenancy.audit_log) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
RETURN jsonb_build_array(
    'tenancy-audit-1', encode((p_entry).previous_hash, 'hex'), (p_entry).sequence,
    (extract(epoch FROM (p_entry).occurred_at) * 1000000)::bigint,
    (p_entry).actor_kind, (p_entry).actor_id, (p_entry).action, (p_entry).tenant_id::text, (p_entry).slug,
    (p_entry).before::text, (p_entry).after::text, (p_entry).detail::text,
    (p_entry).request_id, (p_entry).source, (p_entry).database_role)::text;

CREATE FUNCTION tenancy.audit_append(
    p_action text, p_tenant_id uuid, p_slug text, p_actor_kind text, p_actor_id text,
    p_before jsonb, p_after jsonb, p_detail jsonb, p_request_id text, p_source text
) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_head tenancy.audit_head;
    v_entry tenancy.audit_log;
BEGIN
    SELECT * INTO STRICT v_head FROM tenancy.audit_head FOR UPDATE;
    v_entry.sequence := v_head.sequence + 1;
    v_entry.occurred_at := greatest(clock_timestamp(), v_head.occurred_at);
    v_entry.action := p_action;
    v_entry.tenant_id := p_tenant_id;
    v_entry.slug := p_slug;
    v_entry.actor_kind := p_actor_kind;
    v_entry.actor_id := p_actor_id;
    v_entry.before := p_before;
    v_entry.after := p_after;
    v_entry.detail := p_detail;
    v_entry.request_id := p_request_id;
    v_entry.source := p_source;
    -- the role that logged in, whatever SET ROLE says and whatever role this function runs as
    v_entry.database_role := session_user;
    v_entry.previous_hash := v_head.hash;
    v_entry.hash := sha256(convert_to(tenancy.audit_canonical(v_entry), 'UTF8'));
    -- a month ahead, so that an append at the turn of the month rarely has to create one
    IF v_entry.occurred_at + interval '31 days' >= v_head.partitioned_until THEN
        PERFORM tenancy.audit_ensure_partitions(3);
    END IF;
    INSERT INTO tenancy.audit_log SELECT v_entry.*;
    UPDATE tenancy.audit_head
    SET sequence = v_entry.sequence, occurred_at = v_entry.occurred_at, hash = v_entry.hash;
    RETURN v_entry.sequence;
END $$;

REVOKE ALL ON FUNCTION tenancy.audit_ensure_partitions, tenancy.audit_append, tenancy.audit_canonical FROM PUBLIC;
"""

VIEWS = """
CREATE VIEW tenancy.audit_summary WITH (security_barrier) AS
SELECT
    (occurred_at AT TIME ZONE 'UTC')::date AS day,
    action,
    actor_kind,
    count(*) AS entries,
    count(DISTINCT tenant_id) AS tenants,
    min(occurred_at) AS first_at,
    max(occurred_at) AS last_at
FROM tenancy.audit_log
GROUP BY 1, 2, 3;
"""


def upgrade() -> None:
    """Create the log, its guards and its functions, and the first partitions."""
    run_script(TABLES + GUARDS + FUNCTIONS + VIEWS + "SELECT tenancy.audit_ensure_partitions(3);")


def downgrade() -> None:
    """Drop the log. Dump it and export a checkpoint first: it cannot be restored."""
    run_script(
        """
        DROP VIEW tenancy.audit_summary;
        DROP FUNCTION tenancy.audit_append, tenancy.audit_canonical, tenancy.audit_ensure_partitions;
        DROP TABLE tenancy.audit_log, tenancy.audit_head, tenancy.audit_cuts, tenancy.audit_keys;
        DROP FUNCTION tenancy.audit_refuse;
        """
    )
