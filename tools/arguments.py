"""The command line of every script."""

import argparse
import sys
from pathlib import Path

from tools.paths import ASSETS


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring as it is written."""
    spec = sys.modules["__main__"].__spec__
    return argparse.ArgumentParser(
        prog=f"python -m {spec.name}" if spec else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_threads(parser: argparse.ArgumentParser, default: int = 0) -> None:
    """Let the user set the number of threads."""
    parser.add_argument(
        "--threads", type=int, default=default, help=f"threads per operator; default: {default or 'every core'}"
    )


def add_assets(parser: argparse.ArgumentParser) -> None:
    """Let the user name the folder of nets and images."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of nets and images")
