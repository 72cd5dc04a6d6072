"""A loaded model on a device: everything here imports torch or asks the machine."""
