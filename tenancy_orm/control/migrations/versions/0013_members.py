"""People: the members of tenants, their invitations, and revocations of what an identity provider issued."""

from tenancy_orm.control.scripts import for_applications, run_script

revision = "0013_members"
down_revision = "0012_key_checks"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE tenancy.members (
    tenant_id uuid NOT NULL
        CONSTRAINT members_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    -- who it is, in the words of the identity provider
    subject text NOT NULL CONSTRAINT members_subject_check CHECK (length(subject) BETWEEN 1 AND 255),
    roles text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT members_pkey PRIMARY KEY (subject, tenant_id)
);
CREATE INDEX members_tenant_id_idx ON tenancy.members (tenant_id, created_at);

CREATE TABLE tenancy.invitations (
    id uuid CONSTRAINT invitations_pkey PRIMARY KEY,
    tenant_id uuid NOT NULL
        CONSTRAINT invitations_tenant_id_fkey REFERENCES tenancy.tenants (id) ON DELETE CASCADE,
    roles text[] NOT NULL,
    -- whom the inviter sent it to, to be shown in lists; whoever has the text may accept it
    email text CONSTRAINT invitations_email_check CHECK (length(email) BETWEEN 1 AND 320),
    digest bytea NOT NULL CONSTRAINT invitations_digest_check CHECK (octet_length(digest) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    accepted_at timestamptz,
    accepted_by text,
    withdrawn_at timestamptz,
    CONSTRAINT invitations_accepted_by_check CHECK ((accepted_at IS NULL) = (accepted_by IS NULL))
);
CREATE INDEX invitations_tenant_id_idx ON tenancy.invitations (tenant_id, created_at);

CREATE TABLE tenancy.revocations (
    kind text NOT NULL CONSTRAINT revocations_kind_check CHECK (kind IN ('subject', 'token')),
    -- the subject, or the id of the token or session
    value text NOT NULL CONSTRAINT revocations_value_check CHECK (length(value) BETWEEN 1 AND 255),
    -- what was issued to the subject before is refused
    revoked_at timestamptz NOT NULL DEFAULT now(),
    -- when everything that it refuses has expired by itself; never where NULL
    expires_at timestamptz,
    reason text,
    CONSTRAINT revocations_pkey PRIMARY KEY (kind, value)
);
CREATE INDEX revocations_expires_at_idx ON tenancy.revocations (expires_at) WHERE expires_at IS NOT NULL;
"""

# A process of an earlier version reads these as a change of the tenant, or of anything.
FUNCTIONS = """
CREATE FUNCTION tenancy.notify_member() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_notify(
            'tenancy', jsonb_build_object('t', OLD.tenant_id, 'k', NULL, 'c', 'member', 's', OLD.subject)::text);
    END IF;
    IF TG_OP <> 'DELETE' THEN  -- PostgreSQL sends two alike in one transaction once
        PERFORM pg_notify(
            'tenancy', jsonb_build_object('t', NEW.tenant_id, 'k', NULL, 'c', 'member', 's', NEW.subject)::text);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER members_notify AFTER INSERT OR DELETE OR UPDATE OF tenant_id, subject, roles ON tenancy.members
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_member();

CREATE FUNCTION tenancy.notify_revocation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_row tenancy.revocations;
BEGIN
    IF TG_OP = 'DELETE' THEN
        -- one that has ended is forgotten everywhere by now
        IF OLD.expires_at <= now() THEN
            RETURN NULL;
        END IF;
        v_row := OLD;
    ELSE
        v_row := NEW;
    END IF;
    PERFORM pg_notify('tenancy', jsonb_build_object(
        't', NULL, 'k', NULL, 'c', 'revocation',
        CASE v_row.kind WHEN 'subject' THEN 's' ELSE 'j' END, v_row.value)::text);
    RETURN NULL;
END $$;
CREATE TRIGGER revocations_notify AFTER INSERT OR DELETE OR UPDATE ON tenancy.revocations
    FOR EACH ROW EXECUTE FUNCTION tenancy.notify_revocation();
"""

PROTECTION = """
SELECT tenancy.protect_rows('tenancy.members', 'tenant_id');
SELECT tenancy.protect_rows('tenancy.invitations', 'tenant_id');
"""

# NOT VALID: every entry that exists passed a narrower check, and the scan would lock the log.
ACTORS = """
ALTER TABLE tenancy.audit_log
    DROP CONSTRAINT audit_log_actor_kind_check,
    ADD CONSTRAINT audit_log_actor_kind_check CHECK (
        actor_kind IN ('system', 'operator', 'key', 'token', 'session', 'anonymous')) NOT VALID;
"""


def upgrade() -> None:
    """Add the tables; the audit log takes entries of every kind of credential."""
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON tenancy.members, tenancy.invitations, tenancy.revocations TO %1$I"
    policy = "CREATE POLICY %2$I ON {} FOR ALL TO %1$I USING (true) WITH CHECK (true)"
    policies = [for_applications(policy.format(table)) for table in ("tenancy.members", "tenancy.invitations")]
    run_script("".join((TABLES, FUNCTIONS, PROTECTION, *policies, ACTORS, for_applications(grant))))


def downgrade() -> None:
    """Drop the tables: nobody is a member of any tenant. Audit entries that people caused stay."""
    run_script(
        """
        DROP TABLE tenancy.members, tenancy.invitations, tenancy.revocations;
        DROP FUNCTION tenancy.notify_member, tenancy.notify_revocation;
        ALTER TABLE tenancy.audit_log
            DROP CONSTRAINT audit_log_actor_kind_check,
            ADD CONSTRAINT audit_log_actor_kind_check CHECK (actor_kind IN ('system', 'operator', 'key')) NOT VALID;
        """
    )
