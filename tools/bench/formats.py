"""What pruned nets become on the way to a device: quantized, converted, packed, timed; on the nets of ../shared/assets.

    python -m tools.bench.formats quantize -o quantize.json [--nets resnet20 resnet18] [--methods dense none refit]
    python -m tools.bench.formats sizes -o sizes.json [--nets resnet20 resnet18] [--latency]

"quantize" prunes by magnitude over all layers (``SPARSITIES``, or --sparsity) and repairs by each method from the first
calibration images. Each version is written as it is (float32), as int8 by onnxruntime's quantize_static (QDQ, one scale
per output channel of a weight, calibrated on --quantize-images of the same images), as float16 by onnxconverter-common,
and by OpenVINO with float16 weights; OpenVINO runs the int8 file as well. All are compared with the dense float32 net
on the first --scored images of those that nothing is calibrated on: share of equal classes, KL divergence (dense ||
version), top-1. Of the detector, "agreement" is the share of the dense net's detections (score from ``CONFIDENT`` up)
for which the same place of the output has a score from there up, the same class, and a box of half the overlap at
least. "range" is the largest weight of an output channel, relative to the same channel of the dense net, with
BatchNormalization folded in both: median and maximum over all channels. "weight error" is the norm of what rounding to
int8 changes in a layer's weights, relative to the norm of these, as a mean over the layers.

"sizes" makes the versions in ``PACKED``, repairs them with "refit", and tells the bytes of the file, after gzip (level
6), after brotli (quality 9), with weights as sparse initializers where these are smaller, FLOPs, and agreement;
--latency also times each against the dense net in onnxruntime, in turns, which takes a machine that does nothing else.

The results are kept in the JSON file after each version; what it holds already is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import onnx_asr
from onnx_asr.data import open_data
from onnx_asr.engine.session import Runtime
from onnx_asr.graph.index import GraphIndex
from onnx_asr.graph.points import survey, weight_of
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.fidelity import Outputs, accuracy, compare, is_classifier
from onnx_asr.networks.samples import input_specs
from onnx_asr.targets.packing import FileUse
from tools.arguments import add_assets, add_threads, script_parser
from tools.bench.methods import method_options
from tools.bench.nets import NETS, YOLOV5N, Images, cifar10, coco, imagenet

SPARSITIES = {"resnet20": 0.8, "resnet18": 0.7, "mobilenetv2": 0.3, "yolov5n": 0.3}
QUANTIZED_OPERATORS = {"yolov5n": ["Conv"]}
"""Of the detector no more: boxes in pixels and scores up to 1 share an output, and so would share one int8 scale."""
CONFIDENT = 0.25
PACKED: dict[str, dict[str, Any]] = {
    "50% zeros": {"sparsity": 0.5},
    "80% zeros": {"sparsity": 0.8},
    "90% zeros": {"sparsity": 0.9},
    "4x1 blocks, 80% zeros": {"sparsity": 0.8, "pattern": "4x1"},
    "2:4": {"pattern": "2:4"},
    "2:4 for TensorRT": {"pattern": "2:4", "target": "tensorrt"},
    "channels, half the FLOPs": {"target_flops": 0.5, "pattern": "channel", "multiple": 8},
}
"""Options of pruning, by version."""
_BATCH = 8


@dataclass(frozen=True)
class Score:
    """How close one file is to the dense net; None where a measure does not apply."""

    agreement: float | None
    kl: float | None
    top1: float | None
    snr_db: float | None
    megabytes: float


class Reader(CalibrationDataReader):
    """Prepared inputs, some at a time."""

    def __init__(self, name: str, inputs: NDArray[np.float32]) -> None:
        self._feeds = iter([{name: part} for part in _batches(inputs)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:  # noqa: D102
        return next(self._feeds, None)


class Bench:
    """One net and its images."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        net = YOLOV5N if name == "yolov5n" else NETS[name]
        self.name, self._label_offset, self._threads = name, net.label_offset, arguments.threads
        self.dense = onnx.load(arguments.assets / next(iter(net.graphs.values())))
        images: Images = {"cifar10": cifar10, "imagenet": imagenet, "coco": coco}[net.data](arguments.assets)
        self._labels = images.labels[: arguments.scored]
        self.shared: dict[str, Any] = {
            "preprocessing": net.preprocessing,
            "execution": Execution(Runtime(threads=arguments.threads)),
        }
        self.calibration = {"images": images.calibration[: arguments.images]}
        (self._input,) = input_specs(GraphIndex.of(self.dense))
        self._scored = self._prepared(images.scored[: arguments.scored])
        self._quantized_on = self._prepared(images.calibration[: arguments.quantize_images])
        self._reference = self._run_onnx(self.dense)
        self.images = {"repair": len(self.calibration["images"]), "scored": len(self._scored)}
        if arguments.mode == "quantize":
            self.images["quantization"] = len(self._quantized_on)

    def _prepared(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        data = open_data({"images": pixels}, [self._input], preprocessing=self.shared["preprocessing"])
        return np.asarray(data.batch(np.arange(len(pixels)))[self._input.name], np.float32)

    def repaired(self, pruned: onnx.ModelProto, method: str) -> onnx.ModelProto:
        """A pruned model after a repair, or as it is where the method is none."""
        if method == "none":
            return pruned
        how = method_options(method, samples=len(self.calibration["images"]), verify_samples=0)
        return onnx_asr.repair(pruned, self.calibration, how, dense=self.dense, **self.shared).model

    def converted(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Every format of one version, and how its weights round."""
        with tempfile.TemporaryDirectory() as place:
            plain, folded, int8, half = (Path(place) / f"{name}.onnx" for name in ("plain", "folded", "int8", "half"))
            onnx.save(model, plain)
            quant_pre_process(plain, folded, skip_symbolic_shape=True)
            quantize_static(
                folded,
                int8,
                Reader(self._input.name, self._quantized_on),
                per_channel=True,
                op_types_to_quantize=QUANTIZED_OPERATORS.get(self.name),
            )
            onnx.save(_half(model), half)
            found = {
                name: self._score(path) for name, path in {"float32": plain, "int8": int8, "float16": half}.items()
            }
            found |= {"OpenVINO": self._openvino(plain), "int8 in OpenVINO": self._openvino(int8)}
            rounding = self._rounding(onnx.load(folded))
        return {"scores": {name: asdict(score) for name, score in found.items()}, "rounding": rounding}

    def packed(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Bytes of a version, its FLOPs relative to the dense net's, and how close it is to that."""
        import brotli

        use = onnx_asr.inspect(model, target="file").target
        assert isinstance(use, FileUse)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            onnx.save(model, path)
            content, score = path.read_bytes(), self._score(path)
        return {
            "bytes": len(content),
            "gzip": len(gzip.compress(content, 6)),
            "brotli": len(brotli.compress(content, quality=9)),
            "sparse initializers": len(content) - use.stored + use.sparse_where_smaller,
            "score": asdict(score),
        }

    def _score(self, path: Path) -> Score:
        return self._compared(self._run_onnx(onnx.load(path)), path)

    def _openvino(self, path: Path) -> Score:
        import openvino

        written = path.with_suffix(".xml")
        openvino.save_model(openvino.convert_model(path), written)
        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": max(1, self._threads)})
        compiled = core.compile_model(written, "CPU")
        parts = [list(compiled(part).values()) for part in _batches(self._scored)]
        outputs = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return self._compared(outputs, written.with_suffix(".bin"))

    def _run_onnx(self, model: onnx.ModelProto) -> Outputs:
        options = SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self._threads, 4
        session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        parts = [session.run(None, {self._input.name: part}) for part in _batches(self._scored)]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _compared(self, outputs: Outputs, path: Path) -> Score:
        outputs = [np.asarray(value, np.float32) for value in outputs]
        found = compare(self._reference, outputs)
        classifier = is_classifier(outputs)
        agreement = found.agreement if classifier else _detections_agree(self._reference[0], outputs[0])
        top1 = accuracy(outputs, self._labels, self._label_offset)[0] if classifier else None
        return Score(agreement, found.kl, top1, found.snr_db, path.stat().st_size / 1e6)

    def _rounding(self, folded: onnx.ModelProto) -> dict[str, float]:
        """How the ranges of the channels have grown, and what int8 costs the weights."""
        with tempfile.TemporaryDirectory() as place:
            before, after = Path(place) / "dense.onnx", Path(place) / "folded.onnx"
            onnx.save(self.dense, before)
            quant_pre_process(before, after, skip_symbolic_shape=True)
            dense = list(_rows(onnx.load(after)))
        grown, errors = [], []
        for rows, reference in zip(_rows(folded), dense, strict=True):
            largest, largest_before = (np.abs(value).max(axis=1) for value in (rows, reference))
            used = (largest > 0) & (largest_before > 0)
            grown.append(largest[used] / largest_before[used])
            steps = np.maximum(largest, np.finfo(np.float64).tiny)[:, None] / 127
            error = np.rint(rows / steps) * steps - rows
            errors.append(float(np.linalg.norm(error) / max(float(np.linalg.norm(rows)), 1e-30)))
        ratios = np.concatenate(grown)
        return {
            "range median": float(np.median(ratios)),
            "range maximum": float(ratios.max()),
            "weight error": float(np.mean(errors)),
        }


def _batches(inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [inputs[start : start + _BATCH] for start in range(0, len(inputs), _BATCH)]


def _rows(model: onnx.ModelProto) -> Iterator[NDArray[Any]]:
    """The weights of every layer, one row per output channel."""
    index = GraphIndex.of(model)
    for point in survey(index).layers:
        yield point.layer.layout.to_rows(weight_of(index, point)).astype(np.float64)


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxconverter_common import float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half: onnx.ModelProto = float16.convert_float_to_float16(copy, keep_io_types=True)
    return half


def _detections_agree(dense: NDArray[Any], other: NDArray[Any]) -> float:
    """Of YOLOv5 outputs [N, places, box as x, y, w, h; objectness; classes]: the share of detections that stay."""
    scores, found = (output[..., 4:5] * output[..., 5:] for output in (dense, other))
    sure = scores.max(axis=-1) >= CONFIDENT
    scores, found, boxes, others = scores[sure], found[sure], dense[sure][:, :4], other[sure][:, :4]
    corners = [(box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2) for box in (boxes, others)]
    (low, high), (other_low, other_high) = corners
    sides = np.maximum(np.minimum(high, other_high) - np.maximum(low, other_low), 0)
    common, areas = sides.prod(axis=1), [(box[:, 2:]).prod(axis=1) for box in (boxes, others)]
    overlap = common / np.maximum(areas[0] + areas[1] - common, 1e-9)
    stays = (found.max(axis=1) >= CONFIDENT) & (found.argmax(axis=1) == scores.argmax(axis=1)) & (overlap >= 0.5)
    return float(stays.mean())


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def quantization_table(found: dict[str, Any]) -> str:
    """Formats as columns: agreement, and KL divergence where there is one."""
    formats = ("float32", "int8", "float16", "OpenVINO", "int8 in OpenVINO")
    lines = [
        f"| net, sparsity | version | {' | '.join(formats)} | range, median, largest | error of the weights |",
        f"|{9 * '---|'}",
    ]
    for net, entry in found.items():
        for version, values in entry["versions"].items():
            scores = (values["scores"][name] for name in formats)
            cells = [
                _percent(score["agreement"]) + (f" ({score['kl']:.3f})" if score["kl"] is not None else "")
                for score in scores
            ]
            rounding = values["rounding"]
            ranges = f"{rounding['range median']:.2f}, {rounding['range maximum']:.1f}"
            lines.append(
                f"| {net}, {entry['sparsity']:.0%} | {version} | {' | '.join(cells)} | {ranges} | "
                f"{rounding['weight error']:.2%} |"
            )
    return "\n".join(lines)


def sizes_table(found: dict[str, Any]) -> str:
    """One row per version; bytes in thousands."""
    sizes = ("bytes", "gzip", "brotli", "sparse initializers")
    lines = [f"| net | version | {' | '.join(sizes)} | FLOPs, without zeros | time | agreement |", f"|{9 * '---|'}"]
    for net, entry in found.items():
        for version, values in entry["versions"].items():
            cells = [_number(values[name] and values[name] / 1000, ",.0f") for name in sizes]
            flops = f"{values['flops']:.0%}, {values['flops without zeros']:.0%}"
            ratio = _number(values.get("latency"), ".2f")
            lines.append(
                f"| {net} | {version} | {' | '.join(cells)} | {flops} | {ratio} | "
                f"{_percent(values['score']['agreement'])} |"
            )
    return "\n".join(lines)


Plan = tuple[dict[str, Any], dict[str, Callable[[], dict[str, Any]]]]
"""The conditions that the versions of a net share, and how to make each of them."""


def quantized(bench: Bench, arguments: argparse.Namespace) -> Plan:
    """Versions of all methods, in every format."""
    sparsity = SPARSITIES[bench.name] if arguments.sparsity is None else arguments.sparsity

    def make(method: str) -> dict[str, Any]:
        if method == "dense":
            return bench.converted(bench.dense)
        pruned = onnx_asr.prune(bench.dense, options=onnx_asr.PruneOptions(sparsity=sparsity)).model
        return bench.converted(bench.repaired(pruned, method))

    return {"sparsity": sparsity}, {method: partial(make, method) for method in arguments.methods}


def packed(bench: Bench, arguments: argparse.Namespace) -> Plan:
    """Versions of all patterns, packed."""

    def make(version: str) -> dict[str, Any]:
        model, cost = bench.dense, (1.0, 1.0)
        if version != "dense":
            given = dict(PACKED[version])
            result: onnx_asr.PruneResult | onnx_asr.ChannelPruneResult
            if given.get("pattern") == "channel":
                del given["pattern"]
                result = onnx_asr.prune_channels(bench.dense, onnx_asr.ChannelPruneOptions(**given))
            else:
                result = onnx_asr.prune(bench.dense, options=onnx_asr.PruneOptions(**given))
            after, before = result.after, result.before
            cost = (after.flops or 0) / (before.flops or 1), (after.nonzero_flops or 0) / (before.flops or 1)
            model = bench.repaired(result.model, "refit")
        values = bench.packed(model) | {"flops": cost[0], "flops without zeros": cost[1]}
        if arguments.latency and version != "dense":
            execution = bench.shared["execution"]
            values["latency"] = onnx_asr.measure_latency(bench.dense, model, execution=execution).ratio
        return values

    return {"latency": arguments.latency}, {version: partial(make, version) for version in arguments.versions}


MODES = {"quantize": (quantized, quantization_table), "sizes": (packed, sizes_table)}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--output", "-o", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--nets", nargs="+", choices=SPARSITIES, help="default: all, of sizes resnet20 and resnet18")
    parser.add_argument("--methods", nargs="+", default=["dense", "none", "refit"], help="dense, none, or a repair's")
    parser.add_argument("--sparsity", type=float, help="of all nets, in place of each one's own")
    parser.add_argument("--images", type=int, default=128, help="to repair from")
    parser.add_argument("--quantize-images", type=int, default=64, help="to quantize from")
    parser.add_argument("--scored", type=int, default=200, help="to score on")
    parser.add_argument(
        "--versions", nargs="+", choices=("dense", *PACKED), default=("dense", *PACKED), help="of sizes"
    )
    parser.add_argument("--latency", action="store_true", help="time the versions of sizes")
    add_assets(parser)
    add_threads(parser, default=1)
    arguments = parser.parse_args()
    plan, table = MODES[arguments.mode]
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    for name in arguments.nets or (["resnet20", "resnet18"] if arguments.mode == "sizes" else list(SPARSITIES)):
        bench = Bench(name, arguments)
        shared, versions = plan(bench, arguments)
        entry = found.setdefault(name, {"mode": arguments.mode, "images": bench.images, **shared, "versions": {}})
        conditions = {key: value for key, value in entry.items() if key != "versions"}
        if conditions != {"mode": arguments.mode, "images": bench.images, **shared}:
            parser.error(f"{arguments.output} holds results under other conditions, {conditions}: name another file")
        for version in (version for version in versions if version not in entry["versions"]):
            begun = time.process_time()
            try:
                values = versions[version]()
            except onnx_asr.OptionError as error:
                print(f"{name}, {version}: {error}")
                continue
            entry["versions"][version] = values | {"cpu_seconds": round(time.process_time() - begun, 1)}
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
