"""Feed thousands of broken and hostile models and data sets to the tool.

    python -m tools.check.fuzz --count 2000
    python -m tools.check.fuzz --first 1234 --count 1 --keep broken/      repeat one mutation and keep its file

Every mutation is a function of its number. It is a real graph, of models/ or of ../shared/assets if that exists (see
MANIFEST.md there), with broken bytes (flipped, truncated, spliced, noise) or broken fields (attributes, dimensions,
names, operators, opsets, types, nodes removed, doubled or moved, weights in other files); or a sound graph with broken
data (array files, image folders). Each goes through load, prune and repair in its own process with a time limit, some
with channels removed, or spelled differently in one of the two files. The outcome must be a sound file or a clear
error.

    ok       a result that the onnx checker takes, with finite weights
    refused  an OnnxAsrError
    FAULT    any other exception, a broken result, a crash or a hang: exit code 1
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import numpy_helper

from onnx_asr.data import PRESETS
from onnx_asr.engine.loading import load
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import OnnxAsrError
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex
from onnx_asr.graph.model_io import save
from onnx_asr.networks.execution import Execution
from onnx_asr.networks.samples import input_specs
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.options import ChannelPruneOptions, PruneOptions
from onnx_asr.pruning.zeros import prune
from onnx_asr.repairing.options import METHODS, RepairOptions
from onnx_asr.repairing.pipeline import repair
from tools.arguments import script_parser
from tools.check.hostile_data import BYTES, outside, reads_outside, remove, spoilt_arrays, spoilt_images
from tools.check.rewritings import SPELLINGS
from tools.paths import ASSETS, MODELS

DIGITS = MODELS / "digits_vgg.onnx"
SMALL, LARGE = 1_200_000, 20_000_000  # bytes; graphs in between get one mutation in sixteen, larger ones get none
SAMPLES = 6
MEMORY = 8 << 30
PATIENCE = 10
OK, REFUSED, FAULT = "ok", "refused", "FAULT"

Fields = Callable[[random.Random, onnx.ModelProto], None]


def _messages(message: Message, found: list[Message]) -> list[Message]:
    """Collect a message and all messages within it."""
    found.append(message)
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in value if field.is_repeated else [value]:
                _messages(item, found)
    return found


def _pick(rng: random.Random, model: onnx.ModelProto) -> Message:
    """Pick a kind of message first, then one of that kind: weights far outnumber opsets."""
    kinds: dict[str, list[Message]] = {}
    for message in _messages(model, []):
        kinds.setdefault(message.DESCRIPTOR.name, []).append(message)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def _spoilt(rng: random.Random, field: FieldDescriptor, value: Any, model: onnx.ModelProto) -> Any:
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        names = [name for node in model.graph.node for name in (*node.output, node.op_type, node.name)]
        text = rng.choice(["", "x", value[: len(value) // 2], rng.choice(names), "../../etc/passwd", "ä" * 999])
        if field.type == FieldDescriptor.TYPE_STRING:
            return text if isinstance(text, str) else "x"
        return text if isinstance(text, bytes) else text.encode()
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice([0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), -value, value * 1e6])
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    small = [0, 1, 2, 3, 7, 16, 255, value + 1, value * 2, value - 1]
    wide = field.type in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64)
    large = [2**31 - 1, *([2**32, 2**40, 2**63 - 1] if wide else [])]
    negative = [] if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32) else [-1, -2, -(2**31)]
    low, high = (-(2 ** (63 if wide else 31)) if negative else 0), 2 ** (63 if wide else 31) - 1
    return max(low, min(high, rng.choice([*small, *large, *negative])))


def field_values(rng: random.Random, model: onnx.ModelProto) -> None:
    """Change scalar fields of one to four messages."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        message = _pick(rng, model)
        fields = [f for f in message.DESCRIPTOR.fields if f.type != FieldDescriptor.TYPE_MESSAGE]
        if not fields:
            continue
        field = rng.choice([f for f, _ in message.ListFields() if f in fields] or fields)
        if field.is_repeated:
            values = getattr(message, field.name)
            if len(values):
                place = rng.randrange(len(values))
                values[place] = _spoilt(rng, field, values[place], model)
            else:
                values.append(_spoilt(rng, field, field.default_value or 1, model) if field.type != 9 else "x")
        else:
            setattr(message, field.name, _spoilt(rng, field, getattr(message, field.name), model))


def parts(rng: random.Random, model: onnx.ModelProto) -> None:
    """Clear fields; drop, double or exchange items of lists."""
    for _ in range(rng.choice([1, 1, 2])):
        message = _pick(rng, model)
        set_fields = [field for field, _ in message.ListFields()]
        if not set_fields:
            continue
        field = rng.choice(set_fields)
        if not field.is_repeated or rng.random() < 0.2:
            message.ClearField(field.name)
            continue
        values = getattr(message, field.name)
        one, other = rng.randrange(len(values)), rng.randrange(len(values))
        how = rng.choice(["drop", "twice", "swap"])
        if how == "drop":
            del values[one]
        elif how == "twice":
            values.append(values[one])
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            kept = type(values[one])()
            kept.CopyFrom(values[one])
            values[one].CopyFrom(values[other])
            values[other].CopyFrom(kept)
        else:
            values[one], values[other] = values[other], values[one]


def wiring(rng: random.Random, model: onnx.ModelProto) -> None:
    """Change a name that a node reads or writes, its operator, or a graph output."""
    graph = model.graph
    node = rng.choice(graph.node)
    names = [*(n for item in graph.node for n in item.output), *(t.name for t in graph.initializer), ""]
    how = rng.choice(["input", "input", "output", "operator", "graph output"])
    if how == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif how == "output" and node.output:
        node.output[0] = rng.choice(names)
    elif how == "operator":
        node.op_type = rng.choice(
            ["Conv", "Gemm", "MatMul", "BatchNormalization", "Relu", "Add", "Loop", "If", "Identity"]
        )
    elif graph.output:
        graph.output[0].name = rng.choice(names)


def weights(rng: random.Random, model: onnx.ModelProto) -> None:
    """Change the values, shape or type of a constant."""
    tensor = rng.choice(model.graph.initializer) if model.graph.initializer else None
    if tensor is None:
        return
    value = numpy_helper.to_array(tensor).copy()
    how = rng.choice(["values", "values", "shape", "type"])
    if how == "values" and value.size:
        worst: list[float] = [0, -1, 1e-30, 1e12, 3e38, float("nan"), float("inf"), -1e30]
        with np.errstate(all="ignore"):
            if rng.random() < 0.3:
                value[...] = np.array(rng.choice(worst)).astype(value.dtype)
            else:
                value.flat[rng.randrange(value.size)] = np.array(rng.choice(worst)).astype(value.dtype)
    elif how == "shape":
        value = rng.choice(
            [value.ravel(), value.ravel()[:0], value[None], value.ravel()[:1], value.T, np.zeros((), value.dtype)]
        )
    elif how == "type":
        value = value.astype(rng.choice([np.float16, np.float64, np.int32, np.uint8, np.bool_]))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


FIELDS: dict[str, Fields] = {"fields": field_values, "parts": parts, "wiring": wiring, "weights": weights}
DATA: dict[str, Callable[[random.Random, Path], Path]] = {"arrays": spoilt_arrays, "images": spoilt_images}
KINDS = (*BYTES, *["fields"] * 4, *["parts"] * 2, "wiring", "weights", "outside", *["arrays"] * 2, *["images"] * 2)


@dataclass(frozen=True)
class Case:
    """One mutation.

    Attributes:
        number: Determines everything else.
        source: The sound graph.
        kind: How it is broken.
        seed: Seed of the generator.
    """

    number: int
    source: Path
    kind: str
    seed: str

    @classmethod
    def of(cls, number: int, sources: list[Path]) -> Case:
        """The mutation with a given number."""
        rng = random.Random(f"case {number}")
        small = [path for path in sources if path.stat().st_size < SMALL]
        large = [path for path in sources if path.stat().st_size >= SMALL]
        chosen = large if large and number % 16 == 15 else small
        source, kind = rng.choice(chosen), rng.choice(KINDS)
        return cls(number, DIGITS if kind in DATA else source, kind, f"mutation {number}")

    def write(self, folder: Path) -> tuple[Path, Path | None]:
        """Write the model, and the data if they are what is broken."""
        rng = random.Random(self.seed)
        data = self.source.read_bytes()
        path = folder / "spoilt.onnx"
        if self.kind in BYTES:
            data = BYTES[self.kind](rng, data)
        elif self.kind not in DATA:
            model = onnx.load_from_string(data)
            if self.kind == "outside":
                outside(rng, model, folder)
            else:
                FIELDS[self.kind](rng, model)
            data = bytes(model.SerializeToString())
        path.write_bytes(data)
        return path, DATA[self.kind](rng, folder) if self.kind in DATA else None


def respelled(rng: random.Random, model: onnx.ModelProto) -> onnx.ModelProto:
    """In half of the cases another spelling of a model, as another exporter or a simplifier would write it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 4])):
        try:
            rng.choice(sorted(SPELLINGS.items()))[1](rng, result)
        except Exception:  # a rewriting that a broken model does not allow
            return model
    return result


def attempt(case: Case, folder: Path) -> tuple[str, str]:
    """Run the tool on a mutation; return the outcome and the message."""
    rng = random.Random(f"attempt {case.number}")
    sound = case.source
    spoilt, data = case.write(folder)
    feeds = _feeds(sound) if data is None else data
    preprocessing = PRESETS["digits"] if data is not None and rng.random() < 0.8 else None
    try:
        intact = load(sound)
        if rng.random() < 0.5:
            pruned, dense = prune(spoilt, options=PruneOptions(0.6)).model, load(spoilt)
        else:
            pruned, dense = load(spoilt), intact
        if rng.random() < 0.2:
            pruned = prune_channels(pruned, ChannelPruneOptions(0.3)).model
            if rng.random() < 0.5:
                del pruned.metadata_props[:]
        pruned, dense = respelled(rng, pruned), respelled(rng, dense)
        skip = data is not None and rng.random() < 0.5
        options = RepairOptions(rng.choice(METHODS), samples=SAMPLES - 2, verify_samples=2, skip_bad_images=skip)
        execution = Execution(Runtime(threads=1))
        result = repair(pruned, feeds, options, dense=dense, preprocessing=preprocessing, execution=execution)
        output = save(result.model, folder / "out.onnx")
    except OnnxAsrError as error:
        return REFUSED, f"{type(error).__name__}: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "onnx_asr" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{place.filename}:{place.lineno}"
        return FAULT, f"{where} {type(error).__name__}: {error}"
    outside = reads_outside(spoilt) if case.kind == "outside" else []
    return (FAULT, f"weights were read from {outside[0]!r}") if outside else _judged(output)


def _judged(path: Path) -> tuple[str, str]:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOAT_TYPES and np.isnan(numpy_helper.to_array(tensor).astype(np.float32)).any():
            return FAULT, f"NaN was written: {tensor.name}"
    return OK, ""


def _feeds(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    specs = input_specs(GraphIndex.of(onnx.load(path)))
    return {
        spec.name: rng.normal(size=(SAMPLES, *(size or 32 for size in spec.shape[1:]))).astype(spec.dtype)
        for spec in specs
    }


def isolated(case: Case, folder: Path, limit: int) -> tuple[str, str]:
    """Run `attempt` in its own process: at most `limit` seconds of CPU time, `PATIENCE` times as many of wall time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sender.send(attempt(case, folder))

    child = context.Process(target=work)
    child.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE * limit):
            return FAULT, f"hang: not finished after {PATIENCE * limit} s"
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        child.join()
        if child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return FAULT, f"hang: not finished after {limit} s of CPU time"
        return FAULT, f"crash: exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--count", type=int, default=2000, help="number of mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--limit", type=int, default=60, help="seconds of CPU time for one mutation")
    parser.add_argument("--keep", type=Path, help="folder for the files that caused a fault")
    parser.add_argument("--verbose", action="store_true", help="print every mutation, not only faults")
    arguments = parser.parse_args()
    found = [*MODELS.glob("*.onnx"), *ASSETS.glob("*/*.onnx")]
    sources = sorted((path for path in found if path.stat().st_size < LARGE), key=lambda path: path.name)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in dict.fromkeys(KINDS)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.first, arguments.first + arguments.count):
            case = Case.of(number, sources)
            outcome, words = isolated(case, Path(folder), arguments.limit)
            counts[case.kind][outcome] += 1
            if outcome == FAULT or arguments.verbose:
                print(f"{number} {case.source.name} {case.kind} {outcome} {' '.join(words.split())[:300]}", flush=True)
                if outcome == FAULT and arguments.keep is not None:
                    kept = arguments.keep / f"{number}"
                    kept.mkdir(parents=True)
                    case.write(kept)
            for leftover in Path(folder).iterdir():
                remove(leftover)
    print(f"{arguments.count} mutations of {len(sources)} graphs in {time.perf_counter() - started:.0f} s")
    for kind, outcomes in counts.items():
        print(f"{kind:8}" + "".join(f"{outcome:>9} {outcomes[outcome]:5}" for outcome in (OK, REFUSED, FAULT)))
    return 1 if any(outcomes[FAULT] for outcomes in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
