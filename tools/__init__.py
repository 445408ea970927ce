"""Scripts for development. Run them as modules from the root of the repository: `python -m tools.bench.accuracy`."""
