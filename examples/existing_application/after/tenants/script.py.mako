"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
${imports + "\n" if imports else ""}
# revision identifiers, used by Alembic
revision: str = ${repr(up_revision)}
down_revision: str | Sequence[str] | None = ${repr(down_revision)}
branch_labels: str | Sequence[str] | None = ${repr(branch_labels)}
depends_on: str | Sequence[str] | None = ${repr(depends_on)}


# What must hold in every tenant's database before the first one is changed: SQL that returns what is wrong.
# def preflight():
#     yield Check("no NULLs in users.email", "SELECT FROM users WHERE email IS NULL")  # from tenancy_orm.migrations


def upgrade() -> None:
    """Change one tenant's schema."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Change it back."""
    ${downgrades if downgrades else "pass"}
