"""Data keys for envelope encryption, and room for a tenant's next password while it is being rotated."""

from tenancy_orm.control.scripts import run_script

revision = "0004_keys"
down_revision = "0003_quotas"
branch_labels = None
depends_on = None

UPGRADE = """
-- wrapped by a key that is kept elsewhere; the newest data key seals
CREATE TABLE tenancy.data_keys (
    id text CONSTRAINT data_keys_pkey PRIMARY KEY
        CONSTRAINT data_keys_id_check CHECK (id ~ '^[A-Za-z0-9_-]{1,16}$'),
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT data_keys_number_key UNIQUE,
    wrapped bytea NOT NULL,
    wrapper text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE FUNCTION tenancy.notify_data_key() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM pg_notify('tenancy', jsonb_build_object('t', NULL, 'k', NULL, 'c', 'data_key')::text);
    RETURN NULL;
END $$;
CREATE TRIGGER data_keys_notify AFTER INSERT ON tenancy.data_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tenancy.notify_data_key();

-- written before the role gets the new password, so that a process that is killed in between loses nothing
ALTER TABLE tenancy.tenants
    ADD COLUMN next_sealed_password bytea,
    ADD CONSTRAINT tenants_next_sealed_password_check CHECK (status <> 'purged' OR next_sealed_password IS NULL);
CREATE INDEX tenants_next_sealed_password_idx ON tenancy.tenants (id) WHERE next_sealed_password IS NOT NULL;
"""


def upgrade() -> None:
    """Add the data keys and the column of the next password."""
    run_script(UPGRADE)


def downgrade() -> None:
    """Remove both; a rotation that is under way must be repeated."""
    run_script(
        """
        ALTER TABLE tenancy.tenants DROP COLUMN next_sealed_password;
        DROP TABLE tenancy.data_keys;
        DROP FUNCTION tenancy.notify_data_key;
        """
    )
