"""What a gate leaves on disk."""
