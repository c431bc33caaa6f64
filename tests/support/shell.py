"""Running this project's programs as a user would: in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

PROGRAMS = ROOT / "tests" / "support" / "programs"
"""Last in the PYTHONPATH of every program: what is imported from here lets it end sooner."""


def python_path(*first: Path | str) -> str:
    """A PYTHONPATH of ``first`` and what this process has in its own."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(filter(None, [*map(str, first), *inherited, str(PROGRAMS)])))


def environment(**changes: str) -> dict[str, str]:
    """A user's environment: this interpreter's programs first in PATH, and no ``TENANCY_*`` or ``PG*`` variable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TENANCY_", "PYTEST_", "PG"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, **changes}


def is_group_alive(leader: int) -> bool:
    """Whether a process of the group is left, be it the leader or not, that is no zombie."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # behind the name in parentheses, which may have any character: state, parent, group
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended
        if int(group) == leader and state not in {"Z", "X"}:
            return True
    return False


def processes_in(directory: Path) -> list[str]:
    """Command lines of the processes that name ``directory``, or work in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            work = str((entry / "cwd").readlink())
        except OSError:
            continue  # it has ended, or is not ours to look at
        if str(directory) in command or work.startswith(str(directory)):
            found.append(f"{entry.name}: {command}")
    return found
