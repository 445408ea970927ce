"""The command line: parse, call, print. What a command does is in the pipelines."""

from onnx_asr.cli.app import main

__all__ = ["main"]
