"""Running squawk, a linter for PostgreSQL's SQL, on texts; it is the package ``squawk-cli`` of the extra ``lint``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError, MissingExtraError

CONFIG = ".squawk.toml"

_SECONDS = 300.0
_FAILED = 1  # its status where it has found something


@dataclass(frozen=True, slots=True, kw_only=True)
class SquawkFinding:
    """One finding. ``line`` and ``column`` count from 0 in the text ``name``; ``level`` is "Warning" or "Error"."""

    name: str
    line: int
    column: int
    level: str
    rule: str
    message: str
    help: str | None


def find_config(directory: Path) -> Path | None:
    """Return squawk's configuration in ``directory`` or above it; None if there is none."""
    places = (directory, *directory.parents)
    return next((found for place in places if (found := place / CONFIG).is_file()), None)


def check(
    texts: Mapping[str, str],
    *,
    config: Path | None = None,
    exclude: Sequence[str] = (),
    pg_version: str | None = None,
) -> list[SquawkFinding]:
    """Check texts, by name, and return the findings.

    Args:
        texts: The texts.
        config: Its configuration.
        exclude: Rules that are not checked.
        pg_version: The version of PostgreSQL; that of the configuration where None.

    Raises:
        MissingExtraError: it is not installed.
        ConfigurationError: it refuses the configuration, or fails.
    """
    program = _find()
    if not texts:
        return []
    arguments = [program, "--reporter", "json"]
    if config is not None:
        arguments += ["--config", str(config)]
    if exclude:
        arguments.append(f"--exclude={','.join(exclude)}")
    if pg_version is not None:
        arguments.append(f"--pg-version={pg_version}")
    with tempfile.TemporaryDirectory(prefix="tenancy-lint-") as directory:
        files = {f"{number}.sql": name for number, name in enumerate(texts)}
        for file, name in files.items():
            Path(directory, file).write_text(texts[name], "utf-8")
        try:
            done = subprocess.run(  # noqa: S603 - no shell, a program that the operator has installed
                [*arguments, *files], cwd=directory, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise ConfigurationError(
                f"squawk has not checked the revisions within {_SECONDS:g} s; name fewer of them"
            ) from exc
        except OSError as exc:
            raise ConfigurationError(f"squawk cannot be started: {program}: {exc.strerror}") from exc
    try:
        rows = json.loads(done.stdout) if done.returncode in (0, _FAILED) else None
    except ValueError:
        rows = None
    if rows is None:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), f"status {done.returncode}")
        raise ConfigurationError(f"squawk cannot check the revisions: {reason.strip()}")
    return [
        SquawkFinding(
            name=files[row["file"]],
            line=row["line"],
            column=row["column"],
            level=row["level"],
            rule=row["rule_name"],
            message=row["message"],
            help=row.get("help"),
        )
        for row in rows
    ]


def _find() -> str:
    """The program: beside this Python, or on PATH."""
    beside = Path(sys.executable).parent
    found = shutil.which("squawk", path=str(beside)) or shutil.which("squawk")
    if found is None:
        raise MissingExtraError("squawk-cli", "lint")
    return found
