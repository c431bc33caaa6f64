"""Limits and what is counted against them: exact, leased, held; and request rates."""
