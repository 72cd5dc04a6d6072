"""Suites, claims, trees, recipes and hardware as data."""
