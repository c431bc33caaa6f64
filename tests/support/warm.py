"""Programs of this project without the half second in which each imports the package: forked from one that has.

A forked program is a process of its own, with arguments, directory, environment, streams and exit status as it would
have them otherwise. What it was not, is started: tests of that use ``asyncio.create_subprocess_exec``.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.shell import ROOT, environment, python_path

# What programs import and what depends on neither their directory nor their environment; tenancy_orm.cli does.
_IMPORTED = ("tenancy_orm", "alembic.command", "rich.console", "rich.table", "typer")


@dataclass(frozen=True)
class Finished:
    """What a program left behind."""

    status: int
    out: str
    err: str


async def run_module(
    module: str, *arguments: str, cwd: Path, env: Mapping[str, str], stdin: str = "", timeout: float = 90.0
) -> Finished:
    """Run ``python -m module`` with these arguments, to its end."""
    async with asyncio.timeout(timeout):
        return await asyncio.to_thread(_forks().run, module, arguments, cwd, env, stdin)


@functools.cache
def _forks() -> _Forks:
    return _Forks()


class _Forks:
    """The process that forks. It ends with this one, which holds the other end of its standard input.

    Its orders and answers are lines, so it does one at a time.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            cwd=ROOT,
            env=environment(PYTHONPATH=python_path(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)

    def run(self, module: str, arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str], stdin: str) -> Finished:
        """Run a module to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="tenancy-warm-") as name:
            streams = [Path(name, stream) for stream in ("stdin", "stdout", "stderr")]
            streams[0].write_text(stdin, encoding="utf-8")
            order = {
                "module": module,
                "arguments": arguments,
                "cwd": str(cwd),
                "env": dict(env),
                "streams": list(map(str, streams)),
            }
            with self._mutex:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
                status = int(self._process.stdout.readline())
            return Finished(status, *(stream.read_text(encoding="utf-8") for stream in streams[1:]))


def main() -> None:
    """Fork a program for every order on standard input, and print its exit status."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    # not the iterator of a file, whose buffer a fork would share
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(module: str, arguments: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Be ``python -m module``, to the end of this process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = [module, *arguments]
    sys.path[:] = [
        cwd,
        *env.get("PYTHONPATH", "").split(os.pathsep),
        *(p for p in sys.path if p not in {"", str(ROOT)}),
    ]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
