"""What of a recovery needs no server: settings, times, and which WAL is there."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tenancy_orm import TenancyConfig
from tenancy_orm.errors import RecoveryTargetError, SettingError
from tenancy_orm.restores.recovery.history import check_target
from tenancy_orm.restores.recovery.wal_files import list_segments, stretches

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
