"""Servers and databases are brought to the state that the registry has."""
