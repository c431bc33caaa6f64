"""Which revisions are new or changed since a commit of git."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError
from ..migrations.scripts import Environment

_SECONDS = 60.0


def changed_since(environment: Environment, commit: str) -> tuple[str, ...]:
    """Return the revisions with files that are new or changed since ``commit``, committed or not; oldest first.

    Raises:
        ConfigurationError: git is missing or does not answer, this is no repository of it, or it has no such commit.
    """
    directory = Path(environment.script.dir).absolute()
    if commit.startswith("-"):
        raise ConfigurationError(f"{commit!r} is not a commit of git")
    top = Path(_git(directory, "rev-parse", "--show-toplevel").strip())
    # what is on the other branch alone is no change of this one
    base = _git(directory, "merge-base", "HEAD", commit).strip()
    names = _git(directory, "diff", "--name-only", "-z", "--diff-filter=d", base, "--").split("\0")
    names += _git(directory, "ls-files", "--others", "--exclude-standard", "-z", "--full-name", str(top)).split("\0")
    changed = {(top / name).resolve() for name in names if name}
    return tuple(reversed(list(_revisions(environment, changed))))


def _revisions(environment: Environment, changed: set[Path]) -> Iterator[str]:
    for script in environment.script.walk_revisions():
        if Path(script.path).resolve() in changed:
            yield script.revision


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - no shell
            ["git", "-C", str(directory), *arguments],  # noqa: S607 - the one on PATH
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except OSError as exc:
        raise ConfigurationError("git is not installed; name the revisions, or give --from") from exc
    except subprocess.TimeoutExpired as exc:
        raise ConfigurationError(
            f"git {arguments[0]} has not answered within {_SECONDS:g} s; name the revisions, or give --from"
        ) from exc
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
        raise ConfigurationError(f"git {arguments[0]}: {reason}")
    return done.stdout
