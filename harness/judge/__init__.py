"""Pure: from records to figures, checks and verdicts."""
