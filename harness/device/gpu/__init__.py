"""What the driver of a GPU tells: of the device, and of who uses it."""
