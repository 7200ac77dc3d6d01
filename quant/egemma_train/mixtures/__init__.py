"""Mixtures of datasets, and averages of models."""
