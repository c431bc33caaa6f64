"""Programs in a terminal: a pty of a given width, and what a user sees there."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Mapping
from pathlib import Path


async def run_in_terminal(*arguments: str, cwd: Path, env: Mapping[str, str], columns: int = 80) -> str:
    """Run ``python`` with these arguments to its end; returns what it wrote, with escape sequences."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, cwd=cwd, env=env, stdin=terminal, stdout=terminal, stderr=terminal
        )
    finally:
        os.close(terminal)
    try:
        async with asyncio.timeout(90):
            written = await asyncio.to_thread(_read_all, controller)
            await process.wait()
    finally:
        os.close(controller)
    return written.decode().replace("\r\n", "\n")


def _read_all(controller: int) -> bytes:
    found = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError as exc:
            if exc.errno != errno.EIO:  # the program has closed its end
                raise
            return found
        if not part:
            return found
        found += part
