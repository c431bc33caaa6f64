"""A fingerprint identifies the schema of a template."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tenancy_orm.config import MigrationConfig
from tenancy_orm.errors import ConfigurationError
from tenancy_orm.migrations import AlembicSchema, MetadataSchema
from tests.support.projects import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project.create(tmp_path / "app")
    project.add("1")
    return project


def test_the_head_is_what_a_database_is_at_in_the_end(project: Project) -> None:
    schema = AlembicSchema(project.migrations)
    assert schema.head() == "1"
    project.add("b")
    assert schema.head() == "1,b"
    project.add("d", depends="b")
    assert schema.head() == "1,d", "what another head depends on is not written into the version table"


def test_a_directory_without_revisions_has_no_head(tmp_path: Path) -> None:
    schema = AlembicSchema(Project.create(tmp_path).migrations)
    assert schema.head() is None
    assert len(schema.fingerprint()) == 64


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="tenancy init"):
        AlembicSchema(tmp_path / "nowhere").fingerprint()


@pytest.mark.parametrize(
    "change",
    ["new revision", "edited revision", "edited env.py", "removed revision", "file", "renamed file", "ini setting"],
)
def test_the_fingerprint_changes_with_the_files(project: Project, change: str) -> None:
    extra = project.add("2", down="1")
    schema = AlembicSchema(project.migrations)
    script = project.migrations / "sql" / "views.sql"
    script.parent.mkdir()
    script.write_text("CREATE VIEW v AS SELECT 1")
    before = schema.fingerprint()
    env = project.migrations / "env.py"
    if change == "new revision":
        project.add("3", down="2")
    elif change == "edited revision":
        project.add("2", "op.execute('SELECT 1')", down="1")
    elif change == "edited env.py":
        env.write_text(env.read_text() + "# changed\n")
    elif change == "file":
        script.write_text("CREATE VIEW v AS SELECT 2")
    elif change == "renamed file":
        script.rename(script.with_name("other.sql"))
    elif change == "ini setting":
        project.ini.write_text(project.ini.read_text().replace("[alembic]", "[alembic]\nnumber_of_shards = 4"))
    else:
        extra.unlink()
    assert schema.fingerprint() != before
    assert AlembicSchema(project.migrations).fingerprint() == schema.fingerprint()


def test_the_fingerprint_does_not_change_with_time_or_place(project: Project, tmp_path: Path) -> None:
    before = AlembicSchema(project.migrations).fingerprint()
    (project.migrations / "versions" / "1.py").touch()
    for cache in ("__pycache__/1.cpython-311.pyc", ".hidden", "1.py~", "1.pyc"):
        path = project.migrations / "versions" / cache
        path.parent.mkdir(exist_ok=True)
        path.write_text("not a revision")
    project.root.rename(tmp_path / "moved")
    assert AlembicSchema(tmp_path / "moved" / "migrations").fingerprint() == before


def test_linked_directories_count_and_may_go_in_circles(project: Project, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "views.sql").write_text("SELECT 1")
    (shared / "back").symlink_to(project.migrations)
    (shared / "nothing").symlink_to(tmp_path / "nothing")
    (project.migrations / "sql").symlink_to(shared)
    before = AlembicSchema(project.migrations).fingerprint()
    (shared / "views.sql").write_text("SELECT 2")
    assert AlembicSchema(project.migrations).fingerprint() != before


def test_the_fingerprint_changes_with_what_a_revision_can_read_of_the_configuration(project: Project) -> None:
    def fingerprint(ini: str = "", **settings: Any) -> str:
        project.ini.write_text(f"[alembic]\nscript_location = %(here)s/migrations\npath_separator = os\n{ini}\n")
        return AlembicSchema(project.migrations, settings=MigrationConfig(**settings)).fingerprint()

    plain = fingerprint()
    assert fingerprint("file_template = %%(rev)s\nsqlalchemy.url = postgresql://h/d") == plain
    assert fingerprint("colour = red") != plain
    assert fingerprint(x_arguments=["colour=red"]) != plain
    toml = project.root / "pyproject.toml"
    toml.write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
    assert fingerprint() == plain
    toml.write_text('[tool.alembic]\ncolour = "red"\n')
    assert fingerprint() != plain


def test_unchanged_files_are_not_read_again(project: Project) -> None:
    schema = AlembicSchema(project.migrations)
    before = schema.fingerprint()
    revision = project.migrations / "versions" / "1.py"
    stat = revision.stat()
    text = revision.read_text()
    revision.write_text(text.replace("a change", "a chance"))
    os.utime(revision, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert schema.fingerprint() == before, "same time and size"
    assert AlembicSchema(project.migrations).fingerprint() != before


def make_metadata(*columns: sa.Column[int]) -> sa.MetaData:
    metadata = sa.MetaData()
    sa.Table("t", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)
    return metadata


def test_the_fingerprint_of_metadata_is_that_of_its_ddl() -> None:
    plain = MetadataSchema(make_metadata()).fingerprint()
    assert MetadataSchema(make_metadata()).fingerprint() == plain
    assert MetadataSchema(make_metadata(sa.Column("n", sa.Integer))).fingerprint() != plain
    assert MetadataSchema(make_metadata(sa.Column("n", sa.Integer, index=True))).fingerprint() != plain
    kind: sa.Column[int] = sa.Column("kind", sa.Enum("a", "b", name="kind"))
    assert MetadataSchema(make_metadata(kind)).fingerprint() != plain


def test_the_fingerprint_of_metadata_sees_defaults_comments_enums_and_schemas() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"server_default": "1"},
        {"server_default": "2"},
        {"comment": "one"},
        {"comment": "two"},
        {"nullable": False},
        {"table_comment": "one"},
        {"labels": ("a", "b", "c")},
        {"schema": "billing"},
        {"kind_schema": "kinds"},
        {"listener": "CREATE VIEW v AS SELECT 1"},
    ]
    found = {MetadataSchema(variant(**options)).fingerprint() for options in variants}
    assert len(found) == len(variants)


def variant(
    *,
    table_comment: str | None = None,
    labels: tuple[str, ...] = ("a", "b"),
    schema: str | None = None,
    kind_schema: str | None = None,
    listener: str | None = None,
    **column: Any,
) -> sa.MetaData:
    metadata = sa.MetaData()
    kind = sa.Enum(*labels, name="kind", schema=kind_schema)
    sa.Table(
        "t",
        metadata,
        sa.Column("n", sa.Integer, **column),
        sa.Column("kind", kind),
        comment=table_comment,
        schema=schema,
    )
    if listener is not None:
        sa.event.listen(metadata, "after_create", sa.DDL(listener))  # type: ignore[no-untyped-call]
    return metadata


def test_the_fingerprint_of_metadata_is_the_same_in_every_process() -> None:
    """A table's indexes are a set of objects, which each process has in another order."""
    columns = [sa.Column(name, sa.Integer, index=True) for name in "abcd"]
    metadata = make_metadata(*columns)
    (table,) = metadata.tables.values()
    found = set()
    for indexes in itertools.permutations(table.indexes):
        table.indexes = indexes  # type: ignore[assignment]
        found.add(MetadataSchema(metadata).fingerprint())
    assert len(found) == 1


def test_metadata_has_no_revision() -> None:
    assert MetadataSchema(make_metadata()).head() is None
