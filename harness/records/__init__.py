"""What lies on disk: schemas, readers, one writer; computes nothing."""
