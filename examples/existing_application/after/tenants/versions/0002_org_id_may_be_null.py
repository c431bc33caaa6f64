# tenants/versions/0002_org_id_may_be_null.py
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    for table in ("tickets", "comments"):
        op.alter_column(table, "org_id", nullable=True)


def downgrade() -> None:
    for table in ("tickets", "comments"):
        op.alter_column(table, "org_id", nullable=False)
