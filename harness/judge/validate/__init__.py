"""Whether a record's folder is sound, kind by kind; `record.py` is the door."""
