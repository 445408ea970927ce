"""Repair: options to result, the walks of all methods, and what they write."""
