"""Sweeps: a grid of sparsities, patterns and methods, every cell pruned, repaired and scored on held-out samples."""
