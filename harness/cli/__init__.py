"""One file a verb: arguments, calls and printing, nothing else."""
