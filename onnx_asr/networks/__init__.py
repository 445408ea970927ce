"""The networks that a command works on: dense and pruned as a pair, their samples, and how close they are."""
