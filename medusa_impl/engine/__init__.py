"""One forward pass of the backbone, made fast: cache, masks, packed weights, captured graphs."""
