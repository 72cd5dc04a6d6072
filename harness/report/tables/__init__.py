"""The tables of reports, each usable alone."""
