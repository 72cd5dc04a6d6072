"""Recipes side by side at one budget."""
