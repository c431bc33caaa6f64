"""Alembic projects as a user of this package has them, written by the tests."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from tenancy_orm.migrations.layout import init_directory
from tests.support.modules import write_module

_REVISION = '''\
"""{message}"""

import sqlalchemy as sa
from alembic import context, op

from tenancy_orm.migrations import Check

revision = {revision!r}
down_revision = {down!r}
branch_labels = None
depends_on = {depends!r}

{preflight}
def upgrade():
{upgrade}


def downgrade():
{downgrade}
'''


@dataclass(frozen=True)
class Project:
    """A directory with ``alembic.ini`` and ``migrations``."""

    root: Path

    @classmethod
    def create(cls, root: Path, *, app: str | None = None) -> Project:
        """Make the directory from the package's template, as ``tenancy init`` does."""
        root.mkdir(parents=True, exist_ok=True)
        init_directory(root / "migrations", app=app)
        return cls(root)

    @property
    def migrations(self) -> Path:
        return self.root / "migrations"

    @property
    def ini(self) -> Path:
        return self.root / "alembic.ini"

    def add(
        self,
        revision: str,
        upgrade: str = "pass",
        downgrade: str = "pass",
        *,
        down: str | tuple[str, ...] | None = None,
        depends: str | None = None,
        message: str = "a change",
        preflight: str | None = None,
    ) -> Path:
        """Write a revision; ``upgrade``, ``downgrade`` and ``preflight`` are the bodies of its functions."""
        path = self.migrations / "versions" / f"{revision}.py"
        write_module(
            path,
            _REVISION.format(
                message=message,
                revision=revision,
                down=down,
                depends=depends,
                preflight="" if preflight is None else f"\ndef preflight():\n{_body(preflight)}\n\n",
                upgrade=_body(upgrade),
                downgrade=_body(downgrade),
            ),
        )
        return path

    def configure(self, options: str) -> None:
        """Give ``environment.run`` in env.py more arguments."""
        env = self.migrations / "env.py"
        write_module(env, env.read_text().replace("    target_metadata=target_metadata,\n", f"    {options},\n"))


def _body(code: str) -> str:
    return textwrap.indent(textwrap.dedent(code).strip("\n"), "    ")


NOTES = """
op.create_table(
    "notes",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("body", sa.String(1000), nullable=False),
)
"""
