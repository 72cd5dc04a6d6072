"""Step times of one model on one device."""
