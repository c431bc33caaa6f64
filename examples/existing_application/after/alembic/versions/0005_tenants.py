# alembic/versions/0005_tenants.py
import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("organisations", sa.Column("tenant_id", sa.Uuid(), unique=True))
    op.execute(
        """
        CREATE FUNCTION refuse_moved() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            organisation int := coalesce(NEW.org_id, OLD.org_id);
        BEGIN
            PERFORM FROM organisations WHERE id = organisation AND tenant_id IS NULL FOR SHARE;
            IF NOT FOUND THEN
                RAISE 'organisation % has moved', organisation;
            END IF;
            RETURN coalesce(NEW, OLD);
        END $$
        """
    )
    for table in ("tickets", "comments"):
        op.execute(
            f"CREATE TRIGGER refuse_moved BEFORE INSERT OR UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION refuse_moved()"
        )
    # PostgreSQL lets every role connect to every database, tenants' roles too
    op.execute("DO $$BEGIN EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database()); END$$")


def downgrade() -> None:
    for table in ("tickets", "comments"):
        op.execute(f"DROP TRIGGER refuse_moved ON {table}")
    op.execute("DROP FUNCTION refuse_moved")
    op.drop_column("organisations", "tenant_id")
