"""Limits and the usage counted against them: exact, in blocks, or as holds; and request rates."""
