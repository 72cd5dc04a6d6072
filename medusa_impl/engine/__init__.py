"""One step of the backbone, fast: cache, kernels, captured graphs."""
