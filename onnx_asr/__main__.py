"""Entry point of ``python -m onnx_asr``."""

from onnx_asr.cli import main

if __name__ == "__main__":
    main()
