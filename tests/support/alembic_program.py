"""The ``alembic`` program, run in a project as a user runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support import shell
from tests.support.projects import Project
from tests.support.warm import Program, run_module, start_module


@dataclass
class Alembic:
    """Runs ``alembic`` in the project."""

    project: Project
    variables: Mapping[str, str]

    async def __call__(self, *arguments: str, ok: bool = True) -> str:
        """Return its output (stdout, then stderr); ``ok`` is whether it should succeed."""
        done = await run_module("alembic", *arguments, cwd=self.project.root, env=self.environment)
        printed = done.out + done.err
        assert (done.status == 0) == ok, printed
        return printed

    @property
    def environment(self) -> dict[str, str]:
        return shell.environment(PYTHONPATH=shell.python_path(shell.ROOT), **self.variables)

    async def start(self, *arguments: str) -> Program:
        return await start_module(
            "alembic", *arguments, cwd=self.project.root, env=self.environment, stderr=subprocess.PIPE
        )
