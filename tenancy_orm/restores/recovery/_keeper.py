"""Runs the programs of one recovery, and ends and deletes everything once its owner is gone, in whatever way.

It is run by path as a program, so it imports only the standard library. Its owner sends requests as lines of JSON on
the standard input, and gets one line for each. At the end of that input, which also comes when the owner is killed,
the server is stopped, other programs are killed, and the directories are deleted.

    {"do": "run", "arguments": [...], "input": "...", "environment": {...}}
    {"do": "start", "arguments": [...], "environment": {...}, "log": "..."}
    {"do": "stop"}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SECONDS = 60
_KEPT = 65_536


class Keeper:
    """The programs of one recovery."""

    def __init__(self, uid: int, gid: int) -> None:
        self._account: dict[str, Any] = {"user": uid, "group": gid, "extra_groups": []} if uid else {}
        self._mutex = threading.Lock()
        self._ended = False
        # the following are protected by the mutex
        self._program: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        what = request["do"]
        if what == "run":
            return self._run(request)
        if what == "start":
            with self._mutex, Path(request["log"]).open("ab") as log:
                if not self._ended:
                    self._server = self._spawn(request, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            return {}
        if what == "stop":
            self._stop(signal.SIGINT)
            return {}
        server = self._server
        return {"status": None if server is None else server.poll()}

    def _spawn(self, request: dict[str, Any], **streams: Any) -> subprocess.Popen[bytes]:
        account = self._account if request.get("as_account", True) else {}
        return subprocess.Popen(  # noqa: S603 - no shell, what the owner asks for
            request["arguments"], env=request["environment"], cwd="/", start_new_session=True, **account, **streams
        )

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        pipe = subprocess.PIPE
        with self._mutex:
            if self._ended:
                return {"status": -1, "output": "", "errors": ""}
            program = self._program = self._spawn(request, stdin=pipe, stdout=pipe, stderr=pipe)
        output, errors = program.communicate(request.get("input", "").encode())
        with self._mutex:
            self._program = None
        return {
            "status": program.returncode,
            "output": output[-_KEPT:].decode(errors="replace"),
            "errors": errors[-_KEPT:].decode(errors="replace"),
        }

    def _stop(self, number: int) -> None:
        server = self._server
        if server is None:
            return
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(number)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # its processes notice that it is gone, and end
            _kill_group(server)
            server.wait()
        self._server = None

    def end(self) -> None:
        """End all programs; none starts after this."""
        with self._mutex:
            self._ended = True
            program = self._program
        if program is not None:
            _kill_group(program)
        self._stop(signal.SIGQUIT)


def _kill_group(program: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)


def _ignore(_: int, __: FrameType | None) -> None:
    return None


def _read(keeper: Keeper, requests: list[bytes], ready: threading.Condition) -> None:
    """Collect requests; at the end of the input, end what a request still waits for."""
    for line in sys.stdin.buffer:
        with ready:
            requests.append(line)
            ready.notify()
    keeper.end()
    with ready:
        requests.append(b"")
        ready.notify()


def main(arguments: list[str]) -> None:
    """Serve one owner: ``lock uid gid directory...``; the lock is held until the directories are deleted."""
    lock, uid, gid, *directories = arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The owner's end is what ends this. Programs inherit what is ignored, but no handler, and Barman waits for ever
        # for its own processes where these ignore SIGTERM.
        signal.signal(number, _ignore)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    keeper, ready = Keeper(int(uid), int(gid)), threading.Condition()
    requests: list[bytes] = []
    threading.Thread(target=_read, args=(keeper, requests, ready), daemon=True).start()
    while True:
        with ready:
            ready.wait_for(lambda: requests)
            line = requests.pop(0)
        if not line:
            break
        try:
            answered = keeper.answer(json.loads(line))
        except OSError as exc:
            answered = {"status": -1, "output": "", "errors": f"{type(exc).__name__}: {exc.strerror}"}
        with contextlib.suppress(OSError):
            sys.stdout.write(json.dumps(answered) + "\n")
            sys.stdout.flush()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
