"""What is dangerous in revisions is found in the SQL that they become, and named by file and line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tenancy_orm.config import MigrationConfig
from tenancy_orm.errors import ConfigurationError, MigrationError, MissingExtraError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.scripts import Environment, load
from tenancy_orm.rehearsal import git, squawk
from tenancy_orm.rehearsal.git import changed_since
from tenancy_orm.rehearsal.lint import LintFinding, heads_of, lint, revisions_between
from tests.support.projects import NOTES, Project

SAFE = 'op.execute("ALTER TABLE notes ADD COLUMN done boolean")'


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A table, and a column that is added without danger."""
    project = Project.create(tmp_path / "app")
    project.add("1", NOTES, 'op.drop_table("notes")')
    project.add("2", SAFE, 'op.execute("ALTER TABLE notes DROP COLUMN done")', down="1")
    return project


def environment(project: Project) -> Environment:
    return load(alembic_config(project.migrations))


def check(project: Project, *revisions: str, exclude: tuple[str, ...] = ()) -> list[LintFinding]:
    return list(lint(environment(project), revisions or ("head",), exclude=exclude).findings)


def rules(project: Project, *revisions: str) -> list[str]:
    return [one.rule for one in check(project, *revisions)]


def test_a_finding_names_the_line_of_the_revision_and_the_statement(project: Project) -> None:
    path = project.add(
        "3",
        """
        op.add_column(
            "notes",
            sa.Column("n", sa.BigInteger, nullable=False),
        )
        op.execute("SELECT 1; ALTER TABLE notes ALTER COLUMN body TYPE text")
        """,
        'op.drop_column("notes", "n")',
        down="2",
    )
    added, typed = check(project)
    lines = path.read_text().splitlines()
    assert (added.rule, added.level, added.revision, added.path) == ("adding-required-field", "warning", "3", str(path))
    assert "op.add_column" in lines[(added.line or 0) - 1]
    assert added.statement == "ALTER TABLE notes ADD COLUMN n BIGINT NOT NULL"
    assert added.help is not None
    assert typed.rule == "changing-column-type"
    assert "op.execute" in lines[(typed.line or 0) - 1]
    assert typed.statement == "ALTER TABLE notes ALTER COLUMN body TYPE text"


def test_what_a_run_does_by_itself_is_no_finding(project: Project) -> None:
    """It sets lock_timeout, and Alembic's statements on its version table are not the revision's."""
    assert rules(project, "2") == []
    without = lint(environment(project), ["2"], settings=MigrationConfig(lock_timeout=0)).findings
    assert [one.rule for one in without] == ["require-lock-timeout"]


def test_an_autocommit_block_is_outside_of_the_transaction(project: Project) -> None:
    block = """
        with op.get_context().autocommit_block():
            op.create_index("notes_body", "notes", ["body"], postgresql_concurrently=True, if_not_exists=True)
    """
    project.add("3", block, 'op.drop_index("notes_body", postgresql_concurrently=True, if_exists=True)', down="2")
    assert rules(project) == []
    project.add(
        "4", f"{SAFE.replace('done', 'seen')}\n{block.strip()}".replace("\n            op", "\n    op"), down="3"
    )
    assert "change-before-autocommit-block" in rules(project)


@pytest.mark.parametrize(
    ("downgrade", "message"),
    [("pass", "executes nothing"), ("raise NotImplementedError", "raises NotImplementedError")],
)
def test_a_revision_that_cannot_be_taken_back_is_found(project: Project, downgrade: str, message: str) -> None:
    project.add("3", SAFE.replace("done", "seen"), downgrade, down="2")
    (found,) = check(project)
    assert found.rule == "no-downgrade"
    assert message in found.message
    assert "undo refuses" in (found.help or "") and "--stamp-irreversible" in (found.help or "")
    # a merge does nothing in either direction
    project.add("4", down="3")
    assert rules(project) == []


def test_a_revision_that_reads_the_database_is_named_and_the_others_are_checked(project: Project) -> None:
    project.add(
        "3",
        'op.get_bind().execute(sa.text("SELECT 1")).scalar_one()',
        "op.get_bind().execute(sa.text('SELECT 1')).scalar_one()",
        down="2",
    )
    project.add("4", 'op.execute("DROP TABLE notes")', NOTES, down="3")
    assert rules(project, "3", "4") == ["not-rendered", "ban-drop-table"]


def test_findings_are_left_out_by_rule_by_comment_and_by_configuration(project: Project) -> None:
    upgrade = """
        op.execute("ALTER TABLE notes ALTER COLUMN body TYPE text")  # squawk-ignore changing-column-type
        # squawk-ignore adding-required-field, another-rule
        op.execute("ALTER TABLE notes ADD COLUMN n bigint NOT NULL")
        op.execute("-- squawk-ignore ban-drop-column\\nALTER TABLE notes DROP COLUMN done")
        op.execute("ALTER TABLE notes RENAME TO memos")
    """
    project.add("3", upgrade, "pass", down="2")
    assert sorted(rules(project)) == ["no-downgrade", "renaming-table"]
    assert [one.rule for one in check(project, exclude=("no-downgrade",))] == ["renaming-table"]
    (project.root / ".squawk.toml").write_text('excluded_rules = ["renaming-table"]\n')
    assert rules(project) == ["no-downgrade"]
    (project.root / ".squawk.toml").write_text("excluded_rules = [\n")
    with pytest.raises(ConfigurationError, match="squawk cannot check the revisions: Configuration error"):
        check(project)


def test_an_unknown_revision_or_rule_is_an_error(project: Project) -> None:
    with pytest.raises(MigrationError, match="nowhere"):
        check(project, "nowhere")
    with pytest.raises(ConfigurationError, match="nonsense"):
        check(project, "2", exclude=("nonsense",))


def test_without_the_extra_the_error_has_the_command(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tenancy-orm\[lint\]'"):
        check(project)


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_squawk_that_hangs_or_cannot_be_started_is_an_error(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = program(tmp_path / "squawk", "exec sleep 600")
    monkeypatch.setattr(squawk, "_find", lambda: str(found))
    monkeypatch.setattr(squawk, "_SECONDS", 0.1)
    with pytest.raises(ConfigurationError, match=r"squawk has not checked the revisions within 0\.1 s"):
        check(project)
    found.chmod(0o644)
    with pytest.raises(ConfigurationError, match="squawk cannot be started"):
        check(project)


@pytest.mark.parametrize(("script", "message"), [("exec sleep 600", r"within 0\.1 s"), (None, "not installed")])
def test_a_git_that_hangs_or_is_missing_is_an_error(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str
) -> None:
    (tmp_path / "bin").mkdir()
    if script is not None:
        program(tmp_path / "bin" / "git", script.replace("sleep", str(shutil.which("sleep"))))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(git, "_SECONDS", 0.1)
    with pytest.raises(ConfigurationError, match=message):
        changed_since(environment(project), "main")


def test_revisions_between_are_those_that_some_database_lacks(project: Project) -> None:
    loaded = environment(project)
    assert revisions_between(loaded, [heads_of(loaded, "base")]) == ("1", "2")
    assert revisions_between(loaded, [heads_of(loaded, "1"), heads_of(loaded, "2")]) == ("2",)
    assert revisions_between(loaded, [heads_of(loaded, "base")], "1") == ("1",)
    with pytest.raises(MigrationError, match="nowhere"):
        heads_of(loaded, "nowhere")


def test_revisions_since_a_commit_are_those_with_new_or_changed_files(project: Project) -> None:
    def run_git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, "-C", str(project.root), *arguments], check=True, capture_output=True)

    run_git("init", "-b", "main")
    run_git("add", "-A")
    run_git("commit", "-m", "first")
    assert changed_since(environment(project), "main") == ()
    run_git("checkout", "-b", "work")
    project.add("3", down="2")
    run_git("add", "-A")
    run_git("commit", "-m", "second")
    project.add("4", down="3")
    assert changed_since(environment(project), "main") == ("3", "4")
    assert changed_since(environment(project), "HEAD") == ("4",)
    for wrong in ("nowhere", "--output=x"):
        with pytest.raises(ConfigurationError):
            changed_since(environment(project), wrong)
