"""Measurements: what is in a model, what pruning did to it, and how well it does."""
