"""Prune and repair every available graph and write the table of docs/graphs.md.

    python -m tools.check.graphs --markdown docs/graphs.md
    python -m tools.check.graphs --only yolox deeplab densenet121

Graphs: every file of ../shared/assets, the light zoo inside the onnx package (its generated weights replaced by random
ones), and torchvision's architectures with random weights, exported by both exporters of torch (needs the packages
torch, torchvision and onnxscript). Each is pruned to 50% by global magnitude, repaired by `paired` and by `refit` from
calibration images, and compared with the dense model on other images: "SNR" is 10 log10 of signal over error in dB over
all outputs; of a Softmax or ArgMax that ends the graph, its input. "Conv" is the share of constant Conv weights that
belong to a correction point. A written model must pass the full check of onnx.checker if its input does, run in
onnxruntime, and be the pruned file but for the parameters of the points, their doc strings and the tool's metadata.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

import onnx_asr
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import survey
from onnx_asr.networks.execution import Execution
from onnx_asr.repairing.options import RepairOptions
from tools.arguments import add_threads, script_parser
from tools.check.operators import objection_to
from tools.paths import ASSETS

SPARSITY = 0.5
METHODS = ("paired", "refit")
_IMAGENET = (255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225]))
_CIFAR = (255 * np.array([0.4914, 0.4822, 0.4465]), 255 * np.array([0.2023, 0.1994, 0.2010]))
_RAW = (np.zeros(3), np.ones(3))


@dataclass(frozen=True)
class Case:
    """A graph, its origin, and its samples: those for calibration first, then those held out."""

    name: str
    origin: str
    load: Callable[[], onnx.ModelProto]
    samples: Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    origin: str
    opset: int
    points: Mapping[str, int]
    skips: Mapping[str, int]
    coverage: float | None
    snr: dict[str, float]
    seconds: dict[str, float]
    checks: list[str]
    refused: str = ""


def photographs(size: tuple[int, int], dtype: str = "float32", layout: str = "NCHW", transform: Any = _IMAGENET) -> Any:
    """Return a function that loads a number of photographs, resized to (height, width), as (x - mean) / std."""

    def samples(count: int) -> NDArray[Any]:
        paths = sorted((ASSETS / "data/imagenet1k").glob("*.jpg"))
        rows = []
        for path in paths[:: len(paths) // count][:count]:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))
            rows.append((pixels - transform[0]) / transform[1])
        array = np.stack(rows).astype(dtype)
        return array if layout == "NHWC" else np.ascontiguousarray(array.transpose(0, 3, 1, 2))

    return samples


def cifar(transform: Any) -> Any:
    """Return a function that loads a number of CIFAR-10 images."""

    def samples(count: int) -> NDArray[Any]:
        with np.load(ASSETS / "data/cifar10_train4k_lossless.npz") as data:
            pixels = data["images"][:count]
        array = ((pixels - transform[0]) / transform[1]).astype(np.float32)
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))

    return samples


def noise(*shape: int) -> Any:
    """Return a function that makes seeded noise with some spatial structure, of mean 0 and standard deviation 1."""

    def samples(count: int) -> NDArray[Any]:
        generator = np.random.default_rng(0)
        channels, height, width = shape
        coarse = generator.standard_normal((count, channels, -(-height // 8), -(-width // 8)))
        fine = np.kron(coarse, np.ones((8, 8)))[..., :height, :width]
        return ((fine + generator.standard_normal(fine.shape)) / 2**0.5).astype(np.float32)

    return samples


def assets() -> Iterator[Case]:
    """The shared files."""
    inputs = {
        "cifar10/resnet20": cifar(_IMAGENET),
        "cifar10/resnet56": cifar(_CIFAR),
        "cifar10/resnet8": cifar(_RAW),
        "imagenet/resnet18": photographs((224, 224)),
        "imagenet/mobilenetv2": photographs((224, 224), transform=(127.5, 127.5)),
        "graphs/deeplab": photographs((513, 513), "uint8", "NHWC", _RAW),
        "graphs/mobilenetv2_int8": photographs((224, 224)),
        "graphs/ppocr": photographs((320, 320)),
        "graphs/ultraface": photographs((240, 320), transform=(127.0, 128.0)),
        "graphs/yolox": photographs((416, 416), transform=_RAW),
    }
    for path in sorted(ASSETS.glob("*/*.onnx")):
        name = path.relative_to(ASSETS).as_posix()
        samples = next((samples for prefix, samples in inputs.items() if name.startswith(prefix)), None)
        if samples is None:
            print(f"skipping {name}: its inputs are not known here", file=sys.stderr)
        else:
            yield Case(name, "shared asset", lambda path=path: onnx.load(path), samples)  # type: ignore[misc]


def light_zoo() -> Iterator[Case]:
    """The nets of onnx's own backend tests."""
    folder = resources.files("onnx") / "backend" / "test" / "data" / "light"
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        if file.name.endswith(".onnx"):
            samples = noise(3, 224, 224)
            yield Case(
                file.name.removesuffix(".onnx"),
                "onnx light zoo",
                lambda file=file: with_random_weights(onnx.load_from_string(file.read_bytes())),  # type: ignore[misc]
                samples,
            )


def with_random_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the generators (ConstantOfShape) of a light model by random initializers."""
    generator = np.random.default_rng(0)
    shapes = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    roles = {
        name: (node.op_type, slot)
        for node in model.graph.node
        for slot, name in enumerate(node.input)
        if node.op_type in ("Conv", "Gemm", "BatchNormalization")
    }
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(int(size) for size in shapes[node.input[0]])
        op_type, slot = roles.get(node.output[0], ("", 0))
        if op_type == "BatchNormalization" or not shape:
            value = generator.uniform(0.5, 1.5, shape) if slot in (1, 4) else generator.normal(0, 0.1, shape)
        elif len(shape) > 1:
            fan_in = shape[1] if op_type == "Gemm" else int(np.prod(shape[1:]))
            value = generator.normal(0, (2 / fan_in) ** 0.5, shape)
        else:  # bias, or the scale and shift of a split BatchNormalization
            value = generator.uniform(0.5, 1.5, shape) if op_type == "" else generator.normal(0, 0.1, shape)
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    unused = [item for item in model.graph.initializer if item.name not in used]
    for item in unused:
        model.graph.initializer.remove(item)
    declared = [value for value in model.graph.input if value.name in {item.name for item in unused}]
    for value in declared:
        model.graph.input.remove(value)
    names = {value.name for value in model.graph.input}
    for item in model.graph.initializer:  # IR 3: an initializer is an input, too
        if item.name not in names:
            model.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    return model


def torchvision_nets() -> Iterator[Case]:
    """Torchvision's architectures with random weights and measured running statistics, exported both ways."""
    try:
        models = import_torchvision()
    except ImportError as error:
        print(f"skipping the nets of torchvision: {error}", file=sys.stderr)
        return
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    nets: dict[str, tuple[Callable[[], Any], int]] = {
        "resnet18": (models.resnet18, 64),
        "resnet50": (models.resnet50, 64),
        "densenet121": (models.densenet121, 64),
        "googlenet": (lambda: models.googlenet(aux_logits=False, init_weights=False), 64),
        "mobilenet_v2": (models.mobilenet_v2, 64),
        "mobilenet_v3_large": (models.mobilenet_v3_large, 64),
        "efficientnet_b0": (models.efficientnet_b0, 64),
        "regnet_y_400mf": (models.regnet_y_400mf, 64),
        "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 64),
        "convnext (half as wide)": (
            lambda: ConvNeXt([CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 3)]),
            64,
        ),
        "vit (4 layers of 192)": (
            lambda: with_random_head(
                models.VisionTransformer(64, 8, num_layers=4, num_heads=4, hidden_dim=192, mlp_dim=768)
            ),
            64,
        ),
    }
    for name, (make, size) in nets.items():
        for dynamo in (False, True):
            label = f"torchvision, {'dynamo' if dynamo else 'TorchScript'} exporter"
            yield Case(
                f"{name}",
                label,
                lambda make=make, size=size, dynamo=dynamo: exported(make, size, dynamo),  # type: ignore[misc]
                noise(3, size, size),
            )


def with_random_head(net: Any) -> Any:
    """Initialise the head of a vision transformer, which torchvision starts at 0."""
    import torch

    torch.nn.init.normal_(net.heads.head.weight, std=0.05)
    return net


def import_torchvision() -> Any:
    """Import torchvision.models, even if torchvision's compiled operators do not fit the installed torch."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor x) -> Tensor")
        import_torchvision.library = library  # type: ignore[attr-defined]  # keeps the operators registered
        import torchvision
    return torchvision.models


def exported(make: Callable[[], Any], size: int, dynamo: bool) -> onnx.ModelProto:
    """Export the same seeded net by either exporter."""
    import torch

    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(torch.from_numpy(noise(3, size, size)(16)))
    net.eval()
    sample = torch.zeros(2, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        if dynamo:
            shapes = ({0: torch.export.Dim("N", min=1, max=1024)},)
            torch.onnx.export(
                net, (sample,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
            )
        else:
            axes = {"input": {0: "N"}}
            torch.onnx.export(net, (sample,), path, dynamo=False, dynamic_axes=axes, input_names=["input"])
        return onnx.load(path)


def differences(pruned: onnx.ModelProto, repaired: onnx.ModelProto) -> list[str]:
    """List what differs, apart from parameters of points, doc strings of their nodes, and the tool's metadata."""
    index = GraphIndex.of(pruned)
    found = survey(index)
    allowed = {position for p in found.points for position in (p.node, p.batchnorm)}
    allowed |= {p.bias[0] for p in found.layers if p.bias is not None}
    reads = set(_reads(index, allowed))
    rest = list(repaired.graph.node)
    wrong = []
    for position, before in enumerate(pruned.graph.node):
        if index.is_constant(before.output[0]) and before.output[0] in reads:
            if rest and rest[0].output[0] == before.output[0]:  # otherwise it has no reader left
                rest.pop(0)
            continue
        mine, its = (onnx.NodeProto.FromString(node.SerializeToString()) for node in (before, rest.pop(0)))
        if position in allowed:
            parameters = {slot for slot, name in enumerate(before.input) if slot or index.is_constant(name)}
            for item in (mine, its):
                item.doc_string = ""
                for slot in range(len(item.input)):
                    if slot in parameters or slot >= len(before.input):
                        item.input[slot] = ""
            while mine.input and not mine.input[-1]:
                mine.input.pop()
            while its.input and not its.input[-1]:
                its.input.pop()
            if mine.op_type == "MatMul" and its.output != mine.output:  # a bias that was not there
                its.output[0] = rest.pop(0).output[0]
        if mine != its:
            wrong.append(f"node {index.label(position)}")
    values = {item.name: item for item in repaired.graph.initializer}
    for item in pruned.graph.initializer:
        if item.name not in reads and values.get(item.name) != item:
            wrong.append(f"initializer {item.name}")
    for field in ("ir_version", "producer_name", "producer_version", "opset_import", "functions", "doc_string"):
        if getattr(pruned, field) != getattr(repaired, field):
            wrong.append(field)
    removed = {item.name for item in pruned.graph.initializer} - set(values)  # replaced by copies of each reader's own
    if [item for item in pruned.graph.value_info if item.name not in removed] != list(repaired.graph.value_info):
        wrong.append("graph.value_info")
    for field in ("name", "output", "doc_string"):
        if getattr(pruned.graph, field) != getattr(repaired.graph, field):
            wrong.append(f"graph.{field}")
    metadata = [item for item in repaired.metadata_props if not item.key.startswith("onnx_asr.")]
    if metadata != [item for item in pruned.metadata_props if not item.key.startswith("onnx_asr.")]:
        wrong.append("metadata_props")
    return wrong


def _reads(index: GraphIndex, positions: set[int | None]) -> Iterator[str]:
    for position in positions:
        if position is not None:
            stack = list(index.nodes[position].input)
            while stack:
                name = stack.pop()
                if name and index.is_constant(name):
                    yield name
                    if name in index.producer:
                        stack.extend(index.nodes[index.producer[name]].input)


def outputs(model: onnx.ModelProto, samples: NDArray[Any]) -> list[NDArray[Any]]:
    """Run plain onnxruntime; return every floating-point output over all samples (of ArgMax and Softmax, the input)."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    producer = {name: node for node in copy.graph.node for name in node.output}
    for value in copy.graph.output:
        name = value.name
        while name in producer and producer[name].op_type in ("Cast", "Squeeze", "Identity", "ArgMax", "Softmax"):
            name = producer[name].input[0]
        if name != value.name:
            value.CopyFrom(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    step = given.shape[0] if isinstance(given.shape[0], int) else min(8, len(samples))
    parts: list[list[NDArray[Any]]] = []
    for start in range(0, len(samples) - len(samples) % step, step):
        parts.append(session.run(None, {given.name: samples[start : start + step]}))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def snr(dense: list[NDArray[Any]], other: list[NDArray[Any]]) -> float:
    signal = sum(float(np.square(item.astype(np.float64)).sum()) for item in dense)
    error = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(dense, other, strict=True))
    return float(10 * np.log10(signal / error)) if error else float("inf")


def check(case: Case, calibration: int, held_out: int, threads: int) -> Row:
    """Prune, repair and check one graph."""
    dense = case.load()
    opset = next(item.version for item in dense.opset_import if item.domain in ("", "ai.onnx"))
    samples = case.samples(calibration + held_out)
    index = GraphIndex.of(dense)
    try:
        found = survey(index)
    except onnx_asr.errors.ModelError as error:
        return Row(case.name, case.origin, opset, {}, {}, None, {}, {}, [], str(error))
    kinds: Counter[str] = Counter(point.kind for point in found.points)
    skips = Counter(f"{skip.op_type}: {skip.reason}" for skip in found.skips)
    sizes = {
        position: index.value(node.input[1]).size
        for position, node in enumerate(index.nodes)
        if node.op_type == "Conv" and index.is_constant(node.input[1])
    }
    covered = sum(sizes[point.node] for point in found.points if point.node in sizes)
    coverage = covered / sum(sizes.values()) if sizes else None
    pruned = onnx_asr.prune(dense, options=onnx_asr.PruneOptions(SPARSITY)).model
    reference = outputs(dense, samples[calibration:])
    result = {"pruned": snr(reference, outputs(pruned, samples[calibration:]))}
    seconds, checks = {}, []
    for method in METHODS:
        begun = time.perf_counter()
        options = RepairOptions(method=method, samples=calibration, verify_samples=0)  # type: ignore[arg-type]
        execution = Execution(Runtime(threads=threads))
        repaired = onnx_asr.repair(pruned, samples[:calibration], options, dense=dense, execution=execution)
        seconds[method] = time.perf_counter() - begun
        objection = objection_to(repaired.model)
        if objection and not objection_to(pruned):
            checks.append(f"{method}: checker: {objection}")
        result[method] = snr(reference, outputs(repaired.model, samples[calibration:]))
        checks += [f"{method}: differs in {what}" for what in differences(pruned, repaired.model)]
        reported = {point.name for point in repaired.points} | {skip.name for skip in repaired.skips}
        checks += [f"{method}: {index.label(p.node)} is not reported" for p in found.points if p.name not in reported]
    return Row(case.name, case.origin, opset, kinds, skips, coverage, result, seconds, checks)


def line(row: Row) -> str:
    """One line of the table."""
    if row.refused:
        return f"| {row.name} | {row.origin} | {row.opset} | refused: {row.refused} | | | | | | |"
    points = ", ".join(f"{count} {kind}" for kind, count in row.points.items())
    skips = "; ".join(f"{count} x {reason}" for reason, count in row.skips.items()) or "none"
    coverage = "-" if row.coverage is None else f"{100 * row.coverage:.1f}%"
    levels = " | ".join(f"{row.snr[key]:.1f}" for key in ("pruned", *METHODS))
    seconds = " / ".join(f"{row.seconds[method]:.1f}" for method in METHODS)
    verdict = "; ".join(row.checks) or "ok"
    cells = (row.name, row.origin, str(row.opset), points, skips, coverage, levels, seconds, verdict)
    return f"| {' | '.join(cells)} |"


def replace_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the two marks of a name on a page."""
    mark = f"<!-- {name} -->\n"
    text = page.read_text(encoding="utf-8")
    table = "\n".join(lines) + "\n"
    page.write_text(re.sub(f"{mark}.*{mark}", lambda _: mark + table + mark, text, flags=re.DOTALL), encoding="utf-8")


HEADER = """\
| graph | origin | opset | points | skipped, with reasons | Conv | SNR pruned | `paired` | `refit` | seconds | checks |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", help="run only graphs whose name or origin contains one of these")
    parser.add_argument("--calibration", type=int, default=64, help="calibration samples")
    parser.add_argument("--held-out", type=int, default=16, help="samples for the SNR")
    add_threads(parser)
    parser.add_argument(
        "--markdown", type=Path, help="file in which the table between <!-- table --> marks is replaced"
    )
    arguments = parser.parse_args()
    cases = [*(assets() if ASSETS.exists() else ()), *light_zoo(), *torchvision_nets()]
    if arguments.only:
        cases = [case for case in cases if any(part in f"{case.name} {case.origin}" for part in arguments.only)]
    lines = [HEADER]
    print(HEADER, flush=True)
    for case in cases:
        lines.append(line(check(case, arguments.calibration, arguments.held_out, arguments.threads)))
        print(lines[-1], flush=True)
    if arguments.markdown:
        replace_table(arguments.markdown, "table", lines)


if __name__ == "__main__":
    main()
