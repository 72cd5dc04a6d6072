"""Which machine a record was made on, and whether two records can be held against each other."""
