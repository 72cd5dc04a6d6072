"""Where the time of a step goes, which kernels win, and one step drawn."""
