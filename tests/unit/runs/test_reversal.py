"""The way back to the heads that a database had, whatever branches and merges are between."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.runtime.migration import StampStep

from tenancy_orm.errors import MigrationError
from tenancy_orm.migrations.configuration import alembic_config
from tenancy_orm.migrations.scripts import Environment, load
from tenancy_orm.runs.reversal import heads_of, return_to, taken_back
from tests.support.projects import Project


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """1 - 2 - a1 - a2 - m - 4 - 9, with 2 - b1 - m; a second base, x1 - x2, of which x2 depends on 2."""
    project = Project.create(tmp_path)
    project.add("1", "print(1)", "op.drop(1)")
    project.add("2", "print(1)", "op.drop(1)", down="1")
    project.add("a1", "op.a(1)", "op.drop(1)", down="2")
    project.add("a2", "op.a(1)", "pass", down="a1")
    project.add("b1", "op.a(1)", "op.drop(1)", down="2")
    project.add("m", down=("a2", "b1"))
    project.add("4", "op.a(1)", "op.drop(1)", down="m")
    project.add("x1", "op.a(1)", "op.drop(1)")
    project.add("x2", "op.a(1)", "op.drop(1)", down="x1", depends="2")
    path = project.add("9", "op.a(1)", down="4")
    path.write_text(path.read_text().partition("def downgrade")[0])
    return load(alembic_config(project.migrations))


@pytest.mark.parametrize(
    ("now", "before", "steps"),
    [
        ("4", "2", ["-4", "-m", "-a2", "-a1", "-b1"]),
        ("4", "a1,b1", ["-4", "-m", "-a2"]),
        ("a2,b1", "a2", ["-b1"]),
        ("a2,b1", "a1,b1", ["-a2"]),
        ("m,x2", "m,x1", ["-x2"]),
        ("m,x1", "a2,b1", ["-x1", "-m"]),
        ("x2", "2", ["-x2", "-x1"]),
        ("2,x1", None, ["-2", "-1", "-x1"]),
        ("2", "a2,b1", ["+a1", "+a2", "+b1"]),
        ("a1", "b1", ["-a1", "+b1"]),
        (None, "2", ["+1", "+2"]),
        ("m", "m", []),
    ],
)
def test_every_set_of_heads_can_be_returned_to(
    environment: Environment, now: str | None, before: str | None, steps: list[str]
) -> None:
    """The revisions that the one has and the other has not, children first; no others."""
    path = return_to(environment, before, stamp_irreversible=True).path_from(heads_of(now))
    found = [f"{'+' if step.is_upgrade else '-'}{step.revision.revision}" for step in path.steps]  # type: ignore[union-attr]
    assert sorted(found) == sorted(steps)
    assert path.end == heads_of(before)
    # a revision comes after those that need it
    history = [name for name in found if name.startswith("-")]
    for child, parent in (("-4", "-m"), ("-m", "-a2"), ("-a2", "-a1"), ("-2", "-1"), ("-x2", "-x1")):
        assert child not in history or parent not in history or history.index(child) < history.index(parent)


def test_a_stamp_is_taken_back_by_a_stamp(environment: Environment) -> None:
    """No revision runs."""
    for now, before in (("4", "2"), ("2", "4"), ("a2,b1", "2"), ("2", None)):
        path = return_to(environment, before, stamp=True).path_from(heads_of(now))
        assert (path.end, {type(step) for step in path.steps}) == (heads_of(before), {StampStep})


def test_what_cannot_be_taken_back_is_known_first(environment: Environment) -> None:
    """By revision; what this code does not know is refused."""
    assert taken_back(environment.script, heads_of("9"), heads_of("1")) == {
        "9": "it has no downgrade()",
        "a2": "its downgrade() does nothing",
    }
    assert taken_back(environment.script, heads_of("4"), heads_of("m")) == {}
    with pytest.raises(MigrationError, match=r"revision a2: its downgrade\(\) does nothing"):
        return_to(environment, "2").path_from(heads_of("4"))
    with pytest.raises(MigrationError, match="revision 9: it has no downgrade"):
        return_to(environment, "4").path_from(heads_of("9"))
    assert len(return_to(environment, "4", stamp_irreversible=True).path_from(heads_of("9")).steps) == 1
    with pytest.raises(MigrationError, match="Can't locate revision"):
        return_to(environment, "77")
    with pytest.raises(MigrationError, match="Can't locate revision"):
        return_to(environment, "2").path_from(heads_of("77"))
