"""Models and prompts by name, on this machine."""
