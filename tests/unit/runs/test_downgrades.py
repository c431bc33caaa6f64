"""Revisions that cannot be taken back are known before anything is changed."""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from tenancy_orm.runs.downgrades import missing_downgrade
from tests.support.projects import Project

NOTHING = "its downgrade() does nothing"
ERROR = "its downgrade() only raises an error"

DATA = """
from tenancy_orm.migrations import data_migration
def upgrade(): pass
def downgrade(): pass
@data_migration(table="a")
def fill(batch): return "SELECT 1"
"""

HEAD = """
import functools, logging
from alembic import op

revision, down_revision = "1", None

class Base:
    def downgrade(self):
        "Say why."
    def useful(self):
        op.drop_table("a")
    @staticmethod
    def fixed():
        raise NotImplementedError

def wrapped(function):
    @functools.wraps(function)
    def inner():
        return function()
    return inner

def nothing(*a): ...
def useful(): op.drop_table("a")
def itself(): itself()
def upgrade(): op.create_table("a")
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", "it has no downgrade()"),
        ("def downgrade(): pass", NOTHING),
        ("def downgrade():\n    'Nothing.'", NOTHING),
        ("def downgrade(): ...", NOTHING),
        ("def downgrade():\n    return None\n    op.drop_table('a')", NOTHING),
        ("def downgrade():\n    import sys\n    print('no way back')\n    logging.warning('none')\n    pass", NOTHING),
        ("def downgrade(): raise NotImplementedError", ERROR),
        ("def downgrade():\n    print('no')\n    raise NotImplementedError('there is no way back')", ERROR),
        ("def downgrade(): raise RuntimeError('never')", ERROR),
        ("def downgrade():\n    assert False, 'never'", ERROR),
        ("def downgrade(): nothing()", NOTHING),
        ("def downgrade(): return nothing()", NOTHING),
        ("def downgrade(): Base.fixed()", ERROR),
        ("downgrade = nothing", NOTHING),
        ("downgrade = functools.partial(nothing, 1)", NOTHING),
        ("downgrade = Base().downgrade", NOTHING),
        ("downgrade = Base.fixed", ERROR),
        ("@wrapped\ndef downgrade():\n    pass", NOTHING),
        ("downgrade = lambda: None", NOTHING),
        ("exec('def downgrade(): raise NotImplementedError')", ERROR),
        ("def downgrade(): op.drop_table('a')", None),
        ("def downgrade():\n    nothing()\n    useful()", None),
        ("def downgrade():\n    if op.get_bind(): pass\n    else: raise NotImplementedError", None),
        ("downgrade = Base().useful", None),
        ("@wrapped\ndef downgrade():\n    useful()", None),
        ("downgrade = lambda: op.drop_table('a')", None),
        ("def downgrade(): itself()", None),
        # a merge has nothing to take back
        ("def upgrade(): pass\ndef downgrade(): pass", None),
        # what a data migration did stays
        (DATA, "its data migration fill has no reverse"),
        (f"{DATA}fill.reverse(nothing)", None),
        (f"{DATA}fill.reverse(nothing)\ndef upgrade(): useful()", NOTHING),
        (f"{DATA}def downgrade(): useful()", None),
        ("def upgrade(): 'Merge.'\ndef downgrade(): raise NotImplementedError", ERROR),
    ],
)
def test_a_downgrade_that_does_nothing_counts_as_none(tmp_path: Path, code: str, expected: str | None) -> None:
    """Whether it is empty itself, or inherits, wraps or calls what is empty."""
    project = Project.create(tmp_path)
    (project.migrations / "versions" / "1.py").write_text(HEAD + code)
    (script,) = ScriptDirectory(str(project.migrations)).walk_revisions()
    assert missing_downgrade(script) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def downgrade(): pass", NOTHING),
        ("def downgrade(): raise NotImplementedError('no way back')", ERROR),
        ("def downgrade(): op.drop_table('a')", None),
    ],
)
def test_a_compiled_revision_is_judged_by_its_bytecode(tmp_path: Path, code: str, expected: str | None) -> None:
    """Where only ``.pyc`` files are deployed."""
    project = Project.create(tmp_path)
    path = project.migrations / "versions" / "1.py"
    path.write_text(HEAD + code)
    compileall.compile_file(path, quiet=1, legacy=True)
    path.unlink()
    config = Config()
    config.set_main_option("script_location", str(project.migrations))
    config.set_main_option("sourceless", "true")
    (script,) = ScriptDirectory.from_config(config).walk_revisions()
    assert missing_downgrade(script) == expected
