"""Configuration: every mistake is reported where it is made, and no secret is shown."""

from __future__ import annotations

import base64
from datetime import timedelta
from pathlib import Path

import pytest

from tenancy_orm import Limit, TenancyConfig, Tier
from tenancy_orm.errors import ConfigurationError

URL = "postgresql://admin:hunter2@db.example/control"
KEY = base64.b64encode(bytes(32)).decode()


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tenancy.toml of the checkout is read."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_url": ""}, "control_url is empty"),
        ({"control_url": "mysql://a/b"}, "must begin with postgresql://"),
        ({"control_url": "postgresql://host"}, "names no database"),
        ({"control_url": "%%%"}, "is not a URL"),
        ({"servers": {"Big": URL}}, "server name"),
        ({"servers": {"big": "nonsense"}}, "is not a URL"),
        ({"name_prefix": "with-dash"}, "name_prefix"),
        ({"key_prefix": "Bad"}, "key_prefix"),
        ({"default_tier": "gold"}, "not among tiers"),
        ({"tiers": {"a": Tier("b")}, "default_tier": "a"}, "filed under"),
        ({"max_connections": 0}, "max_connections must be at least 1"),
        ({"checkout_timeout": 0}, "checkout_timeout must be above 0"),
        ({"extensions": ("a; DROP",)}, "is not a name"),
        ({"role_settings": {"work_mem; DROP": "1"}}, "role_settings"),
        ({"role_settings": {"a.b.c": "1"}}, "role_settings"),
        ({"role_settings": {"work_mem": 4096}}, "role_settings"),
        ({"role_settings": {"work_mem": "\x00"}}, "role_settings"),
        ({"max_session_locks": -1}, "max_session_locks must be at least 0"),
        ({"max_notify_queue": -0.5}, "max_notify_queue must be at least 0"),
        ({"encryption_keys": {"1": "???"}}, "is not base64"),
        ({"encryption_keys": {"1": b"short"}}, "must be 32 bytes"),
        ({"encryption_keys": {"a b": KEY}}, "encryption key's id"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, object], message: str) -> None:
    """The message names the setting."""
    with pytest.raises(ConfigurationError, match=message):
        TenancyConfig(**{"control_url": URL, **changes})  # type: ignore[arg-type]


def test_no_secret_is_shown() -> None:
    """Neither the password in a URL nor a key is in the repr."""
    config = TenancyConfig(control_url=URL, servers={"a": URL}, encryption_keys={"1": KEY})
    assert "hunter2" not in repr(config)
    assert KEY not in repr(config)


def test_variables_are_read() -> None:
    """Each field has a variable; kinds are converted."""
    config = TenancyConfig.from_env(
        {
            "TENANCY_CONTROL_URL": URL,
            "TENANCY_SERVERS": f"a={URL} b={URL}",
            "TENANCY_ENCRYPTION_KEYS": f"1:{KEY},2:{KEY}",
            "TENANCY_EXTENSIONS": "vector, citext",
            "TENANCY_MAX_CONNECTIONS": "7",
            "TENANCY_CHECKOUT_TIMEOUT": "1.5",
            "TENANCY_FULL_RESET": "true",
            "TENANCY_ROLE_SETTINGS": "work_mem = 8MB; search_path=a, b;temp_file_limit=",
            "TENANCY_METADATA": "tests.support.models:Base.metadata",
            "HOME": "/",
        }
    )
    assert set(config.server_urls) == {"a", "b"}
    assert list(config.sealing_keys) == ["1", "2"]
    assert (config.extensions, config.max_connections) == (("vector", "citext"), 7)
    assert (config.checkout_timeout, config.full_reset) == (1.5, True)
    assert config.role_settings == {"work_mem": "8MB", "search_path": "a, b", "temp_file_limit": ""}
    assert config.metadata is not None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TENANCY_MAX_CONNECTIONS", "many"),
        ("TENANCY_FULL_RESET", "perhaps"),
        ("TENANCY_METADATA", "nowhere"),
        ("TENANCY_METADATA", "nowhere:Base"),
        ("TENANCY_SERVERS", "secret-without-name"),
        ("TENANCY_ROLE_SETTINGS", "secret-without-name"),
        ("TENANCY_MAX_CONECTIONS", "7"),
    ],
)
def test_a_malformed_variable_is_refused_without_its_value(variable: str, value: str) -> None:
    """A misspelt name too; a value that may be a secret is not repeated."""
    with pytest.raises(ConfigurationError) as caught:
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL, variable: value})
    assert "secret-without-name" not in str(caught.value)


def test_a_settings_file_is_read_and_variables_win(tmp_path: Path) -> None:
    """Limits and tiers come from TOML tables."""
    (tmp_path / "tenancy.toml").write_text(
        f'control_url = "{URL}"\nmax_connections = 3\ndefault_tier = "small"\n'
        '[tiers.small]\nconnection_limit = 2\nlimits = {users = 1, calls = {amount = 5, period = "day"}}\n'
        '[role_settings]\nwork_mem = 4096\ntemp_file_limit = ""\n'
    )
    config = TenancyConfig.from_env({"TENANCY_MAX_CONNECTIONS": "9"})
    assert config.max_connections == 9
    assert config.tiers["small"].limits == {"users": Limit(1), "calls": Limit(5, "day")}
    assert config.role_settings == {"work_mem": "4096", "temp_file_limit": ""}


def test_a_settings_file_can_say_unlimited(tmp_path: Path) -> None:
    """TOML has no null; the resource is still counted."""
    (tmp_path / "tenancy.toml").write_text(
        f'control_url = "{URL}"\ndefault_tier = "big"\n[tiers.big.limits]\nusers = "unlimited"\n'
        'calls = {amount = "unlimited", period = "day", soft = [0.5]}\n'
    )
    limits = TenancyConfig.from_env({}).tiers["big"].limits
    assert limits == {"users": Limit(None), "calls": Limit(None, "day", (0.5,))}


def test_the_migrations_of_a_settings_file_are_beside_it(tmp_path: Path) -> None:
    """Wherever the program runs: a timer's working directory is not the project's."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "tenancy.toml").write_text(f'control_url = "{URL}"\nmigrations = "migrations"\n')
    config = TenancyConfig.from_env({"TENANCY_CONFIG": str(project / "tenancy.toml")})
    assert config.migrations == str(project / "migrations")


def test_a_settings_file_holds_upgrade_policies_and_names_a_sender(tmp_path: Path) -> None:
    """So that the command line, which has nothing else, applies and sends them."""
    (tmp_path / "tenancy.toml").write_text(
        f'control_url = "{URL}"\nusage_sender = "tests.unit.test_config:URL"\n'
        '[[upgrade_policies]]\nresource = "storage_bytes"\nfraction = 0.8\nsustained_days = 1.5\napply = true\n'
    )
    config = TenancyConfig.from_env({})
    [policy] = config.upgrade_policies
    assert (policy.resource, policy.fraction, policy.apply) == ("storage_bytes", 0.8, True)
    assert policy.sustained == timedelta(days=1.5)
    assert str(config.usage_sender) == URL


@pytest.mark.parametrize(
    "text",
    [
        "[[upgrade_policies]]\nfraction = 1",
        "not toml",
        "unknown_key = 1",
        "[tiers.x]\nlimits = {a = {size = 1}}",
        "[tiers.x]\nlimits = {a = {period = 'day'}}",
    ],
)
def test_a_bad_settings_file_is_named(tmp_path: Path, text: str) -> None:
    """The message says which file and what in it."""
    (tmp_path / "tenancy.toml").write_text(text)
    with pytest.raises(ConfigurationError):
        TenancyConfig.from_env({"TENANCY_CONTROL_URL": URL})


def test_a_missing_configuration_says_what_to_do() -> None:
    """The first thing a newcomer may see."""
    with pytest.raises(ConfigurationError, match="tenancy init"):
        TenancyConfig.from_env({})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limit(-1),
        lambda: Limit(1, "year"),  # type: ignore[arg-type]
        lambda: Limit(1, soft=(2.0,)),
        lambda: Tier("No!"),
    ],
)
def test_a_limit_or_tier_that_makes_no_sense_is_refused(make: object) -> None:
    """At construction."""
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]
