"""The steps of a command are computed before it runs, from the database's revision."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenancy_orm.errors import MigrationError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.plan import Heads, Plan, format_revision
from tenancy_orm.migrations.scripts import Environment, load
from tests.support.projects import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with three revisions in a row: 1, 2, 3."""
    project = Project.create(tmp_path)
    project.add("1")
    project.add("2", down="1")
    project.add("3", down="2")
    return project


def environment(project: Project) -> Environment:
    return load(alembic_config(project.migrations))


def heads(*revisions: str) -> Heads:
    return frozenset(revisions)


def states(plan: Plan, *start: str) -> list[str | None]:
    return [format_revision(state) for state in plan.path_from(heads(*start)).states]


def test_a_revision_is_written_in_one_text() -> None:
    assert format_revision(()) is None
    assert format_revision(["b", "a"]) == "a,b"


def test_an_upgrade_goes_from_where_the_database_is(project: Project) -> None:
    plan = Plan.of(environment(project), "upgrade", "head")
    assert states(plan) == [None, "1", "2", "3"]
    assert states(plan, "2") == ["2", "3"]
    assert states(plan, "3") == ["3"]


def test_a_downgrade_goes_back(project: Project) -> None:
    loaded = environment(project)
    assert states(Plan.of(loaded, "downgrade", "1"), "3") == ["3", "2", "1"]
    assert states(Plan.of(loaded, "downgrade", "base"), "2") == ["2", "1", None]
    assert states(Plan.of(loaded, "downgrade", "-1"), "3") == ["3", "2"]


def test_a_stamp_is_one_step(project: Project) -> None:
    loaded = environment(project)
    assert states(Plan.of(loaded, "stamp", "3"), "1") == ["1", "3"]
    assert states(Plan.of(loaded, "stamp", "1"), "3") == ["3", "1"]
    assert states(Plan.of(loaded, "stamp", "2", purge=True), "lost") == [None, "2"]


def test_branches_merge_and_part_as_alembic_has_it(project: Project) -> None:
    project.add("a", down="2")
    project.add("m", down=("3", "a"))
    loaded = environment(project)
    assert states(Plan.of(loaded, "upgrade", "head"), "3") == ["3", "3,a", "m"]
    assert states(Plan.of(loaded, "downgrade", "2"), "m")[-1] == "2"
    assert states(Plan.of(loaded, "downgrade", "3"), "m") == ["m", "3,a"]


def test_dependencies_are_implied_as_alembic_has_it(project: Project) -> None:
    project.add("d", depends="3")
    loaded = environment(project)
    assert states(Plan.of(loaded, "upgrade", "heads"), "2") == ["2", "3", "d"]


def test_routes_are_worked_out_once(project: Project) -> None:
    plan = Plan.of(environment(project), "upgrade", "head")
    assert plan.path_from(heads("1")) is plan.path_from(heads("1"))


def test_what_remains_depends_on_how_far_it_came(project: Project) -> None:
    path = Plan.of(environment(project), "upgrade", "head").path_from(heads())
    assert [str(step.revision.revision) for step in path.remaining(heads("1")) or ()] == ["2", "3"]  # type: ignore[union-attr]
    assert path.remaining(heads("3")) == ()
    assert path.remaining(heads("elsewhere")) is None


@pytest.mark.parametrize(
    ("revision", "relative"), [("head", False), ("3", False), ("+1", True), ("-2", True), ("1+1", True)]
)
def test_relative_targets_are_known(project: Project, revision: str, relative: bool) -> None:
    assert Plan.of(environment(project), "upgrade", revision).is_relative is relative


@pytest.mark.parametrize(
    ("command", "revision", "reaches"),
    [
        ("upgrade", "head", True),
        ("upgrade", "heads", True),
        ("upgrade", "3", True),
        ("upgrade", "2", False),
        ("upgrade", "+1", False),
        ("downgrade", "3", False),
        ("stamp", "head", False),
    ],
)
def test_an_upgrade_to_head_is_known(project: Project, command: str, revision: str, reaches: bool) -> None:
    assert Plan.of(environment(project), command, revision).reaches_head is reaches


def test_no_way_to_the_target_is_an_error_that_says_where_it_is(project: Project) -> None:
    plan = Plan.of(environment(project), "upgrade", "head")
    with pytest.raises(
        MigrationError,
        match=r"cannot upgrade from lost: Can't locate revision identified by 'lost'; the database is newer than this "
        "code, or of another branch: use the code that has this revision$",
    ):
        plan.path_from(heads("lost"))
    with pytest.raises(MigrationError, match=r"cannot upgrade from 3: Relative revision .* produce 1 migrations$"):
        Plan.of(environment(project), "upgrade", "+1").path_from(heads("3"))


def test_an_ambiguous_or_unknown_target_is_refused(project: Project) -> None:
    project.add("a", down="2")
    with pytest.raises(MigrationError, match="Multiple head revisions"):
        Plan.of(environment(project), "upgrade", "head")
    with pytest.raises(MigrationError, match="Can't locate revision"):
        Plan.of(environment(project), "stamp", ["3", "nothing"])
