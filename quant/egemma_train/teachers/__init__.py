"""Vectors to match, and hard negatives to find."""
