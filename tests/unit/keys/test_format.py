"""The text of a key, and its digests."""

from __future__ import annotations

import pickle
import re
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenancy_orm.config import KeyConfig, SecretsConfig, TenancyConfig
from tenancy_orm.errors import ConfigurationError, InvalidCredentialError
from tenancy_orm.keys.format import ALPHABET, KeyDigester, NewKey, generate_key, parse_key, scanner_pattern

URL = "postgresql://user:secret@host/database"


def reason(text: str, prefix: str = "ten_live") -> str:
    """Why a text is refused."""
    with pytest.raises(InvalidCredentialError) as caught:
        parse_key(text, prefix)
    return caught.value.reason


def test_a_new_key_parses() -> None:
    """Parsing returns its id and prefix."""
    key = generate_key("ten_live")
    parsed = parse_key(key.text, "ten_live")
    assert (parsed.prefix, parsed.key_id, parsed.text) == (key.prefix, key.key_id, key.text)


def test_keys_differ() -> None:
    """In id and in secret."""
    keys = [generate_key("ten_live") for _ in range(100)]
    assert len({key.key_id for key in keys}) == len({key.text.rsplit("_", 1)[1] for key in keys}) == 100


def test_the_secret_encodes_256_bits() -> None:
    """43 digits of base 62 can represent any value below 2 to the 256."""
    secret = generate_key("ten_live").text.rsplit("_", 1)[1][:43]
    value = 0
    for character in secret:
        value = value * 62 + ALPHABET.index(character)
    assert value < 2**256
    assert 62**43 > 2**256


def test_the_checksum_is_the_crc_of_everything_before_it() -> None:
    """A scanner can verify it offline."""
    text = generate_key("ten_live").text
    value = 0
    for character in text[-6:]:
        value = value * 62 + ALPHABET.index(character)
    assert value == zlib.crc32(text[:-6].encode())


@given(st.integers(min_value=0, max_value=74), st.sampled_from(ALPHABET + "_-. é\x00"))
def test_a_typing_error_is_refused(position: int, character: str) -> None:
    """One wrong character anywhere is found."""
    key = generate_key("ten_live").text
    typed = key[:position] + character + key[position + 1 :]
    if typed != key:
        assert reason(typed) in ("malformed", "prefix", "checksum")


@given(st.integers(min_value=9, max_value=73))
def test_swapped_neighbours_are_refused(position: int) -> None:
    """Another common typing error."""
    key = generate_key("ten_live").text
    typed = key[:position] + key[position + 1] + key[position] + key[position + 2 :]
    if typed != key:
        assert reason(typed) in ("malformed", "checksum")


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Nothing else is raised."""
    assert reason(text) in ("malformed", "prefix", "checksum")


def test_a_key_of_another_prefix_is_refused() -> None:
    """Unless that prefix is accepted as well."""
    key = generate_key("ten_test").text
    assert reason(key) == "prefix"
    assert parse_key(key, {"ten_live", "ten_test"}).prefix == "ten_test"


@pytest.mark.parametrize("prefix", ["t", "ten_live", "acme_prod_eu_1", "a" * 24])
def test_every_admitted_prefix_works(prefix: str) -> None:
    """Even one with underscores, and the longest."""
    TenancyConfig(control_url=URL, keys=KeyConfig(prefix=prefix))
    key = generate_key(prefix)
    assert parse_key(key.text, prefix).key_id == key.key_id


def test_scanners_find_keys_in_text() -> None:
    """With the pattern that is documented for them."""
    key = generate_key("acme_live").text
    assert re.findall(scanner_pattern("acme_live"), f"TOKEN='{key}' # acme_live_x") == [key]


def test_neither_repr_nor_str_shows_a_key() -> None:
    """It is shown by ``text`` alone."""
    key = generate_key("ten_live")
    parsed = parse_key(key.text, "ten_live")
    secret = key.text.rsplit("_", 1)[1]
    for shown in (repr(key), str(key), f"{key}", repr(parsed), str(parsed), repr([key, parsed])):
        assert secret not in shown
        assert key.digest.hex() not in shown
        assert key.key_id in shown


def test_a_refusal_names_nothing_of_the_key() -> None:
    """The text may be a real key with a typing error."""
    key = generate_key("ten_live").text
    with pytest.raises(InvalidCredentialError) as caught:
        parse_key(key[:-1] + ("a" if key[-1] != "a" else "b"), "ten_live")
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - just pickled
    assert key.rsplit("_", 1)[1][:-1] not in repr((error, error.__dict__, error.args))


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_digest_matches_its_key_alone() -> None:
    """With and without a pepper."""
    for digester in (KeyDigester(), KeyDigester({"1": b"p" * 32})):
        key, other = generate_key("ten_live", digester), generate_key("ten_live", digester)
        assert digester.matches(key.text, key.digest, key.digest_version)
        assert not digester.matches(other.text, key.digest, key.digest_version)


def test_an_unknown_key_matches_nothing() -> None:
    """The same work is done, and the result is False."""
    digester = KeyDigester({"1": b"p" * 32})
    assert not digester.matches(generate_key("ten_live").text, None)


def test_the_newest_pepper_makes_digests_and_all_verify() -> None:
    """So that a new pepper can be added before the old one is removed."""
    old, new = KeyDigester({"1": b"a" * 32}), KeyDigester({"1": b"a" * 32, "2": b"b" * 32})
    key = generate_key("ten_live", old)
    assert new.matches(key.text, key.digest, key.digest_version)
    assert generate_key("ten_live", new).digest_version == "2"
    assert new.digest(key.text) != key.digest


def test_a_digest_whose_pepper_is_missing_matches_nothing() -> None:
    """Not even the plain digest, under an unknown version."""
    digester = KeyDigester()
    key: NewKey = generate_key("ten_live")
    assert not digester.matches(key.text, digester.digest(key.text), "gone")


def test_a_digester_shows_no_pepper() -> None:
    """Versions only."""
    assert repr(KeyDigester({"1": b"pepper" * 6})) == "KeyDigester(0, 1)"


def test_new_digests_are_made_with_the_current_pepper() -> None:
    """The last one unless another is named; "0" is none of them."""
    peppers = {"1": b"a" * 32, "2": b"b" * 32}
    assert [KeyDigester(peppers, current).current for current in (None, "2", "1", "0")] == ["2", "2", "1", "0"]
    for current in ("0", "1", "2"):
        digester = KeyDigester(peppers, current)
        key = generate_key("ten_live", digester)
        assert key.digest_version == current
        assert KeyDigester(peppers).matches(key.text, key.digest, current)


def test_a_digest_under_a_later_pepper_is_not_to_be_taken_back() -> None:
    """Otherwise old and new processes would keep replacing each other's digests during a deployment."""
    peppers = {"1": b"a" * 32, "2": b"b" * 32}
    older = {
        current: [v for v in ("0", "1", "2", "gone") if KeyDigester(peppers, current).is_older(v)] for current in "012"
    }
    assert older == {"0": [], "1": ["0"], "2": ["0", "1"]}
    assert not KeyDigester().is_older("0")


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peppers", "message"),
    [
        ({"1": "not base64!"}, "not base64"),
        ({"1": b"short"}, "32 bytes"),
        ({"0": b"x" * 32}, "version"),
        ({"a b": b"x" * 32}, "the id of each key pepper"),
    ],
)
def test_malformed_peppers_are_refused(peppers: dict[str, str | bytes], message: str) -> None:
    """Where they are configured, without repeating them."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        TenancyConfig(control_url=URL, keys=KeyConfig(peppers=peppers))
    assert "not base64!" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"peppers": {"1": b"a" * 32}}])
def test_a_current_pepper_must_be_configured(options: dict[str, Any]) -> None:
    """A mistyped version is reported at once."""
    with pytest.raises(ConfigurationError, match=r"keys\.pepper_current: '2'"):
        TenancyConfig(control_url=URL, keys=KeyConfig(pepper_current="2", **options))
    assert TenancyConfig(control_url=URL, keys=KeyConfig(pepper_current="0", **options)).keys.pepper_current == "0"


def test_a_current_pepper_is_checked_once_the_peppers_are_known() -> None:
    """They are read from the provider when the ``Tenancy`` opens."""
    config = TenancyConfig(
        control_url=URL, secrets=SecretsConfig(options=("key_peppers",)), keys=KeyConfig(pepper_current="2")
    )
    assert config.replace(keys={"peppers": {"1": b"a" * 32, "2": b"b" * 32}}).keys.pepper_current == "2"
    with pytest.raises(ConfigurationError, match=r"keys\.pepper_current"):
        config.replace(keys={"peppers": {"1": b"a" * 32}})


def test_peppers_and_prefixes_come_from_the_environment() -> None:
    """In the order in which they are written; the last pepper is the newest."""
    environ = {
        "TENANCY_CONTROL_URL": URL,
        "TENANCY_KEYS_PEPPERS": f"1:{'YWFh' * 11},2:{'YmJi' * 11}",
        "TENANCY_KEYS_PEPPER_CURRENT": "1",
        "TENANCY_KEYS_PREFIXES": "ten_test, ten_old",
    }
    config = TenancyConfig.from_env(environ)
    assert config.keys.decoded_peppers == {"1": b"a" * 33, "2": b"b" * 33}
    assert config.keys.pepper_current == "1"
    assert config.keys.prefixes == ("ten_test", "ten_old")
    assert "YWFh" not in repr(config)
