"""From a recipe to heads, adapter and calibration trace."""
