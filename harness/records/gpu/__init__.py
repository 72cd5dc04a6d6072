"""The acceptance of a GPU machine on disk: how each part went, and the record of all of them."""
