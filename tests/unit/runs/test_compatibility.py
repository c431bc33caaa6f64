"""Which revisions are within a declaration, by the graph of the revisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.config.revisions import Declared
from tenancy_orm.errors import ConfigurationError, SettingError
from tenancy_orm.runs.compatibility import Compatibility, load_compatibility
from tests.support.projects import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A line 0001 to 0004; ``b1`` is a branch of its own where a test adds it."""
    project = Project.create(tmp_path)
    for number in range(1, 5):
        project.add(f"000{number}", down=f"000{number - 1}" if number > 1 else None)
    return project


def settings(project: Project, declared: Any) -> TenancyConfig:
    return TenancyConfig(
        control_url="postgresql://u:p@h/d", migrations=project.migrations, compatible_revisions=declared
    )


async def read(project: Project, declared: object) -> Compatibility:
    found = await load_compatibility(settings(project, declared))
    assert found is not None
    return found


async def allowed(project: Project, declared: object, *more: str) -> list[str | None]:
    found = await read(project, declared)
    return [x for x in (None, "0001", "0002", "0003", "0004", "0005", *more) if found.allows(x)]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("head", ["0004"]),
        ("heads", ["0004"]),
        ("0003,0004", ["0003", "0004"]),
        (["0004", " 0003 "], ["0003", "0004"]),
        ({"0004", "0005"}, ["0004", "0005"]),
        ("0002:head", ["0002", "0003", "0004"]),
        ("0003:0004", ["0003", "0004"]),
        ("0003:", ["0003", "0004", "0005"]),
        (":head", [None, "0001", "0002", "0003", "0004"]),
        ("base:", [None, "0001", "0002", "0003", "0004", "0005"]),
        (["0001", "0003:head"], ["0001", "0003", "0004"]),
        ("base, head", [None, "0004"]),
        ("head-1:head", ["0003", "0004"]),
        (lambda revision: revision in ("0002", "0004"), ["0002", "0004"]),
    ],
)
async def test_the_forms_of_a_declaration(project: Project, declared: Declared, expected: list[str | None]) -> None:
    assert await allowed(project, declared) == expected


async def test_a_branch_of_its_own(project: Project) -> None:
    """A database may have a head of each branch; one that lacks a branch is not at the heads."""
    project.add("b1")
    assert await allowed(project, "heads", "0004,b1", "b1") == ["0004,b1"]
    assert await allowed(project, "0003:heads", "0003,b1", "0002,b1", "b1") == ["0003", "0004", "0003,b1"]
    assert await allowed(project, "0004,b1", "0004,b1", "0003,b1") == ["0004", "0004,b1"]
    # another branch that newer code has begun
    assert (await read(project, "0003:")).allows("0004,b1,c1")
    with pytest.raises(ConfigurationError, match="heads"):
        await read(project, "0003:head")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("0002:0009", "'0009' of '0002:0009' is not a revision"),
        ("0009:", "'0009' of '0009:' is not a revision"),
        ("0004:0002", "has nothing"),
        ("0001:0003", "does not have 0004, the head"),
        ("0003", "does not have 0004"),
        (lambda revision: 1 / 0, "does not have 0004"),
    ],
)
async def test_a_wrong_declaration_is_found_when_it_is_loaded(
    project: Project, declared: Declared, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        await read(project, declared)


@pytest.mark.parametrize("declared", ["", [], " , ", ":", "a b", "0001:0002:0003", 12, ["0001", 2]])
def test_what_is_no_declaration_is_refused_as_a_setting(project: Project, declared: object) -> None:
    with pytest.raises(SettingError, match="compatible_revisions"):
        settings(project, declared)


def test_the_setting_is_read_from_variables_and_needs_migrations(project: Project) -> None:
    variables = {"TENANCY_CONTROL_URL": "postgresql://u:p@h/d", "TENANCY_COMPATIBLE_REVISIONS": "0002:head, 0005"}
    with pytest.raises(SettingError, match="needs migrations"):
        TenancyConfig.from_env(variables)
    found = TenancyConfig.from_env(variables | {"TENANCY_MIGRATIONS": str(project.migrations)})
    assert found.compatible_revisions == ("0002:head", "0005")
    assert found.model_dump()["compatible_revisions"] == ["0002:head", "0005"]
