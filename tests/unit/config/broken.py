"""A module that cannot be imported."""

Base = int("nonsense")
