"""Heads and adapters on disk."""
