"""SCRAM verifiers as text; tests/integration/provisioning shows that PostgreSQL accepts them."""

from __future__ import annotations

import base64
import re

import pytest

from tenancy_orm.provisioning.server_objects.scram import scram_verifier
from tenancy_orm.secrets.keyring import new_password


def test_a_verifier_has_the_form_postgresql_stores() -> None:
    """The form is SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>, with one iteration."""
    match = re.fullmatch(r"SCRAM-SHA-256\$1:([^$]+)\$([^:]+):(.+)", scram_verifier(new_password()))
    assert match is not None
    assert [len(base64.b64decode(part, validate=True)) for part in match.groups()] == [16, 32, 32]


def test_a_verifier_does_not_contain_the_password() -> None:
    """Neither the password nor its base64 is in it."""
    password = new_password()
    verifier = scram_verifier(password)
    assert password not in verifier
    assert base64.b64encode(password.encode()).decode().rstrip("=") not in verifier


def test_two_verifiers_of_one_password_differ() -> None:
    """Each verifier has its own salt."""
    password = new_password()
    assert scram_verifier(password) != scram_verifier(password)


@pytest.mark.parametrize("password", ["", "secret", "x" * 42, "ä" * 43, "x" * 42 + "\n"])
def test_a_password_that_one_iteration_does_not_protect_is_refused(password: str) -> None:
    """A short one could be guessed; one that is not ASCII would need SASLprep."""
    with pytest.raises(ValueError, match="must be random") as caught:
        scram_verifier(password)
    assert not password or password not in str(caught.value)


def test_every_new_password_is_accepted() -> None:
    """The passwords that the package creates are long enough."""
    for _ in range(100):
        scram_verifier(new_password())
