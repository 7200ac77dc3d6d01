"""Recipes to start from."""
