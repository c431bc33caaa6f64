"""Secrets from the environment and from files, and keys wrapped by keys."""

from __future__ import annotations

import base64
import os
import stat
import sys
from pathlib import Path

import pytest

from tenancy_orm.config import SecretsConfig, TenancyConfig
from tenancy_orm.config.values import parse_keys
from tenancy_orm.errors import ConfigurationError, MissingExtraError, SecretNotFoundError, SecretProviderError
from tenancy_orm.secrets.providers import EnvironmentSecrets, FileSecrets, SecretKeyWrapper, read_secrets

URL = "postgresql://user@host/database"
KEYS = f"1:{base64.b64encode(b'a' * 32).decode()},2:{base64.b64encode(b'b' * 32).decode()}"


# --- the environment ------------------------------------------------------------------------------------------------


async def test_a_secret_is_a_variable() -> None:
    """Named after the secret, with a prefix; an empty variable counts as missing."""
    provider = EnvironmentSecrets(environ={"SECRET_ENCRYPTION_KEYS": KEYS, "SECRET_EMPTY": ""})
    assert await provider.read("encryption_keys") == KEYS
    for name in ("empty", "other"):
        with pytest.raises(SecretNotFoundError, match="SECRET_"):
            await provider.read(name)
    assert "YWFh" not in repr(provider)


# --- files ----------------------------------------------------------------------------------------------------------


def write(directory: Path, name: str, text: str, mode: int = 0o600) -> Path:
    """Write a file with exactly this mode."""
    path = directory / name
    path.write_text(text)
    path.chmod(mode)
    return path


async def test_a_secret_is_a_file(tmp_path: Path) -> None:
    """Without the line end that editors add."""
    write(tmp_path, "encryption_keys", KEYS + "\n")
    assert await FileSecrets(tmp_path).read("encryption_keys") == KEYS
    with pytest.raises(SecretNotFoundError):
        await FileSecrets(tmp_path).read("other")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
async def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """Readable or writable, by the group or by all; the message has the remedy and not the secret."""
    write(tmp_path, "key", "s3cret-text", mode)
    with pytest.raises(SecretProviderError, match="chmod 600") as caught:
        await FileSecrets(tmp_path).read("key")
    assert "s3cret" not in str(caught.value)


async def test_a_containers_mount_can_be_allowed(tmp_path: Path) -> None:
    """Readable by all, if the application allows it; writable never."""
    write(tmp_path, "readable", "text", 0o444)
    write(tmp_path, "writable", "text", 0o446)
    provider = FileSecrets(tmp_path, allow=0o044)
    assert await provider.read("readable") == "text"
    with pytest.raises(SecretProviderError):
        await provider.read("writable")
    with pytest.raises(ConfigurationError, match="write"):
        FileSecrets(tmp_path, allow=0o066)


async def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could change it; only root's and one's own files are read."""
    write(tmp_path, "key", "s3cret-text")
    real = os.fstat

    def owned_by(user: int) -> None:
        def fstat(descriptor: int) -> os.stat_result:
            values = list(real(descriptor))
            values[stat.ST_UID] = user
            return os.stat_result(values)

        monkeypatch.setattr(os, "fstat", fstat)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    owned_by(1001)
    with pytest.raises(SecretProviderError, match="neither this user nor root") as caught:
        await FileSecrets(tmp_path).read("key")
    assert "s3cret" not in str(caught.value)
    for user in (0, 1000):
        owned_by(user)
        assert await FileSecrets(tmp_path).read("key") == "s3cret-text"


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A directory, and a pipe without a writer, which must not block."""
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("directory", "pipe"):
        with pytest.raises(SecretProviderError):
            await FileSecrets(tmp_path).read(name)


async def test_a_link_is_followed_and_its_target_checked(tmp_path: Path) -> None:
    """Kubernetes mounts secrets as links."""
    target = write(tmp_path, "target", "text")
    (tmp_path / "link").symlink_to(target)
    assert await FileSecrets(tmp_path).read("link") == "text"
    target.chmod(0o644)
    with pytest.raises(SecretProviderError):
        await FileSecrets(tmp_path).read("link")


async def test_a_large_or_binary_file_is_refused(tmp_path: Path) -> None:
    """It is something else."""
    write(tmp_path, "large", "x" * 70_000)
    write(tmp_path, "binary", "").write_bytes(b"\xff\xfe")
    for name in ("large", "binary"):
        with pytest.raises(SecretProviderError):
            await FileSecrets(tmp_path).read(name)


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "a\x00b", "x" * 129])
async def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Every provider refuses it."""
    for provider in (FileSecrets(tmp_path), EnvironmentSecrets(environ={})):
        with pytest.raises(ConfigurationError):
            await provider.read(name)


# --- what is configured from them -----------------------------------------------------------------------------------


async def test_options_are_filled_in_from_the_provider() -> None:
    """The options that are named and not set already."""
    provider = EnvironmentSecrets("S_", {"S_ENCRYPTION_KEYS": KEYS, "S_KEY_PEPPERS": KEYS})
    config = TenancyConfig(control_url=URL, secrets=SecretsConfig(provider=provider))
    read = await read_secrets(config)
    assert read.sealing_keys == {"1": b"a" * 32, "2": b"b" * 32}
    assert read.keys.decoded_peppers == {}
    both = await read_secrets(config.replace(secrets={"options": ("encryption_keys", "key_peppers")}))
    assert both.keys.decoded_peppers == {"1": b"a" * 32, "2": b"b" * 32}
    own = await read_secrets(config.replace(encryption_keys={"9": b"c" * 32}))
    assert list(own.sealing_keys) == ["9"]


async def test_a_key_wrapper_makes_the_encryption_keys_needless_unless_they_are_named() -> None:
    """By default they are not read, and may be missing; when named, they are read, and must exist."""
    provider = EnvironmentSecrets("S_", environ := {"S_WRAPPING_KEYS": KEYS})
    config = TenancyConfig(
        control_url=URL, secrets=SecretsConfig(provider=provider, key_wrapper=SecretKeyWrapper(provider))
    )
    assert (await read_secrets(config)).sealing_keys == {}
    changing = config.replace(secrets={"options": ("encryption_keys",)})
    with pytest.raises(SecretNotFoundError):
        await read_secrets(changing)
    environ["S_ENCRYPTION_KEYS"] = KEYS
    assert list((await read_secrets(changing)).sealing_keys) == ["1", "2"]
    assert (await read_secrets(config)).sealing_keys == {}


async def test_no_secret_option_can_be_named() -> None:
    """Then the provider is for other secrets."""
    config = TenancyConfig(control_url=URL, secrets=SecretsConfig(provider=EnvironmentSecrets(environ={}), options=()))
    assert await read_secrets(config) == config


async def test_a_missing_secret_is_an_error() -> None:
    """Rather than silently without the key."""
    config = TenancyConfig(control_url=URL, secrets=SecretsConfig(provider=EnvironmentSecrets(environ={})))
    with pytest.raises(SecretNotFoundError):
        await read_secrets(config)


def test_only_secret_options_are_read_from_providers() -> None:
    """A typing error is found when the configuration is made."""
    with pytest.raises(ConfigurationError, match="options: may hold"):
        TenancyConfig(control_url=URL, secrets=SecretsConfig(options=("encryption_key",)))


@pytest.mark.parametrize("text", ["", ",", "1", "1:", "1:&&&", "YWFh"])
def test_malformed_keys_are_refused_without_repeating_them(text: str) -> None:
    """They are secrets even if they are malformed."""
    with pytest.raises(ConfigurationError, match="malformed") as caught:
        parse_keys("wrapping_keys", text)
    assert not text.strip(",") or text not in str(caught.value).replace("id:base64", "")


# --- wrapping -------------------------------------------------------------------------------------------------------


async def test_a_wrapped_key_unwraps_in_its_context_alone() -> None:
    """With any of the wrapping keys."""
    environ = {"S_WRAPPING_KEYS": KEYS.split(",", maxsplit=1)[0]}
    wrapper = SecretKeyWrapper(EnvironmentSecrets("S_", environ))
    wrapped = await wrapper.wrap(b"k" * 32, context={"id": "1", "installation": "x"})
    assert b"k" * 32 not in wrapped
    environ["S_WRAPPING_KEYS"] = KEYS
    for later in (wrapper, SecretKeyWrapper(EnvironmentSecrets("S_", environ))):
        assert await later.unwrap(wrapped, context={"installation": "x", "id": "1"}) == b"k" * 32
        with pytest.raises(SecretProviderError):
            await later.unwrap(wrapped, context={"id": "2", "installation": "x"})


async def test_a_rotated_wrapping_key_is_read_anew() -> None:
    """A running process need not be restarted."""
    first, second = KEYS.split(",")
    environ = {"S_WRAPPING_KEYS": first}
    running = SecretKeyWrapper(EnvironmentSecrets("S_", environ))
    await running.wrap(b"k" * 32, context={})
    environ["S_WRAPPING_KEYS"] = f"{first},{second}"
    wrapped = await SecretKeyWrapper(EnvironmentSecrets("S_", environ)).wrap(b"k" * 32, context={})
    assert await running.unwrap(wrapped, context={}) == b"k" * 32


async def test_the_newest_wrapping_key_wraps_at_once() -> None:
    """Even in a process that has read the keys before: otherwise the former key could never be removed."""
    first, second = KEYS.split(",")
    environ = {"S_WRAPPING_KEYS": first}
    running = SecretKeyWrapper(EnvironmentSecrets("S_", environ))
    await running.wrap(b"k" * 32, context={})
    environ["S_WRAPPING_KEYS"] = f"{first},{second}"
    wrapped = await running.wrap(b"k" * 32, context={})
    environ["S_WRAPPING_KEYS"] = second
    assert await SecretKeyWrapper(EnvironmentSecrets("S_", environ)).unwrap(wrapped, context={}) == b"k" * 32


@pytest.mark.parametrize(("key_id", "length"), [("1", 16), ("1", 20), ("x" * 17, 32)])
async def test_a_wrapping_key_has_32_bytes_and_a_short_id(key_id: str, length: int) -> None:
    """As the keys that seal passwords have."""
    keys = f"{key_id}:{base64.b64encode(b'a' * length).decode()}"
    with pytest.raises(ConfigurationError, match="32 bytes"):
        await SecretKeyWrapper(EnvironmentSecrets("S_", {"S_WRAPPING_KEYS": keys})).wrap(b"k" * 32, context={})


# --- extras ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the modules themselves import without it."""
    from tenancy_orm.secrets import aws, vault

    for package in ("hvac", "boto3"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"tenancy-orm\[vault\]"):
        vault.VaultConnection("http://127.0.0.1", token="t")
    with pytest.raises(MissingExtraError, match=r"tenancy-orm\[aws\]"):
        aws.AwsKms("alias/x")
    with pytest.raises(MissingExtraError, match=r"tenancy-orm\[aws\]"):
        aws.AwsSecrets()
