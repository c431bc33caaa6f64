"""Stripe: usage records as billing meter events (extra ``billing``).

```python
sender = StripeMeterSender(api_key, meters={"api_calls": "acme_api_calls"})
tenancy = Tenancy(TenancyConfig(usage_sender=sender, ...))  # run_housekeeping sends
```

A tenant's customer is ``metadata["stripe_customer_id"]`` unless ``customer`` says otherwise. One whose id is null,
and a resource without a meter, are not billed; where the id is missing the record is given up until it is mended and
retried, for nobody could tell that from a mistake later. The record's idempotency key is the event's ``identifier``:
Stripe remembers it for 24 hours at least, and refuses a second event with the same one, which is taken for what it
is: the first one arrived. Each attempt has an Idempotency-Key of its own, for Stripe repeats its first answer to one,
a failure too.
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
            "the tenant's metadata has no stripe_customer_id; null where it is not to be billed", permanent=True
        )
    return found


class StripeMeterSender:
    """Sends usage records to Stripe; a ``metering.usage.UsageSender``.

    Args:
        api_key: A secret or restricted key that may write meter events. It appears in no error and no ``repr``.
        meters: The ``event_name`` of the meter, by resource.
        customer: Finds the Stripe customer of a record's tenant; None where it is not billed.
        timeout: Seconds for one request to Stripe.
        base_url: Where Stripe is; for tests.
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
        """Send one record; False where its resource has no meter, or its tenant is not to be billed.

        Raises:
            UsageExportError: Stripe did not take it, or the customer is not known; ``permanent`` where it never will.
        """
        meter = self._meters.get(record.resource)
        customer = None if meter is None else self._customer(record)
        if meter is None or customer is None:
            return False
        # the last second of the period, so that it falls into the invoice of the period and not the next
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
    """Whether Stripe has this very event already: it names the identifier, which is nobody else's."""
    if not isinstance(error, stripe.InvalidRequestError):
        return False
    message = error.user_message or ""
    return error.code == "duplicate_meter_event" or ("already exists" in message and record.idempotency_key in message)


def _translate(error: stripe.StripeError) -> UsageExportError:
    # a wrong key or missing permission is mended by the operator, not by giving the record up
    permanent = isinstance(error, stripe.InvalidRequestError)
    reason = error.code or type(error).__name__
    status = f" (HTTP {error.http_status})" if error.http_status else ""
    # what was wrong with the record; other errors' messages may quote the key
    message = f": {error.user_message[:200]}" if permanent and error.user_message else ""
    return UsageExportError(f"Stripe refused the record: {reason}{status}{message}", permanent=permanent)


__all__ = ["StripeMeterSender", "customer_from_metadata"]
