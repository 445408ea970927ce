"""The same inputs, seed and batch size give the same file, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, PRESET, cli

DATA = ("--data", CALIBRATION, *PRESET, "--samples", "64", "--verify-samples", "32", "--threads", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("repair", "--dense", DENSE, *DATA),
        ("repair", "--dense", DENSE, *DATA, "--method", "asr", "--bn", "ema", "--ema-batch-size", "16"),
        ("compress", *DATA, "--sparsity", "0.8", "--rounds", "2"),
    ],
    ids=["auto", "ema", "compress"],
)
def test_a_second_run_writes_the_same_bytes(
    arguments: tuple[str, ...], pruned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order sets of names come in, and wherever the file goes."""
    command, *rest = arguments
    model = pruned if command == "repair" else DENSE
    written = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        output = tmp_path / f"{seed}.onnx"
        assert cli(command, model, "-o", output, *rest, "--force", "-q").code in (0, 1)
        written.append(output.read_bytes())
    assert written[0] == written[1]
