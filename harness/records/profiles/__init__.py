"""Where the time of a step goes: one file a profile, of decoding or of training."""
