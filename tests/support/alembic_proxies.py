"""Alembic without ``tenancy_orm.migrations.local``: for tests that show what plain Alembic does."""

from __future__ import annotations

from types import ModuleType

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
