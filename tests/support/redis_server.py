"""A real Redis on a Unix socket, or a port, without anything on disk."""

from __future__ import annotations

import shutil
import socket as sockets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MISSING = "redis-server is not installed; install it, on Debian and Ubuntu with: apt-get install redis-server"


@contextmanager
def redis_server(*, on_port: bool = False) -> Iterator[str]:
    """Run one for the body; yields its URL, ``unix://...`` or ``redis://...``."""
    program = shutil.which("redis-server")
    assert program is not None, _MISSING
    # not pytest's own directory: the path of a socket has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        socket, log = Path(directory, "s"), Path(directory, "log")
        port = _free_port() if on_port else 0
        options = {"port": str(port), "bind": "127.0.0.1", "unixsocket": str(socket), "save": "", "appendonly": "no"}
        options["dir"] = directory
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with log.open("wb") as output:
            process = subprocess.Popen([program, *arguments], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 30
            while not _answers(socket):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0" if on_port else f"unix://{socket}"
        finally:
            process.kill()
            process.wait()


def _answers(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _free_port() -> int:
    with sockets.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
