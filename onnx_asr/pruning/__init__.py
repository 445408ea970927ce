"""Pruning: scores, masks, channels, budgets, and pruning together with repair."""
