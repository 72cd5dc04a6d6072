"""From a spec to a sealed record."""
