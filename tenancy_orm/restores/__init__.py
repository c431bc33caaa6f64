"""Restores: a backup beside the database in use, inspected, and switched to."""
