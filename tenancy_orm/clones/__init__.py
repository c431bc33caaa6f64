"""Clones: another tenant with the same data, anonymised before anybody can connect."""
