"""AWS Secrets Manager and KMS, as moto emulates them."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from tenancy_orm.errors import ConfigurationError, SecretNotFoundError, SecretProviderError
from tenancy_orm.secrets import providers
from tenancy_orm.secrets.aws import AwsKms, AwsSecrets

REGION = "eu-central-1"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty account, with made-up credentials."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(variable, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with mock_aws():
        yield


def client(service: str) -> Any:
    """A plain boto3 client."""
    return boto3.client(service, region_name=REGION)


async def test_a_secret_is_a_string_of_secrets_manager(aws: None) -> None:
    """Under a prefix; a secret that is missing or not text is another error than a failure."""
    manager = client("secretsmanager")
    manager.create_secret(Name="tenancy/encryption_keys", SecretString="1:abc")
    manager.create_secret(Name="tenancy/binary", SecretBinary=b"abc")
    secrets = AwsSecrets(region=REGION)
    assert await secrets.read("encryption_keys") == "1:abc"
    for name in ("absent", "binary"):
        with pytest.raises(SecretNotFoundError, match="tenancy/"):
            await secrets.read(name)
    await secrets.close()


async def test_kms_wraps_keys_in_their_context(aws: None) -> None:
    """By id and by alias; in another context, or by another key, it refuses."""
    kms = client("kms")
    key_id = kms.create_key()["KeyMetadata"]["KeyId"]
    kms.create_alias(AliasName="alias/tenancy", TargetKeyId=key_id)
    wrapper = AwsKms("alias/tenancy", region=REGION)
    wrapped = await wrapper.wrap(b"k" * 32, context={"id": "1"})
    assert b"k" * 32 not in wrapped
    for one in (wrapper, AwsKms(key_id, region=REGION)):
        assert await one.unwrap(wrapped, context={"id": "1"}) == b"k" * 32
        with pytest.raises(SecretProviderError, match="InvalidCiphertext"):
            await one.unwrap(wrapped, context={"id": "2"})
        await one.close()


async def test_kms_unwraps_by_the_configured_key_alone(aws: None) -> None:
    """A value that another key of the account wrapped is refused, although the account could decrypt it."""
    kms = client("kms")
    ours, other = (kms.create_key()["KeyMetadata"]["KeyId"] for _ in range(2))
    foreign = AwsKms(other, region=REGION)
    wrapped = await foreign.wrap(b"k" * 32, context={"id": "1"})
    assert kms.decrypt(CiphertextBlob=wrapped, EncryptionContext={"id": "1"})["Plaintext"] == b"k" * 32
    wrapper = AwsKms(ours, region=REGION)
    with pytest.raises(SecretProviderError, match="AccessDenied"):
        await wrapper.unwrap(wrapped, context={"id": "1"})
    for one in (foreign, wrapper):
        await one.close()


@pytest.mark.parametrize("kept", [False, True])
async def test_no_log_holds_what_is_secret(
    aws: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """At DEBUG, for all loggers: without the filter, botocore logs requests and answers."""
    if kept:
        monkeypatch.setattr(providers._PayloadFilter, "filter", lambda self, record: True)
    key, text = bytes(range(32)), base64.b64encode(b"an encryption key of 32 bytes...").decode()
    client("secretsmanager").create_secret(Name="tenancy/encryption_keys", SecretString=f"1:{text}")
    key_id = client("kms").create_key()["KeyMetadata"]["KeyId"]
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    secrets, wrapper = AwsSecrets(region=REGION), AwsKms(key_id, region=REGION)
    assert await secrets.read("encryption_keys") == f"1:{text}"
    assert await wrapper.unwrap(await wrapper.wrap(key, context={"id": "1"}), context={"id": "1"}) == key
    needles = (text, repr(key), str(key)[2:-1], base64.b64encode(key).decode())
    found = {record.name for record in caplog.records if any(needle in record.getMessage() for needle in needles)}
    assert bool(found) is kept
    for one in (secrets, wrapper):
        await one.close()


async def test_calls_of_the_application_are_logged_as_before(aws: None, caplog: pytest.LogCaptureFixture) -> None:
    """The filter applies to the providers' calls alone."""
    client("secretsmanager").create_secret(Name="tenancy/encryption_keys", SecretString="1:abc")
    secrets = AwsSecrets(region=REGION)
    await secrets.read("encryption_keys")
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    client("secretsmanager").list_secrets()
    assert "botocore.parsers" in {record.name for record in caplog.records}
    await secrets.close()


async def test_a_name_that_leads_elsewhere_is_refused(aws: None) -> None:
    """Before AWS is called."""
    client("secretsmanager").create_secret(Name="tenancy/a/b", SecretString="1:abc")
    secrets = AwsSecrets(region=REGION)
    with pytest.raises(ConfigurationError):
        await secrets.read("a/b")
    await secrets.close()


async def test_a_missing_kms_key_is_an_error(aws: None) -> None:
    """It is an error of the provider."""
    with pytest.raises(SecretProviderError, match="alias/absent"):
        await AwsKms("alias/absent", region=REGION).wrap(b"k" * 32, context={})


async def test_an_endpoint_that_does_not_answer_is_an_error() -> None:
    """Also where boto3 finds no credentials."""
    secrets = AwsSecrets(region=REGION, endpoint_url="http://127.0.0.1:1", timeout=0.2)
    with pytest.raises(SecretProviderError, match="is not available"):
        await secrets.read("encryption_keys")
    await secrets.close()
