"""Models that other tools pruned are repaired: what the tools leave in the file, and what is restored.

docs/howto.md has the facts about names, metadata and channels that are checked here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from tests.graphs import copy, digit_images, digits, folded, net, weights

OPTIONS = onnx_asr.RepairOptions("refit", samples=192, verify_samples=64)
Prune = Callable[[Any, onnx.ModelProto], onnx.ModelProto]


def feeds(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [{model.graph.input[0].name: digit_images()[0][:64]}]


ZEROS: dict[str, Prune] = {
    "magnitude": lambda tool, model: tool.apply_magnitude_pruning(model, sparsity=0.85, global_sparsity=True),
    "2:4": lambda tool, model: tool.apply_magnitude_pruning(model, n=2, m=4),
    "Wanda": lambda tool, model: tool.apply_wanda_pruning(model, feeds(model), sparsity=0.85),
    "SparseGPT": lambda tool, model: tool.apply_sparsegpt_pruning(model, feeds(model), sparsity=0.85),
}
RENAMING = ("magnitude", "2:4")


def marked(name: str) -> onnx.ModelProto:
    """A net with metadata and documentation, to see whether they stay."""
    model = digits(name)
    entry = model.metadata_props.add()
    entry.key, entry.value, model.doc_string = "mine", "1", "documented"
    return model


def zeros(model: onnx.ModelProto) -> float:
    stored = weights(model).values()
    return sum(int((value == 0).sum()) for value in stored) / sum(value.size for value in stored)


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


@pytest.mark.parametrize("pruner", ZEROS)
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_zeros_of_onnxsim(name: str, pruner: str) -> None:
    tool = pytest.importorskip("onnxsim")
    dense = marked(name)
    sparse = ZEROS[pruner](tool, copy(dense))
    result = onnx_asr.repair(sparse, digit_images()[0], OPTIONS, dense=dense)
    assert result.verification is not None
    assert result.verification.after.kl < 0.3 * result.verification.before.kl
    assert zeros(result.model) >= zeros(sparse) > 0.4
    assert names(sparse) == names(dense)
    assert [entry.key for entry in sparse.metadata_props] == ["mine"]
    assert (sparse.doc_string, result.model.doc_string) == ("documented", "documented")
    renamed = {tensor.name for tensor in sparse.graph.initializer} - {tensor.name for tensor in dense.graph.initializer}
    assert bool(renamed) == (pruner in RENAMING)
    named = [note for note in result.notes if "that no node reads are left in the file" in note]
    assert len(named) == (pruner in RENAMING)
    assert onnx_asr.inspect(sparse).notes == tuple(named)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_channels_that_onnxsim_removed(name: str) -> None:
    """It leaves nets alone that have BatchNormalization, and writes no record."""
    tool = pytest.importorskip("onnxsim")
    unchanged = tool.apply_structured_pruning(digits(name), sparsity=0.3)
    assert [value.shape for value in weights(unchanged).values()] == [
        value.shape for value in weights(digits(name)).values()
    ]
    dense = folded(digits(name))
    small = tool.apply_structured_pruning(copy(dense), sparsity=0.3)
    assert sum(value.size for value in weights(small).values()) < sum(value.size for value in weights(dense).values())
    result = onnx_asr.repair(small, digit_images()[0], OPTIONS, dense=dense)
    assert any("told by the weights" in note for note in result.notes)
    images, labels = digit_images("validation")
    before, after = (onnx_asr.evaluate(model, images, labels=labels).top1 for model in (small, result.model))
    assert before is not None
    assert after is not None
    assert after > max(0.95, before + 0.3)


@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_simplifiers_remove_what_the_note_names(tool: str) -> None:
    onnxsim, simplifier = pytest.importorskip("onnxsim"), pytest.importorskip(tool)
    sparse = onnxsim.apply_magnitude_pruning(digits("resnet"), sparsity=0.85, global_sparsity=True)
    (note,) = onnx_asr.inspect(sparse).notes
    assert note.startswith("11 initializers (")
    assert "simplifier" in note
    smaller = simplifier.simplify(sparse)[0] if tool == "onnxsim" else simplifier.slim(sparse)
    assert onnx_asr.inspect(smaller).notes == ()
    assert smaller.ByteSize() < 0.6 * sparse.ByteSize()


def test_leftovers_are_what_nothing_reads() -> None:
    """Not what a subgraph reads, nor what is an output itself."""
    model = net(
        "g (float[N,4] x, bool c) => (float[N,4] y, float[3] out) { y = If (c) <"
        "then_branch = t () => (float[N,4] a) { a = Mul (x, inner) }, "
        "else_branch = e () => (float[N,4] b) { b = Identity (x) }> }",
        inner=(4,),
        out=(3,),
        dead=(5, 2),
    )
    (note,) = onnx_asr.inspect(model).notes
    assert note.startswith("1 initializers (")
    assert "left in the file: dead;" in note


def torch_net(torch: Any) -> Any:
    """A residual net in evaluation mode, its BatchNormalization at work."""
    nn = torch.nn
    torch.manual_seed(0)

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2))
            self.norm, self.last = nn.BatchNorm2d(32), nn.BatchNorm2d(32)

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.last(self.second(torch.relu(self.norm(self.first(x))))))

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        Block(),
        Block(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
    )
    for _ in range(5):
        model(torch.randn(32, 3, 12, 12))
    return model.eval()


def exported(torch: Any, model: Any, path: Path, dynamo: bool) -> onnx.ModelProto:
    example = torch.randn(2, 3, 12, 12)
    sizes: dict[str, Any] = {"dynamic_axes": {"x": {0: "n"}}}
    if dynamo:
        pytest.importorskip("onnxscript")
        sizes = {"dynamic_shapes": ({0: torch.export.Dim("n")},), "external_data": False}
    torch.onnx.export(model, (example,), path, input_names=["x"], dynamo=dynamo, **sizes)
    return onnx.load(path)


def prune_by_torch(torch: Any, model: Any, remove: bool) -> None:
    prune = importlib.import_module("torch.nn.utils.prune")
    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.8)
    for layer in layers if remove else ():
        prune.remove(*layer)


def check_repaired(dense: onnx.ModelProto, sparse: onnx.ModelProto, share: float) -> None:
    images = np.random.default_rng(0).standard_normal((256, 3, 12, 12)).astype(np.float32)
    assert onnx_asr.inspect(sparse).sparsity == pytest.approx(share, abs=0.02)
    result = onnx_asr.repair(sparse, images, OPTIONS, dense=dense)
    assert result.verification is not None
    assert result.verification.after.kl < 0.1 * result.verification.before.kl
    assert onnx_asr.inspect(result.model).sparsity == pytest.approx(onnx_asr.inspect(sparse).sparsity)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("remove", [True, False])
def test_masks_of_torch(remove: bool, dynamo: bool, tmp_path: Path) -> None:
    """With prune.remove, or with the products of weight and mask still in the graph."""
    torch = pytest.importorskip("torch")
    dense = exported(torch, torch_net(torch), tmp_path / "dense.onnx", dynamo)
    pruned = torch_net(torch)
    prune_by_torch(torch, pruned, remove)
    sparse = exported(torch, pruned, tmp_path / "sparse.onnx", dynamo)
    check_repaired(dense, sparse, 0.8)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("export", [True, False])
def test_two_of_four_of_nvidia(export: bool, dynamo: bool, tmp_path: Path) -> None:
    """Model Optimizer's sparse_magnitude, which chooses its zeros as ASP does."""
    torch = pytest.importorskip("torch")
    sparsity = pytest.importorskip("modelopt.torch.sparsity")
    dense = exported(torch, torch_net(torch), tmp_path / "dense.onnx", dynamo)
    model = sparsity.sparsify(torch_net(torch), "sparse_magnitude")
    sparse = exported(torch, sparsity.export(model) if export else model, tmp_path / "sparse.onnx", dynamo)
    check_repaired(dense, sparse, 0.48)
    patterns = {layer.pattern for layer in onnx_asr.inspect(sparse).layers}
    assert "2:4" in patterns
