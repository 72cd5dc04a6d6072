"""Whether what was decoded is as good as what vanilla decodes."""
