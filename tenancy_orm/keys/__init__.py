"""API keys: their format and digests, their rows, and the networks that they may be used from."""
