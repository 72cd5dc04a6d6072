"""From verdicts and records to what people read."""
