"""A model folder as it lies on disk: what is in it, whether it is whole, and what it makes a model do."""
