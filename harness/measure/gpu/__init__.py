"""The acceptance of a GPU machine: parts in order of worth, each in a process of its own."""
