"""The error tree: complete, picklable, and drawn in the module's docstring."""

from __future__ import annotations

import inspect
import pickle
from datetime import UTC, datetime

import pytest

from tenancy_orm import errors
from tenancy_orm.errors import TenancyError

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, TenancyError)]

SAMPLES: list[TenancyError] = [
    errors.MissingExtraError("typer", "cli"),
    errors.EventLoopBlockedError(30.0),
    errors.NoTenantError(),
    errors.CrossTenantError("adding a Note", bound="acme", requested="globex"),
    errors.TenantNotFoundError("acme"),
    errors.TenantNotFoundError(metadata={"customer": "cus_1"}),
    errors.SeveralTenantsError({"customer": "cus_1"}, ("acme", "globex")),
    errors.TenantExistsError("acme"),
    errors.SeedError("seed 'roles' failed", seed="roles", tenant="acme", step="seeds"),
    errors.ReferenceDataError("reference data 'countries' failed", reference="countries"),
    errors.FleetSeedError({"acme": "no such table"}, total=2),
    errors.UnknownTierError("gold", ("free", "pro")),
    errors.TierChangedError("acme", expected="free", found="pro"),
    errors.InvalidTransitionError("acme", "active", "purged"),
    errors.TenantSuspendedError("acme", reason="unpaid"),
    errors.InvalidCredentialError("expired", credential_id="abc"),
    errors.CrossOriginError("https://evil.example"),
    errors.TenantNotAllowedError("globex"),
    errors.TenantNotNamedError(("acme", "globex")),
    errors.QuotaExceededError(
        tenant="acme", resource="users", limit=3, used=3, requested=1, resets_at=datetime(2030, 1, 1, tzinfo=UTC)
    ),
    errors.MarkerMismatchError(tenant="acme", database="db", expected="a", found=None),
    errors.CheckoutTimeoutError(server="default", tenant="acme", timeout=1.5, limit=20),
    errors.CheckoutRefusedError(
        server="default", tenant="acme", timeout=1.5, limit=20, expected=9.0, left=1.5, waiting=70, retry_after=7.5
    ),
    errors.ServerUnavailableError(server="default", tenant="acme", sqlstate="57P03"),
    errors.ProvisioningError("it failed", tenant="acme", step="role"),
    errors.FleetMigrationError({"acme": "it failed"}, total=3),
    errors.PreflightError({"acme": "0002 no NULLs: 3 rows"}, total=3),
    errors.SchemaDriftError(["acme"], {"globex": "it failed"}, total=3),
]


def test_a_message_says_in_words_that_a_tenant_is_unavailable() -> None:
    """Also where the status itself is not an adjective."""
    assert str(errors.TenantMaintenanceError("acme")) == "tenant 'acme' is in maintenance"
    assert str(errors.TenantProvisioningError("acme")) == "tenant 'acme' is not ready: it is still being created"
    assert str(errors.TenantSuspendedError("acme", reason="unpaid")) == "tenant 'acme' is suspended: unpaid"


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: TenancyError) -> None:
    """Message and typed attributes are kept: job queues pass errors between processes."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_a_message_is_lower_case_without_a_full_stop(error: TenancyError) -> None:
    """Messages can be embedded in others."""
    assert str(error)
    assert not str(error).endswith(".")
    assert not str(error)[0].isupper()


@pytest.mark.parametrize("cls", ALL)
def test_every_error_is_named_and_drawn(cls: type[TenancyError]) -> None:
    """Every class ends in Error, has a docstring, and is in the tree of the module's docstring."""
    assert cls.__name__.endswith("Error")
    assert cls.__doc__
    assert cls.__name__ in (errors.__doc__ or "")


def test_a_rejected_key_says_the_same_whatever_the_reason() -> None:
    """The reason is for the audit log, not for the caller."""
    assert str(errors.InvalidCredentialError("expired")) == str(errors.InvalidCredentialError("unknown"))


def test_a_purge_that_is_refused_says_to_delete_first() -> None:
    """That is the remedy, but not where the tenant is deleted already and something else is in the way."""
    assert str(errors.InvalidTransitionError("acme", "active", "purged")).endswith(
        "from active to purged; delete it first"
    )
    assert "delete it first" not in str(errors.InvalidTransitionError("acme", "active", "suspended"))


def test_tenants_with_the_same_reason_are_named_together() -> None:
    """The undo of a run that a later one followed has the same for each tenant: a sentence each is no message."""
    moved = {f"t{number}": "run 8 has moved it to 0003 since; undo that run first" for number in range(33)}
    found = str(errors.UndoRefusedError(7, irreversible={}, moved={**moved, "acme": "it is at 0001"}))
    assert found == (
        "run 7 cannot be undone, and no tenant was touched: tenants t0, t1, t2, t3, t4 and 28 more: run 8 has moved it "
        "to 0003 since; undo that run first; tenant acme: it is at 0001 (add --leave-moved to undo it for the others)"
    )
