"""Programs of this project without the half second in which each imports the package: forked from one that has.

A forked program is a process of its own, with arguments, directory, environment, streams and exit status as it would
have them otherwise. What it was not, is started: tests of that use ``asyncio.create_subprocess_exec``.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support.shell import ROOT, environment, python_path

# What most programs import: of this package everything that its command line does.
_IMPORTED = ("tenancy_orm.cli.app", "alembic.config", "rich.table", "fastapi", "httpx", "uvicorn", "pytest_asyncio")

_ORDER_BYTES = 128 * 1024


@dataclass(frozen=True)
class Finished:
    """What a program left behind."""

    status: int
    out: str
    err: str


class Program:
    """A program that runs: what ``asyncio.subprocess.Process`` is for one that was started.

    Both outputs are read as they come, where they are pipes; else they are at their end at once.
    """

    def __init__(self, pid: int, stdin: asyncio.StreamWriter, outputs: Sequence[_Output], ended: _Stream) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = outputs[0].reader
        self.stderr = outputs[-1].reader
        self.returncode: int | None = None
        self._outputs = outputs
        self._waiting = asyncio.create_task(self._wait(*ended))

    async def wait(self) -> int:
        """Wait for its end, and return the exit status."""
        return await asyncio.shield(self._waiting)

    async def communicate(self, text: str = "") -> Finished:
        """Write its standard input, and return what it left behind."""
        self.stdin.write(text.encode())
        self.stdin.close()
        read = await asyncio.gather(*(output.reader.read() for output in self._outputs))
        out, err = (stream.decode() for stream in read)
        return Finished(await self.wait(), out, err)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def _wait(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        self.returncode = int(await reader.readline())
        writer.close()
        self.stdin.close()
        await asyncio.gather(*(output.closed for output in self._outputs))
        return self.returncode


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Output(asyncio.StreamReaderProtocol):
    """One of a program's outputs."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.closed = asyncio.get_running_loop().create_future()
        super().__init__(self.reader)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.closed.set_result(None)


async def start_module(
    module: str,
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str],
    after: Sequence[str] = (),
    stdout: int = subprocess.PIPE,
    stderr: int | None = None,
    start_new_session: bool = False,
) -> Program:
    """Run ``python -m module`` with these arguments; or ``python module``, if that is the path of a file.

    Args:
        module: Its name or path.
        arguments: The program's arguments.
        cwd: Its working directory.
        env: Its environment.
        after: Modules that it imports, and that the process it is forked from may import for all.
        stdout: ``PIPE`` or ``DEVNULL``.
        stderr: The same, or None: its errors go where those of this process go.
        start_new_session: Whether it leads a process group of its own.
    """
    loop = asyncio.get_running_loop()
    order = {
        "module": module,
        "arguments": arguments,
        "cwd": str(cwd),
        "env": dict(env),
        "after": after,
        "session": start_new_session,
    }
    ours, theirs = socket.socketpair()
    given, stdin = os.pipe()
    kept, outputs = [given], []
    for target in (stdout, stderr):
        output, written = os.pipe()
        outputs.append(output)
        if target != subprocess.PIPE:
            os.close(written)
            written = os.dup(2) if target is None else os.open(os.devnull, os.O_WRONLY)
        kept.append(written)
    try:
        _forks().order(order, [theirs.fileno(), *kept])
    finally:
        theirs.close()
        for descriptor in kept:
            os.close(descriptor)
    ended = await asyncio.open_unix_connection(sock=ours)
    writing, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, _opened(stdin, "wb"))
    reading = [(await loop.connect_read_pipe(_Output, _opened(output, "rb")))[1] for output in outputs]
    pid = int(await ended[0].readline())
    return Program(pid, asyncio.StreamWriter(writing, protocol, None, loop), reading, ended)


async def run_module(
    module: str,
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str],
    stdin: str = "",
    timeout: float = 90.0,
    after: Sequence[str] = (),
) -> Finished:
    """Run ``python -m module`` with these arguments, to its end. See ``start_module``."""
    program = await start_module(module, *arguments, cwd=cwd, env=env, after=after, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(timeout):
            return await program.communicate(stdin)
    finally:
        program.kill()
        await program.wait()


def _opened(descriptor: int, mode: str) -> IO[bytes]:
    return os.fdopen(descriptor, mode, buffering=0)


@functools.cache
def _forks() -> _Forks:
    return _Forks()


class _Forks:
    """The process that forks. It ends with this one, which holds the other end of its standard input."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm"],
                cwd=ROOT,
                env=environment(PYTHONPATH=python_path(ROOT)),
                stdin=theirs.fileno(),
            )
        atexit.register(self._close)

    def order(self, order: Mapping[str, object], descriptors: list[int]) -> None:
        """Have a program forked, with these descriptors: for its pid and exit status, and its three streams."""
        socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors)

    def _close(self) -> None:
        self._orders.close()
        self._process.wait()


def main() -> None:
    """Fork a program for every order, and tell its pid and its exit status, each a line."""
    for name in _IMPORTED:
        importlib.import_module(name)
    _read_commands()
    gc.freeze()
    orders = socket.socket(fileno=0)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    woken.recv(_ORDER_BYTES)
                    _tell_ends(children)
                    continue
                message, descriptors, *_ = socket.recv_fds(orders, _ORDER_BYTES, 4)
                if not message:
                    return
                order = json.loads(message)
                for name in order.pop("after"):
                    importlib.import_module(name)
                gc.freeze()
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for end in (woken, wake):
                        end.close()
                    # not closed: that would be the program's standard input
                    orders.detach()
                    for descriptor in (*children.values(), descriptors[0]):
                        os.close(descriptor)
                    os._exit(_end_of(functools.partial(_become, **order, streams=descriptors[1:])))
                children[child] = descriptors[0]
                _tell(descriptors[0], child)
                for descriptor in descriptors[1:]:
                    os.close(descriptor)


def _read_commands() -> None:
    """Read the signatures of all commands, which Typer does each time that the command line is called."""
    import typer.main
    from typer.utils import get_params_from_function

    from tenancy_orm.cli.app import app

    typer.main.__dict__["get_params_from_function"] = functools.cache(get_params_from_function)
    typer.main.get_command(app)


def _tell_ends(children: dict[int, int]) -> None:
    """Tell the exit status of each child that has ended."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        descriptor = children.pop(child)
        _tell(descriptor, os.waitstatus_to_exitcode(status))
        os.close(descriptor)


def _tell(descriptor: int, number: int) -> None:
    """Write a number, unless nobody reads it any more."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{number}\n".encode())


def _end_of(program: Callable[[], None]) -> int:
    """Run a program, end it as Python does, and return its exit status.

    All that Python does is done, but for taking its modules apart: these are another process's memory, and each page of
    it that is written to is copied first.
    """
    status = 0
    try:
        program()
    except SystemExit as exc:
        if exc.code is not None and not isinstance(exc.code, int):
            print(exc.code, file=sys.stderr)
        status = exc.code if isinstance(exc.code, int) else exc.code is not None
    except BaseException:  # noqa: BLE001 - what nobody caught
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status & 0xFF


def _become(
    module: str, arguments: list[str], cwd: str, env: dict[str, str], session: bool, streams: Sequence[int]
) -> None:
    """Be ``python -m module``, to the end of this process."""
    from tenancy_orm.cli import output

    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for console in (output.console, output.errors):
        # it has read its width and colours from the environment when it was made
        console.__init__(stderr=console.stderr, soft_wrap=console.soft_wrap, highlight=False)  # type: ignore[misc]
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = [module, *arguments]
    is_file = module.endswith(".py")
    sys.path[:] = [
        str(Path(module).parent) if is_file else cwd,
        *env.get("PYTHONPATH", "").split(os.pathsep),
        *(p for p in sys.path if p not in {"", str(ROOT)}),
    ]
    if is_file:
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
