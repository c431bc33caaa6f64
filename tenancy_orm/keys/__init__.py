"""API keys as such: their format and digests, their rows, the networks they are bound to."""
