"""The same inputs, seed and batch size give the same file, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_asr.pruning.options import PruneOptions
from onnx_asr.pruning.zeros import prune
from tests.end_to_end.conftest import CALIBRATION, DENSE, PRESET, cli, environment
from tests.graphs import images, net

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
    """Whatever the hash seed and the output path."""
    command, *rest = arguments
    model = pruned if command == "repair" else DENSE
    written = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        output = tmp_path / f"{seed}.onnx"
        assert cli(command, model, "-o", output, *rest, "--force", "-q").code in (0, 1)
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_refit_does_not_depend_on_the_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on that of threads: a layer wide enough for numpy to use all cores, and for several pieces of work."""
    dense = net("g (float[N,64,H,W] x) => (float[N,K,A,B] y) { y = Conv (x, w) }", w=(64, 64, 3, 3))
    onnx.save(dense, tmp_path / "dense.onnx")
    onnx.save(prune(dense, options=PruneOptions(0.8)).model, tmp_path / "pruned.onnx")
    np.savez(tmp_path / "data.npz", x=images(64, seed=1, shape=(64, 16, 16)))
    written = []
    for threads, limited in (("1", True), ("1", False), ("2", True), ("5", True)):
        values = environment() | {"OPENBLAS_NUM_THREADS": "1"}
        if not limited:
            del values["OPENBLAS_NUM_THREADS"], values["OMP_NUM_THREADS"]
        monkeypatch.setattr("tests.end_to_end.conftest.environment", lambda values=values: values)
        output = tmp_path / f"out-{len(written)}.onnx"
        files = (
            tmp_path / "pruned.onnx",
            "-o",
            output,
            "--dense",
            tmp_path / "dense.onnx",
            "--data",
            tmp_path / "data.npz",
        )
        done = cli("repair", *files, "--method", "refit", "--verify-samples", "0", "--threads", threads, "-q")
        assert done.code == 0, done.err
        written.append(output.read_bytes())
    assert written == 4 * written[:1]
