"""Repair pruned ONNX vision networks: no retraining, no labels, no PyTorch."""

__version__ = "0.1.0"
