"""A revision that autogenerate writes imports what it uses: it runs as it is, whatever package its types come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm.config import TenancyConfig
from tests.support.alembic_program import Alembic
from tests.support.fleet import open_fleet
from tests.support.projects import Project

TYPES = """
import sqlalchemy as sa


class Money(sa.types.TypeDecorator):
    impl = sa.Numeric(12, 2)
    cache_ok = True


class Label(sa.types.TypeDecorator):
    # its constructor does not take the length that its text shows
    impl = sa.String(40)
    cache_ok = True

    def __init__(self, kind):
        super().__init__()
        self.kind = kind


class Shown(sa.types.UserDefinedType):
    cache_ok = True

    def __repr__(self):
        return "Shown()"

    def get_col_spec(self, **options):
        return "text"
"""

APP = """
import sqlalchemy as sa
import sqlalchemy_utils as su
import sqlmodel
from pgvector.sqlalchemy import HALFVEC, VECTOR
from sqlalchemy.dialects import postgresql as pg
from emporium.db.types import Label, Money, Shown
from tenancy_orm import TenancyConfig

metadata = sqlmodel.SQLModel.metadata


class Hero(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str = sqlmodel.Field(max_length=50)


sa.Table(
    "things",
    metadata,
    sa.Column("id", su.UUIDType(binary=False), primary_key=True),
    sa.Column("embedding", VECTOR(3)),
    sa.Column("halves", pg.ARRAY(HALFVEC(2))),
    sa.Column("email", su.EmailType),
    sa.Column("kind", su.ChoiceType([("a", "A")])),
    sa.Column("price", Money, server_default=sa.literal(0)),
    sa.Column("label", Label("x")),
    sa.Column("shown", Shown),
    sa.Column("either", sa.String(5).with_variant(Money(), "postgresql")),
    sa.Column("span", pg.TSTZRANGE),
    sa.Column("double", sa.Integer, sa.Computed("1 + 1", persisted=True)),
    sa.Column("at", sa.DateTime, server_default=sa.func.now()),
    pg.ExcludeConstraint((sa.column("span"), "&&"), using="gist"),
    sa.Index("things_lower", sa.func.lower(sa.literal_column("kind")), postgresql_where=sa.text("price > 0")),
    info={"kind": "emporium", "type": Money},
)
config = TenancyConfig.from_env(metadata=metadata)
"""

PACKAGES = ("pgvector.sqlalchemy.vector", "pgvector.sqlalchemy.halfvec", "sqlmodel.sql.sqltypes", "emporium.db.types")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app", app="demo:config")
    (project.root / "demo.py").write_text(APP)
    (project.root / "emporium" / "db").mkdir(parents=True)
    (project.root / "emporium" / "db" / "types.py").write_text(TYPES)
    return project


async def test_a_generated_revision_runs_as_it_is(
    config: TenancyConfig, project: Project, variables: dict[str, str]
) -> None:
    alembic = Alembic(project, {**variables, "TENANCY_EXTENSIONS": "vector"})
    async with open_fleet(config.replace(extensions=["vector"]), initialise=True) as fleet:
        await alembic("revision", "--autogenerate", "--rev-id", "0001")
        written = next((project.migrations / "versions").glob("0001*")).read_text()
        for package in (*PACKAGES, "sqlalchemy_utils.types.uuid", "sqlalchemy_utils.types.email"):
            assert written.count(f"import {package}\n") == 1
        assert "emporium.db.types.Money(precision=12, scale=2)" in written
        # what cannot be made from its own text is written as the type inside
        assert "sa.Column('label', sa.String(length=40), nullable=True)" in written
        assert "sa.Column('kind', sa.Unicode(length=255), nullable=True)" in written
        assert "sqlalchemy_utils.types.choice" not in written
        assert "info={'kind': 'emporium'}" in written
        assert "there are no tenants" in await alembic("upgrade", "head")
        await fleet.create("acme")
        assert await fleet.columns("acme", "hero") == ["id", "name"]
        assert (await fleet.columns("acme", "things"))[1:3] == ["embedding", "halves"]
        # a type that goes away is written into the downgrade, as PostgreSQL has it
        (project.root / "demo.py").write_text(APP.replace('    sa.Column("embedding", VECTOR(3)),\n', ""))
        await alembic("revision", "--autogenerate", "--rev-id", "0002")
        written = next((project.migrations / "versions").glob("0002*")).read_text()
        assert "import pgvector.sqlalchemy.vector\n" in written
        await alembic("upgrade", "head")
        await alembic("downgrade", "-1")
        assert "embedding" in await fleet.columns("acme", "things")


async def test_what_env_py_renders_itself_wins(
    config: TenancyConfig, project: Project, variables: dict[str, str]
) -> None:
    alembic = Alembic(project, {**variables, "TENANCY_EXTENSIONS": "vector"})
    env = project.migrations / "env.py"
    env.write_text(
        env.read_text().replace(
            "environment.run(",
            "def render(kind, item, context):\n"
            "    if kind == 'type' and type(item).__name__ == 'Money':\n"
            "        context.imports.add('from emporium.db import types as own')\n"
            "        return 'own.Money()'\n"
            "    return False\n\n\n"
            "environment.run(",
        )
    )
    project.configure("target_metadata=target_metadata, render_item=render")
    async with open_fleet(config.replace(extensions=["vector"]), initialise=True):
        await alembic("revision", "--autogenerate", "--rev-id", "0001")
        path = next((project.migrations / "versions").glob("0001*"))
        written = path.read_text()
        assert "from emporium.db import types as own" in written
        assert "sa.Column('price', own.Money(), server_default" in written
        assert "import pgvector.sqlalchemy.vector\n" in written
        path.unlink()
        # nor does it import what a prefix of env.py's own refers to
        env.write_text(env.read_text().replace("render_item=render", "user_module_prefix='own.'"))
        await alembic("revision", "--autogenerate", "--rev-id", "0001")
        written = next((project.migrations / "versions").glob("0001*")).read_text()
        assert "own.VECTOR(dim=3)" in written
        assert "import pgvector" not in written
