"""Runs a page of documentation as its reader would: its files are written, its commands are run.

A ``python`` or ``toml`` block that begins with a comment ``# <file name>`` is written to that file. An ``sh`` block is
typed into a terminal, line by line as it stands; a block that ends with a server (``uvicorn ...``) keeps its terminal,
and what follows is typed into another. A ``text`` block is what the commands before it have printed last.

Port 8000 is the one that pages name. Here it is another, so that pages can run side by side: uvicorn takes it from its
environment variable, and curl from a configuration file. Not a character of a command is changed.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .shell import environment

DEADLINE = 120.0

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.(py|toml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path, *, heading: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or of its section under ``heading``."""
    text = page.read_text(encoding="utf-8")
    if heading is not None:
        text = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    found = [Block(match["language"], match["text"]) for match in _FENCE.finditer(text)]
    assert found, f"{page.name} has no blocks under {heading!r}"
    return found


class Terminal:
    """A shell that commands are typed into. It stops at the first that fails."""

    def __init__(self, directory: Path, variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail"],
            cwd=directory,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.said = ""

    def run(self, commands: str) -> str:
        """Type ``commands``, wait for their end, and return what they printed."""
        mark = f"--{secrets.token_hex(8)}--"
        self.type(f"{commands}\nprintf '%s\\n' {mark}\n")
        begun = len(self.said)
        while mark not in self.said:
            assert self._read(), f"failed:\n{commands}\n{self.said[begun:]}"
        return self.said[begun:].partition(mark)[0]

    def type(self, text: str) -> None:
        """Type ``text`` without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def _read(self, timeout: float = DEADLINE) -> bool:
        """Read some output. Returns whether there was any before the shell ended or ``timeout`` seconds passed."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        if not select.select([descriptor], [], [], timeout)[0]:
            return False
        chunk = os.read(descriptor, 65536)
        self.said += chunk.decode(errors="replace")
        return bool(chunk)

    def wait_for_port(self, port: int) -> None:
        """Wait until the server that was started here answers at ``port``."""
        deadline = time.monotonic() + DEADLINE
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < deadline, f"no server at port {port}:\n{self.said}"
            self._read(timeout=0.05)
            assert self.process.poll() is None, f"the server has ended:\n{self.said}"

    def close(self) -> None:
        """Press Ctrl-C, and end what is left."""
        with self.process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                if self.process.poll() is not None:
                    break
                os.killpg(self.process.pid, number)
                self._drain(until=time.monotonic() + 10)

    def _drain(self, until: float) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            self.process.stdin.close()
        while time.monotonic() < until and self._read(timeout=0.2):
            pass
        try:
            self.process.wait(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return  # the next signal is a stronger one


class Walkthrough:
    """Follows a page in ``directory``, in as many terminals as it needs."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.directory = directory
        self.port = _free_port()
        home = directory.with_name(f"{directory.name}-home")
        home.mkdir()
        # silent, as curl is in a real terminal
        (home / ".curlrc").write_text(f'connect-to = "127.0.0.1:8000:127.0.0.1:{self.port}"\nsilent\n')
        self.variables = environment(
            CURL_HOME=str(home),
            UVICORN_PORT=str(self.port),
            # what a page installs is installed here already; nothing is fetched
            PIP_NO_INDEX="1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            PIP_ROOT_USER_ACTION="ignore",
            **variables,
        )
        self.terminals = [Terminal(directory, self.variables)]
        self.printed = ""

    def follow(self, page: list[Block]) -> None:
        """Do what each block says."""
        for block in page:
            if block.language == "sh":
                self._type(block.text)
            elif block.language == "text":
                assert self.printed.rstrip().endswith(block.text.rstrip()), (
                    f"expected at the end:\n{block.text}\nin:\n{self.printed}"
                )
            elif (named := _FILE.match(block.text)) is not None:
                (self.directory / named["name"]).write_text(block.text, encoding="utf-8")

    def _type(self, commands: str) -> None:
        last = commands.rstrip().splitlines()[-1]
        if not last.startswith("uvicorn "):
            self.printed = self.terminals[-1].run(commands)
            return
        before = commands.rstrip().removesuffix(last)
        if before:
            self.terminals[-1].run(before)
        self.terminals[-1].type(f"{last}\n")
        self.terminals[-1].wait_for_port(self.port)
        self.terminals.append(Terminal(self.directory, self.variables))

    def close(self) -> None:
        """Leave all terminals."""
        for terminal in reversed(self.terminals):
            terminal.close()


@contextmanager
def walkthrough(directory: Path, **variables: str) -> Iterator[Walkthrough]:
    """Open a terminal in ``directory``, and leave nothing running at the end."""
    walk = Walkthrough(directory, **variables)
    try:
        yield walk
    finally:
        walk.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
