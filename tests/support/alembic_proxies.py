"""Alembic without ``tenancy_orm.migrations.local``: for tests that show what plain Alembic does."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import ModuleType

import alembic.context
import alembic.op
import pytest
from alembic import command
from alembic.config import Config
from alembic.operations import Operations

from tenancy_orm.migrations import local


def uninstall() -> None:
    """Give Alembic its process-wide objects back. Does nothing if they are installed already."""
    if not local.is_installed():
        return
    for stack in local._stacks.values():
        stack.module.__class__ = ModuleType
        vars(stack.module)["_proxy"] = None
        del stack.cls._install_proxy, stack.cls._remove_proxy
    del Operations.context


def forget_active() -> None:
    """Remove what migrations that failed have left active in plain Alembic, and make it context-local again."""
    for stack in local._stacks.values():
        for name in ("_proxy", *stack.attributes):
            vars(stack.module).pop(name, None)
    local.install()


def run_plain_alembic(directory: Path) -> str:
    """What an application's own migrations do in this process: print their SQL."""
    with contextlib.suppress(FileExistsError):
        (directory / "versions").mkdir(parents=True)
        (directory / "env.py").write_text(
            "from alembic import context\n"
            "context.configure(dialect_name='sqlite')\n"
            "with context.begin_transaction():\n"
            "    context.run_migrations()\n"
        )
        (directory / "versions" / "a.py").write_text(
            "from alembic import op\nrevision = 'a'\ndown_revision = None\ndef upgrade():\n    op.execute('SELECT 1')\n"
        )
    config = Config(output_buffer=io.StringIO())
    config.set_main_option("script_location", str(directory))
    config.set_main_option("path_separator", "os")
    command.upgrade(config, "head", sql=True)
    assert isinstance(config.output_buffer, io.StringIO)
    return config.output_buffer.getvalue()


def assert_nothing_is_active() -> None:
    """Check that no migration is active in this process."""
    for module, call in ((alembic.op, "execute"), (alembic.context, "get_context")):
        assert getattr(module, "_proxy", None) is None
        # plain Alembic has a proxy that is None once there was one
        with pytest.raises((NameError, AttributeError), match=r"can't invoke function|NoneType"):
            getattr(module, call)(*(["SELECT 1"] if call == "execute" else []))
    assert not hasattr(alembic.context, "config")
