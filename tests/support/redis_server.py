"""A real Redis on a Unix socket, without a port and without anything on disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MISSING = "redis-server is not installed; install it, on Debian and Ubuntu with: apt-get install redis-server"


@contextmanager
def redis_server() -> Iterator[str]:
    """Run one for the body; yields its URL, ``unix://...``."""
    program = shutil.which("redis-server")
    assert program is not None, _MISSING
    # not pytest's own directory: the path of a socket has at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        socket, log = Path(directory, "s"), Path(directory, "log")
        options = {"port": "0", "unixsocket": str(socket), "save": "", "appendonly": "no", "dir": directory}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with log.open("wb") as output:
            process = subprocess.Popen([program, *arguments], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()
