"""PostgreSQL of Debian's packages, beside the versions of the Python package."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import cast

from tenancy_orm.testing import _programs


def add_installed_versions() -> list[int]:
    """Let ``EmbeddedServer`` run the versions that Debian's packages have put on this machine as well.

    Returns:
        The major versions that it can run now.
    """
    known = cast("dict[int, _programs.Installation]", _programs.installations())
    for program in Path("/usr/lib/postgresql").glob("*/bin/postgres"):
        output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        version = output.split()[2]
        known.setdefault(int(version.split(".")[0]), _programs.Installation(version, program.parent))
    return sorted(known)
