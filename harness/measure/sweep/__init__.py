"""Points of a sweep that a device must run, here or on a cluster."""
