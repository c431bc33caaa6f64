"""Stripe: usage records as billing meter events (extra ``billing``).

```python
sender = StripeMeterSender(api_key, meters={"api_calls": "acme_api_calls"})
tenancy = Tenancy(TenancyConfig(usage_sender=sender, ...))  # run_housekeeping sends
```

A tenant's customer is ``metadata["stripe_customer_id"]`` unless ``customer`` returns another. Tenants with a null id
and resources without a meter are not billed. A missing id could be a mistake: the record is given up until the id is
set and the record retried.

The record's idempotency key is the event's ``identifier``. Stripe remembers it for at least 24 hours and refuses a
second event with the same one; that refusal counts as success, since the first event has arrived. Each attempt has its
own Idempotency-Key, since Stripe repeats its first answer to a key, even a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from ..errors import MissingExtraError, UsageExportError
from ..protocols import UsageRecord

try:
    import httpx  # noqa: F401 - Stripe's asynchronous client is built on it
    import stripe
except ImportError as exc:
    raise MissingExtraError("stripe", "billing") from exc

# https://docs.stripe.com/api/billing/meter-event/create: "within the past 35 calendar days"
_OLDEST_SECONDS: Final = 35 * 86_400

Customer = Callable[[UsageRecord], str | None]


def customer_from_metadata(record: UsageRecord) -> str | None:
    """Return ``stripe_customer_id`` of the tenant's metadata; None where it is null.

    Raises:
        UsageExportError: it is missing, or no text.
    """
    found = record.metadata.get("stripe_customer_id", ...)
    if found is not None and not isinstance(found, str):
        raise UsageExportError(
            "the tenant's metadata has no stripe_customer_id: set it, to null if the tenant is not billed",
            permanent=True,
        )
    return found


class StripeMeterSender:
    """Sends usage records to Stripe; a ``protocols.UsageSender``.

    Args:
        api_key: A secret or restricted key that may write meter events. It appears in no error and no ``repr``.
        meters: The ``event_name`` of the meter, by resource.
        customer: Returns the Stripe customer of a record's tenant; None where the tenant is not billed.
        timeout: Seconds for one request to Stripe.
        base_url: Stripe's address; for tests.
    """

    def __init__(
        self,
        api_key: str,
        *,
        meters: Mapping[str, str],
        customer: Customer = customer_from_metadata,
        timeout: float = 20.0,
        base_url: str | None = None,
    ) -> None:
        self._meters = dict(meters)
        self._customer = customer
        self._http = stripe.HTTPXClient(timeout=timeout)
        self._client = stripe.StripeClient(
            api_key,
            base_addresses={"api": base_url} if base_url else {},
            max_network_retries=2,
            http_client=self._http,
        )

    def __repr__(self) -> str:
        """Name the meters only."""
        return f"StripeMeterSender(meters={self._meters!r})"

    async def send(self, record: UsageRecord) -> bool:
        """Send one record; False where its resource has no meter, or its tenant is not billed.

        Raises:
            UsageExportError: Stripe refused it, or the customer is unknown; ``permanent`` where a retry cannot help.
        """
        meter = self._meters.get(record.resource)
        customer = None if meter is None else self._customer(record)
        if meter is None or customer is None:
            return False
        # the last second of the period, so that it is on the invoice of this period, not of the next
        timestamp = int(record.period_end.timestamp()) - 1
        if timestamp < time.time() - _OLDEST_SECONDS:
            raise UsageExportError("the record is older than the 35 days that Stripe accepts", permanent=True)
        try:
            await self._client.v1.billing.meter_events.create_async(
                {
                    "event_name": meter,
                    "identifier": record.idempotency_key,
                    "timestamp": timestamp,
                    "payload": {"stripe_customer_id": customer, "value": str(record.quantity)},
                },
                {"idempotency_key": f"{record.idempotency_key}-{record.attempts}"},
            )
        except stripe.StripeError as exc:
            if not _is_duplicate(exc, record):
                raise _translate(exc) from exc
        return True

    async def close(self) -> None:
        """Close the connections to Stripe."""
        await self._http.close_async()  # type: ignore[no-untyped-call]


def _is_duplicate(error: stripe.StripeError, record: UsageRecord) -> bool:
    """Return whether Stripe has this event already: it names the identifier, which is unique to the record."""
    if not isinstance(error, stripe.InvalidRequestError):
        return False
    message = error.user_message or ""
    return error.code == "duplicate_meter_event" or ("already exists" in message and record.idempotency_key in message)


def _translate(error: stripe.StripeError) -> UsageExportError:
    # the operator corrects a wrong key or a missing permission; the record must be retried then
    permanent = isinstance(error, stripe.InvalidRequestError)
    reason = error.code or type(error).__name__
    status = f" (HTTP {error.http_status})" if error.http_status else ""
    # the message says what is wrong with the record; messages of other errors may quote the key
    message = f": {error.user_message[:200]}" if permanent and error.user_message else ""
    return UsageExportError(f"Stripe refused the record: {reason}{status}{message}", permanent=permanent)


__all__ = ["StripeMeterSender", "customer_from_metadata"]
