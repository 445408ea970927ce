"""Channels: which ones belong together, how operators pass them on, and their removal."""
