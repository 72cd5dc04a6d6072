"""Medusa as the paper writes it (arXiv 2401.10774): heads, tree attention, acceptance, decoding, training."""
