"""``TenancyConfig``: every mistake is reported where it is made, and no secret is shown."""

from __future__ import annotations

import base64
import traceback
from pathlib import Path
from typing import Any

import pytest

from tenancy_orm import TenancyConfig, Tier, TierPolicy
from tenancy_orm.config import KeyConfig, MembersConfig, PoolConfig, SecretsConfig
from tenancy_orm.errors import ConfigurationError, SettingError
from tests.support.models import Base

URL = "postgresql://admin:hunter2@db.example/control"
KEY = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_url": ""}, "control_url: is empty"),
        ({"control_url": "mysql://a/b"}, "control_url: must begin with postgresql://"),
        ({"control_url": "postgresql://host"}, "control_url: names no database"),
        ({"control_url": "%%%"}, "control_url: is not a URL"),
        ({"control_url": 7}, "control_url: must be text"),
        ({"control": {"listen_url": "nonsense"}}, "control.listen_url: is not a URL"),
        ({"servers": {"Big": URL}}, "servers: each server's name must be"),
        ({"servers": {"big": "nonsense"}}, "servers: the URL of server 'big' is not a URL"),
        ({"servers": "nonsense"}, "servers: must be name=url"),
        ({"servers": ["a"]}, "servers: must be a table of URLs by name"),
        ({"migrations": 3}, "migrations: must be a path"),
        ({"metadata": 3}, "metadata: must be a MetaData"),
        ({"metadata": "nowhere"}, "metadata: 'nowhere' is not of the form module:attribute"),
        ({"metadata": "nowhere:Base"}, "metadata: 'nowhere:Base' cannot be loaded"),
        ({"name_prefix": "with-dash"}, "name_prefix: must be"),
        ({"keys": {"prefix": "Bad"}}, "keys.prefix: must be"),
        ({"keys": {"prefixes": ["Bad"]}}, "keys.prefixes: must be"),
        ({"members": {"roles": "owner"}}, "members.roles: must be role=scope scope"),
        ({"members": {"roles": "owner=*;owner=a"}}, "members.roles: must name each role once"),
        ({"members": {"roles": {"owner": "*"}}}, "members.roles: must be a table of lists of scopes"),
        ({"members": {"roles": {"owner": 3}}}, "members.roles: must be a table of lists of scopes"),
        ({"members": {"roles": {"the owner": ["*"]}}}, "members.roles: 'the owner' is not the name of a role"),
        ({"members": {"roles": {"owner": ["a b"]}}}, "members.roles: 'a b' of role 'owner' is not a scope"),
        ({"members": {"invitation_seconds": 0}}, "members.invitation_seconds: must be above 0"),
        ({"default_tier": "gold"}, "default_tier: 'gold' is not among tiers"),
        ({"tiers": {"a": Tier("b")}, "default_tier": "a"}, "tiers: tier 'b' is filed under the name 'a'"),
        ({"tiers": []}, "tiers: must be a table"),
        ({"tiers": {"free": {"limits": {"a": {"size": 1}}}}}, "tiers.free.limits.a.amount: is missing"),
        ({"tiers": {"free": {"limits": {"a": -1}}}}, "tiers: a limit's amount"),
        ({"metering": {"tier_policies": [{"fraction": 1}]}}, "metering.tier_policies.0.resource: is missing"),
        (
            {"metering": {"tier_policies": [TierPolicy(resource="users")] * 2}},
            "metering.tier_policies: two tier policies",
        ),
        (
            {"metering": {"tier_policies": [TierPolicy(resource="users", next_tier={"free": "gold"})]}},
            "metering.tier_policies: unknown tiers: gold",
        ),
        ({"pool": {"max_connections": 0}}, "pool.max_connections: must be at least 1"),
        ({"pool": {"max_connections": "many"}}, "pool.max_connections: must be a whole number"),
        ({"pool": {"checkout_timeout": 0}}, "pool.checkout_timeout: must be above 0"),
        ({"pool": {"idle_timeout": "10 s"}}, "pool.idle_timeout: must be a number"),
        ({"pool": {"full_reset": "perhaps"}}, "pool.full_reset: must be true or false"),
        ({"pool": 3}, "pool: must be a table of settings"),
        ({"pool": {"max_connections": True}}, "pool.max_connections: must be a number"),
        ({"migration": {"timeout": float("inf")}}, "migration.timeout: must be a finite number"),
        ({"_env_file": ".env"}, "_env_file: there is no such setting"),
        ({"tiers": {"free": {"connection_limit": True}}}, "tiers.free.connection_limit: must be a whole number"),
        ({"tiers": {"free": {"connection_limit": "7"}}}, "tiers.free.connection_limit: must be a whole number"),
        ({"tiers": {"free": {"requests_per_second": True}}}, "tiers.free.requests_per_second: must be a number"),
        ({"metadata": ".x:y"}, "metadata: '.x:y' cannot be loaded"),
        ({"encryption_keys": {1: KEY}}, "encryption_keys: must be a table of keys by id"),
        ({"extensions": ("a; DROP",)}, "extensions: 'a; DROP' is not the name"),
        ({"extensions": 3}, "extensions: must be names"),
        ({"provisioning": {"role_settings": {"work_mem; DROP": "1"}}}, "provisioning.role_settings: 'work_mem; DROP'"),
        ({"provisioning": {"role_settings": {"a.b.c": "1"}}}, "provisioning.role_settings: 'a.b.c'"),
        (
            {"provisioning": {"role_settings": {"work_mem": ["1"]}}},
            "provisioning.role_settings: the value of 'work_mem'",
        ),
        ({"provisioning": {"role_settings": {"work_mem": "\x00"}}}, "provisioning.role_settings: the value"),
        ({"sessions": {"settings": {"statement_timeout": "1s"}}}, "sessions.settings: cannot hold 'statement_timeout'"),
        ({"sessions": {"settings": "nonsense"}}, "sessions.settings: must be name=value"),
        ({"watchdog": {"max_session_locks": -1}}, "watchdog.max_session_locks: must be at least 0"),
        ({"watchdog": {"max_notify_queue": -0.5}}, "watchdog.max_notify_queue: must be at least 0"),
        ({"secrets": {"options": ["control_url"]}}, "secrets.options: may hold"),
        ({"encryption_keys": {"1": "???"}}, "encryption_keys: encryption key '1' is not base64"),
        ({"encryption_keys": {"1": b"short"}}, "encryption_keys: encryption key '1' must be 32 bytes"),
        ({"encryption_keys": {"a b": KEY}}, "encryption_keys: the id of each encryption key"),
        ({"encryption_keys": "nonsense"}, "encryption_keys: must be id:base64"),
        ({"keys": {"peppers": {"1": b"short"}}}, "keys.peppers: key pepper '1' must be 32 bytes or more"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], message: str) -> None:
    """The message begins with the setting, in words that are not pydantic's."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig(**{"control_url": URL, **changes})
    assert message in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    """Whoever mends one should not find the next by running again."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig(control_url="", pool={"max_engines": 0, "idle_timeout": "x"})  # type: ignore[arg-type]
    assert set(caught.value.problems) == {"control_url", "pool.max_engines", "pool.idle_timeout"}


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [
        ({"max_connections": 3}, "did you mean pool.max_connections?"),
        ({"pool": {"max_conections": 3}}, "did you mean pool.max_connections?"),
        ({"tires": {}}, "did you mean tiers?"),
        ({"retention_seconds": 1}, "did you mean retention.run_seconds or retention.audit_seconds?"),
    ],
)
def test_an_unknown_setting_comes_with_a_suggestion(changes: dict[str, Any], suggestion: str) -> None:
    """A setting that is ignored without a word is worse than none."""
    with pytest.raises(SettingError, match="there is no such setting") as caught:
        TenancyConfig(**{"control_url": URL, **changes})
    assert suggestion in str(caught.value)


def test_a_section_alone_is_checked() -> None:
    """Where it is made, and as this package's own error."""
    with pytest.raises(SettingError, match=r"^max_connections: must be at least 1$"):
        PoolConfig(max_connections=0)


def test_no_secret_is_shown() -> None:
    """Neither the password in a URL nor a key is in the repr."""
    config = TenancyConfig(
        control_url=URL, servers={"a": URL}, encryption_keys={"1": KEY}, keys=KeyConfig(peppers={"1": KEY})
    )
    for text in (repr(config), str(config), repr(config.keys)):
        assert "hunter2" not in text and KEY not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"control_url": "hunter2"},
        {"servers": {"a": "hunter2"}},
        {"servers": "hunter2"},
        {"servers": "postgresql://u:hunter2@host/db?sslmode=require"},
        {"servers": {"postgresql://u:hunter2@host/db": "x"}},
        {"encryption_keys": "hunter2"},
        {"encryption_keys": {"1": "hunter2"}},
        {"keys": {"peppers": {"1": ["hunter2"]}}},
        {"pool": {"max_connections": "hunter2"}},
        {"hunter": "hunter2"},
    ],
)
def test_no_value_is_in_an_error(changes: dict[str, Any]) -> None:
    """Nor in what the error was raised from."""
    with pytest.raises(SettingError) as caught:
        TenancyConfig(**{"control_url": URL, **changes})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value, chain=True))
    assert caught.value.__context__ is None


def test_text_is_read_alike_wherever_it_comes_from() -> None:
    """An argument may be written as a variable would be."""
    config = TenancyConfig(
        control_url=URL,
        servers=f"a={URL}, b={URL} c={URL}",  # type: ignore[arg-type]
        metadata="tests.support.models:Base.metadata",  # type: ignore[arg-type]
        extensions="vector, citext",  # type: ignore[arg-type]
        encryption_keys=f"1:{KEY}, 2:{KEY}",  # type: ignore[arg-type]
        sessions={"settings": "search_path = a, b; timezone=UTC"},  # type: ignore[arg-type]
        provisioning={"role_settings": {"work_mem": 4096, "jit": False}},  # type: ignore[arg-type]
    )
    assert list(config.server_dsns) == ["a", "b", "c"]
    assert config.metadata is Base.metadata
    assert config.extensions == ("vector", "citext")
    assert list(config.sealing_keys) == ["1", "2"]
    assert config.sessions.settings == {"search_path": "a, b", "timezone": "UTC"}
    assert config.provisioning.role_settings == {"work_mem": "4096", "jit": "off"}


def test_roles_give_scopes() -> None:
    """Roles are written alike as text and as a table; one that is not configured any more gives nothing."""
    default = MembersConfig()
    assert default.scopes_of(["owner"]) == default.scopes_of(["member", "admin"]) == {"*"}
    assert default.scopes_of([]) == default.scopes_of(["member", "former"]) == frozenset()
    written = MembersConfig(roles="editor=docs:read docs:write; viewer = docs:read;guest=")  # type: ignore[arg-type]
    assert written == MembersConfig(
        roles={"editor": ("docs:read", "docs:write"), "viewer": ("docs:read",), "guest": ()}
    )
    assert written.scopes_of(("viewer", "guest")) == {"docs:read"}
    assert written.scopes_of(["owner"]) == frozenset()


def test_a_comma_in_a_url_does_not_end_it() -> None:
    """Several hosts of one server are separated by commas too."""
    several = "postgresql://admin:pw,x=y@/postgres?host=one:5432,two:5433"
    config = TenancyConfig(control_url=URL, servers=f"a={several},b={URL}")  # type: ignore[arg-type]
    assert config.servers == {"a": several, "b": URL}


def test_a_copy_changes_single_settings_of_a_section() -> None:
    """A mapping; a section replaces the whole."""
    config = TenancyConfig(control_url=URL, pool=PoolConfig(max_connections=7, max_engines=8))
    assert config.replace(pool={"max_engines": 9}).pool == PoolConfig(max_connections=7, max_engines=9)
    assert config.replace(pool=PoolConfig(max_engines=9)).pool == PoolConfig(max_engines=9)
    assert config.pool.max_engines == 8
    with pytest.raises(SettingError, match=r"^pool\.max_engines: must be at least 1$"):
        config.replace(pool={"max_engines": 0})
    with pytest.raises(SettingError, match=r"^pool\.max_engins: there is no such setting"):
        config.replace(pool={"max_engins": 1})


@pytest.mark.parametrize("name", ["control_url", "nonsense"])
def test_a_configuration_does_not_change(name: str) -> None:
    """Neither it nor a section of it; the value is not repeated."""
    config = TenancyConfig(control_url=URL)
    for model in (config, config.keys):
        with pytest.raises(AttributeError, match=f"is frozen; use replace.{name}=") as caught:
            setattr(model, name, "hunter2")
        assert "hunter2" not in str(caught.value)
        with pytest.raises(AttributeError, match="is frozen"):
            delattr(model, name)


def test_what_is_in_a_configuration_does_not_change() -> None:
    """Nor by way of what it was made of."""
    servers = {"a": URL}
    config = TenancyConfig(control_url=URL, servers=servers)
    servers["b"] = "nonsense"
    assert config.servers == {"a": URL}
    with pytest.raises(TypeError):
        config.sessions.settings["client_encoding"] = "x"  # type: ignore[index]


def test_the_constructor_reads_its_arguments_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test or a second installation is given does not depend on where it runs."""
    monkeypatch.setenv("TENANCY_POOL_MAX_CONNECTIONS", "3")
    (directory / ".env").write_text("TENANCY_POOL_MAX_ENGINES=3\n")
    (directory / "tenancy.toml").write_text("default_tier = 'pro'\n")
    config = TenancyConfig(control_url=URL)
    assert (config.pool, config.default_tier) == (PoolConfig(), "free")


def test_a_certificate_promises_no_time_that_base_backups_outlive() -> None:
    """One is kept until a later one is as old as ``keep_seconds``; the control database may be on the same server."""
    recovery = {"provider": "directory:/var/backups/recovery", "keep_seconds": 700.0, "base_seconds": 100.0}
    short = {"server_backup_seconds": 799.0, "control_server_backup_seconds": 799.0}
    enough = dict.fromkeys(short, 800.0)
    config = TenancyConfig(control_url=URL).replace(recovery=recovery, erasure=enough)
    with pytest.raises(SettingError) as caught:
        config.replace(erasure=short)
    assert list(caught.value.problems) == [f"erasure.{name}" for name in short]
    assert "must be at least 800" in str(caught.value)
    with pytest.raises(SettingError) as caught:
        config.replace(servers={"eu": URL}, erasure=short)
    assert list(caught.value.problems) == ["erasure.server_backup_seconds"]
    # others keep their own
    assert config.replace(recovery={"provider": "barman"}, erasure=short).erasure.server_backup_seconds == 799.0


def test_a_pepper_may_come_later() -> None:
    """Which one is current is checked once they are known."""
    config = TenancyConfig(
        control_url=URL, keys=KeyConfig(pepper_current="2"), secrets=SecretsConfig(options=("key_peppers",))
    )
    with pytest.raises(SettingError, match=r"keys\.pepper_current: '2' is not among keys\.peppers"):
        config.replace(keys={"peppers": {"1": KEY}})


def test_an_error_of_a_setting_is_one_of_the_configuration() -> None:
    """Callers that catch the general one go on."""
    with pytest.raises(ConfigurationError):
        TenancyConfig(control_url="")


def test_what_an_application_raises_when_it_is_imported_is_the_cause() -> None:
    """Its traceback is what helps."""
    with pytest.raises(SettingError, match="cannot be loaded: ValueError") as caught:
        TenancyConfig(control_url=URL, metadata="tests.unit.config.broken:Base")  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_dump_has_no_secret() -> None:
    """Whoever prints one did not ask for credentials."""
    config = TenancyConfig(
        control_url=URL, servers={"a": URL}, encryption_keys={"1": KEY}, keys=KeyConfig(peppers={"1": KEY})
    )
    assert "hunter2" not in str(config.model_dump()) and KEY not in str(config.model_dump())
