"""The demo, run as ``make demo`` runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shell import ROOT, environment, processes_in

DEADLINE = 120.0
DEMO = [sys.executable, "-m", "examples.agent_platform.demo"]


def run_demo(user_directory: Path, command: list[str] = DEMO) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end, without a terminal."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(TMPDIR=str(user_directory)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def assert_nothing_is_left(user_directory: Path) -> None:
    """No process works in the demo's directory, and the directory is gone."""
    assert processes_in(user_directory) == []
    assert list(user_directory.iterdir()) == []


def test_the_demo_shows_everything_twice(user_directory: Path) -> None:
    """It ends with success and leaves nothing behind, so that it can be run again."""
    for _ in range(2):
        done = run_demo(user_directory)
        assert done.returncode == 0, done.stdout + done.stderr
        for shown in (
            r"a wrong key: 401",
            r"acme's key on globex\.example\.test: 403",
            r"initech suspended: 403",
            r"3/3",
            r"initech +│ 0002 +│ yes",
            r"Everything was as expected",
        ):
            assert re.search(shown, done.stdout), f"{shown!r} is not in:\n{done.stdout}"
        assert_nothing_is_left(user_directory)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("Start an embedded PostgreSQL", signal.SIGINT),
        ("Provision three tenants", signal.SIGTERM),
        ("Fill each tenant", signal.SIGINT),
    ],
)
def test_the_demo_cleans_up_when_it_is_stopped(user_directory: Path, moment: str, number: signal.Signals) -> None:
    """Ctrl-C at any moment, pressed twice, leaves no process and no file."""
    process = subprocess.Popen(
        DEMO,
        cwd=ROOT,
        env=environment(TMPDIR=str(user_directory), PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if moment in line:
                break
        process.send_signal(number)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 130, "".join(said) + rest
    assert_nothing_is_left(user_directory)


@pytest.mark.parametrize(
    "sabotage",
    [
        # a migration that fails in every tenant
        "demo.REVISION = demo.REVISION.replace('op.create_index(', 'op.create_nothing(')",
        # the wrong key is not so wrong
        "demo.spoil = lambda key: key",
        # a tenant's rows are not what they should be
        "demo.fill = demo.show_own_rows",
    ],
)
def test_the_demo_fails_when_something_is_not_as_said(user_directory: Path, sabotage: str) -> None:
    """It is a check, not a show: what does not hold makes it fail, and it still cleans up."""
    code = f"import sys; from examples.agent_platform import demo; {sabotage}; sys.exit(demo.main())"
    done = run_demo(user_directory, [sys.executable, "-c", code])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Everything was as expected" not in done.stdout
    assert_nothing_is_left(user_directory)


def test_make_demo_runs_the_demo() -> None:
    """The README's first command is this demo."""
    makefile = (ROOT / "Makefile").read_text()
    assert "-m examples.agent_platform.demo" in makefile
