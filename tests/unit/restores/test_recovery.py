"""What of a recovery needs no server: settings, times, and which WAL is there."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import RecoveryError, RecoveryTargetError, SettingError
from tenancy_orm.restores.recovery import BarmanRecovery, barman
from tenancy_orm.restores.recovery.base_backups import BackupDirectory, BaseBackups
from tenancy_orm.restores.recovery.history import check_target
from tenancy_orm.restores.recovery.providers import ScratchOptions
from tenancy_orm.restores.recovery.wal_files import copy_partial, list_segments, stretches
from tenancy_orm.servers import Server

SEGMENT = 16 * 1024**2


class Provider:
    """An application's own."""

    def window(self, server: str) -> None: ...

    def check(self, request: object) -> None: ...

    def recover(self, request: object) -> None: ...


OWN = Provider()


def config(**recovery: object) -> TenancyConfig:
    return TenancyConfig(control_url="postgresql://db.example/control").replace(recovery=recovery)


def test_a_provider_is_a_directory_barman_or_an_object() -> None:
    assert config(provider="directory:/var/backups").recovery.base_directory == "/var/backups"
    assert config(provider="barman").recovery.barman_name == "{server}"
    assert config(provider="barman:main-{server}").recovery.barman_name == "main-{server}"
    assert config(provider=OWN).recovery.provider is OWN
    assert config(provider=f"{__name__}:OWN").recovery.provider is OWN
    for refused, reason in (
        ("directory:relative", "absolute directory"),
        ("barman:", "module:attribute|cannot be imported|no module"),
        (object(), "an object with recover, check and window"),
    ):
        with pytest.raises(SettingError, match=f"(?i){reason}"):
            config(provider=refused)


def test_settings_of_a_recovered_server_open_it_to_nobody() -> None:
    """Those that keep it to itself cannot be changed, however they are written."""
    assert config(settings="shared_buffers=1GB").recovery.settings == {"shared_buffers": "1GB"}
    for name in ("listen_addresses", "Hba_File", "archive_command", "recovery_target_time", "ssl", "include"):
        with pytest.raises(SettingError, match="is not a setting that a recovered server can have"):
            config(settings={name: "x"})
    for refused in ({"shared_buffers": "1\nlisten_addresses = '*'"}, {"a b": "1"}):
        with pytest.raises(SettingError):
            config(settings=refused)


def test_a_time_has_its_offset_and_is_not_in_the_future() -> None:
    expected = datetime(2026, 1, 28, 14, 3, tzinfo=UTC)
    for text in ("2026-01-28 14:03+00", "2026-01-28T14:03Z", "2026-01-28 15:03:00+01:00", " 2026-01-28T14:03:00+0000 "):
        assert check_target(text) == expected
    for text, reason in {
        "2026-01-28 14:03": "does not say in which time zone",
        "2026-01-28": "does not say in which time zone",
        "2026-01-28 14:03 Europe/Berlin": "is not a time",
        "9999-01-01 00:00+00": "is in the future",
    }.items():
        with pytest.raises(RecoveryTargetError, match=reason):
            check_target(text)
    with pytest.raises(RecoveryTargetError, match="does not say in which time zone"):
        check_target(datetime(2026, 1, 28))  # noqa: DTZ001 - that is what is refused


def base_backup(directory: BackupDirectory, name: str, ended_at: datetime) -> Path:
    """A base backup without files."""
    path = directory.bases / name
    path.mkdir(parents=True)
    values = {
        "server": "eu",
        "id": name,
        "version": 18,
        "started_at": ended_at.isoformat(),
        "ended_at": ended_at.isoformat(),
        "first_segment": "000000010000000000000001",
        "segment_bytes": SEGMENT,
        "size_bytes": 0,
    }
    (path / "backup.json").write_text(json.dumps(values), "utf-8")
    return path


def test_a_base_backup_that_is_made_or_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a process leaves that is killed in the midst of it is deleted by the next one."""
    directory = BackupDirectory(tmp_path, "eu")
    directory.prepare()
    bases = BaseBackups(cast("Server", None), directory, client_programs=None)
    base_backup(directory, "20261101T000000Z.partial", datetime(2026, 11, 1, tzinfo=UTC))
    old = base_backup(directory, "20261102T000000Z", datetime(2026, 11, 2, tzinfo=UTC))
    new = base_backup(directory, "20261103T000000Z", datetime(2026, 11, 3, tzinfo=UTC))
    (old / "data").mkdir()
    assert [found.id for found in directory.base_backups()] == [old.name, new.name]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        bases._prune(timedelta(seconds=1))
    assert [found.id for found in directory.base_backups()] == [new.name]
    bases._clear()
    assert list(directory.bases.iterdir()) == [new]


async def test_barman_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command of it may have its lock; and nothing of it is left."""
    program, started = tmp_path / "barman", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 600\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(barman, "_ANSWER_SECONDS", 2.0)
    options = ScratchOptions(directory=tmp_path, account="postgres", max_bytes=1)
    with pytest.raises(RecoveryError, match="barman -f json list-backup eu did not end within 2 s"):
        await BarmanRecovery(options, command=str(program)).window("eu")
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text("utf-8")), 0)


def test_wal_is_divided_where_a_segment_is_missing_and_not_where_a_timeline_begins(tmp_path: Path) -> None:
    """A segment that is whole wins over one that is partial; other files are none."""
    names = {
        "000001": ("0000000100000000000000FE", "0000000100000000000000FF", "000000010000000100000000.partial"),
        "000002": ("000000010000000100000000", "000000020000000100000000", "000000020000000100000001"),
        "000003": ("000000020000000100000004.partial", "00000002.history", "archive_status"),
    }
    for directory, files in names.items():
        (tmp_path / directory).mkdir()
        for name in files:
            (tmp_path / directory / name).touch()
    found = stretches(list_segments([tmp_path / name for name in names], SEGMENT))
    assert [[segment.number for segment in part] for part in found] == [[254, 255, 256, 256, 257], [260]]
    assert not any(segment.is_partial for segment in found[0])
    assert found[1][0].is_partial and found[1][0].name == "000000020000000100000004"


def test_a_segment_that_was_listed_as_partial_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """The receiver gives it its own name at any moment."""
    name = "000000010000000000000001"
    (tmp_path / f"{name}.partial").write_bytes(b"all of it")
    (listed,) = list_segments([tmp_path], SEGMENT)
    for _ in range(2):
        copy_partial(listed, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"all of it"
        if listed.path.exists():
            listed.path.rename(tmp_path / name)
