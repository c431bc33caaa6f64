"""What tenants use and are worth: samples, metrics, usage records for billing, tier policies."""
