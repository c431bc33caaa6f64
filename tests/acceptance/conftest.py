"""What acceptance tests share: a directory as a user has one."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenancy_orm.testing.embedded import fast_directory
from tests.support.shell import processes_in

END_SECONDS = 30.0


@pytest.fixture
def user_directory() -> Iterator[Path]:
    """An empty directory, which no process uses at the end of the test."""
    parent = Path(tempfile.mkdtemp(prefix="tenancy-user-", dir=fast_directory()))
    # as /tmp is, and pytest's own directories are not: for root, PostgreSQL runs under another account
    parent.chmod(0o711)
    directory = parent / "project"
    directory.mkdir(mode=0o711)
    try:
        yield directory
        deadline = time.monotonic() + END_SECONDS
        while left := processes_in(directory):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.05)
    finally:
        shutil.rmtree(parent)
