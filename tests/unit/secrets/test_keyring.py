"""Sealed secrets can be opened for their tenant alone."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tenancy_orm.errors import ConfigurationError, SecretError
from tenancy_orm.secrets.keyring import Keyring, new_password

OLD, NEW = bytes(32), bytes(range(32))


def test_a_password_opens_for_its_tenant() -> None:
    """Opening returns what was sealed."""
    keyring, tenant = Keyring({"1": OLD}), uuid4()
    assert keyring.open_password(tenant, keyring.seal_password(tenant, "s3cret")) == "s3cret"


def test_a_swapped_password_does_not_open() -> None:
    """The tenant's id is associated data: another row's value is refused."""
    keyring, tenant, other = Keyring({"1": OLD}), uuid4(), uuid4()
    sealed = keyring.seal_password(tenant, "s3cret")
    with pytest.raises(SecretError):
        keyring.open_password(other, sealed)


@pytest.mark.parametrize("key_id", ["1", "a-key-of-16-char"])
def test_what_is_too_short_is_in_no_known_format(key_id: str) -> None:
    """Any length and id: a damaged value raises SecretError, which callers handle row by row."""
    keyring, tenant = Keyring({key_id: OLD}), uuid4()
    sealed = keyring.seal_password(tenant, "")
    for length in range(len(sealed)):
        with pytest.raises(SecretError, match="format"):
            keyring.open_password(tenant, sealed[:length])


def test_the_header_is_authenticated() -> None:
    """Under two ids of one key, a value of the one does not pass for a value of the other."""
    keyring, tenant = Keyring({"1": OLD, "2": OLD}), uuid4()
    sealed = bytearray(keyring.seal_password(tenant, "s3cret"))
    sealed[2:3] = b"1"
    with pytest.raises(SecretError, match="damaged"):
        keyring.open_password(tenant, bytes(sealed))


def test_a_value_opens_for_its_purpose_alone() -> None:
    """Associated data with another purpose does not open as a password."""
    keyring, tenant = Keyring({"1": OLD}), uuid4()
    for associated in (tenant.bytes, b"another purpose:" + tenant.bytes):
        with pytest.raises(SecretError):
            keyring.open_password(tenant, keyring.seal(b"s3cret", associated=associated))


def test_every_flipped_byte_is_noticed() -> None:
    """Header, nonce, ciphertext and tag are all authenticated."""
    keyring, tenant = Keyring({"1": OLD}), uuid4()
    sealed = keyring.seal_password(tenant, "s3cret")
    for position in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        with pytest.raises(SecretError):
            keyring.open_password(tenant, bytes(damaged))
    for length in range(len(sealed)):
        with pytest.raises(SecretError):
            keyring.open_password(tenant, sealed[:length])


def test_the_newest_key_seals_and_old_ones_open() -> None:
    """So that a key can be rotated without touching every row at once."""
    tenant = uuid4()
    sealed = Keyring({"1": OLD}).seal_password(tenant, "s3cret")
    both = Keyring({"1": OLD, "2": NEW})
    assert both.open_password(tenant, sealed) == "s3cret"
    assert both.key_id(both.seal_password(tenant, "s3cret")) == "2"
    with pytest.raises(SecretError, match="not configured"):
        Keyring({"2": NEW}).open_password(tenant, sealed)


def test_without_a_key_nothing_starts() -> None:
    """The message says how to make one."""
    with pytest.raises(ConfigurationError, match="tenancy secret"):
        Keyring({})


def test_a_keyring_shows_no_key() -> None:
    """Its repr names ids."""
    assert repr(Keyring({"1": NEW})) == "Keyring(1)"


def test_passwords_are_random_and_long() -> None:
    """256 bits, in characters that need no quoting."""
    passwords = {new_password() for _ in range(100)}
    assert len(passwords) == 100
    assert all(len(password) == 43 for password in passwords)
