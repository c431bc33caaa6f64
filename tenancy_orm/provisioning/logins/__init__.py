"""Roles that log in for a time: for people, for copies, for readers; and sessions on standbys."""
