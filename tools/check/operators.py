"""Take every operator test case of the onnx package through load, prune, shrink and repair.

    python -m tools.check.operators
    python -m tools.check.operators --only conv group_normalization

A case is a model, mostly of one operator, with inputs. It is tried as it is; with all inputs but the first as
initializers, which gives layers their weights; with these and between two layers, the first of which has a dead
channel; and it is loaded once for every operator set from 7 on, the first that onnxruntime supports. onnxruntime
decides what has to work: what it runs, the tool has to accept, and what the tool writes has to run. Outputs stay the
same after load and shrink. onnx's checker may object to a result only if it objects to the given model.

    passed    done, and the result is right
    nothing   there is nothing to do: no layer with constant weights, or the model is quantized
    refused   one clear error; onnxruntime refuses the model, too
    FAULT     anything else: exit code 1
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

import onnx_asr
from tools.arguments import script_parser

PASSED, NOTHING, REFUSED, FAULT = "passed", "nothing", "refused", "FAULT"
OLDEST = 7
STORED = ("simple", "pytorch-converted", "pytorch-operator")
SPARSITY = 0.5
REPEATS = 4  # of the inputs of a case: the samples of a repair
RIGHTLY_REFUSED = (
    "nothing to prune: ",
    "no channel of the model can be removed",
    "the model is already quantized",
    "holds NaN or infinite values",
    "are infinite, NaN or beyond 1e19",
)
"""How the messages begin, or what they hold, of refusals that have nothing to do with the operator."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and its inputs by name."""

    name: str
    model: onnx.ModelProto
    feeds: Values


@dataclass(frozen=True)
class Outcome:
    """What came of one command on one case."""

    command: str
    case: str
    verdict: str
    what: str = ""


def cases() -> Iterator[Case]:
    """All cases, with their inputs as onnxruntime takes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.model import collect_testcases as models
        from onnx.backend.test.case.node import collect_testcases as nodes

        found = [*nodes(None), *models()]
    for item in found:
        if item.model is not None:
            inputs = item.data_sets[0][0] if item.data_sets else []
            yield Case(item.name, item.model, _by_name(item.model, inputs))
    with resources.as_file(resources.files("onnx")) as package:
        for kind in STORED:
            for path in sorted((package / "backend/test/data" / kind).glob("*/model.onnx")):
                model = onnx.load(path)
                yield Case(f"{kind}/{path.parent.name}", model, _by_name(model, _stored_inputs(path.parent)))


def _stored_inputs(folder: Path) -> list[Any]:
    paths = folder.glob("test_data_set_0/input_*.pb")
    return [_tensor(path) for path in sorted(paths, key=lambda path: int(path.stem.rsplit("_")[-1]))]


def _tensor(path: Path) -> NDArray[Any]:
    return numpy_helper.to_array(onnx.load_tensor(path))


def _by_name(model: onnx.ModelProto, inputs: Any) -> Values:
    stored = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    return dict(zip(names, inputs, strict=False))


def with_weights(case: Case) -> Case | None:
    """The case with all inputs but the first as initializers; None where they are not tensors."""
    names = list(case.feeds)[1:]
    if not names or not all(isinstance(case.feeds[name], np.ndarray) for name in names):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(case.feeds[name], name) for name in names)
    feeds = {name: value for name, value in case.feeds.items() if name not in names}
    return Case(f"{case.name}, weights", model, feeds)


def between_layers(case: Case) -> Case | None:
    """The case with a layer in front of its first input and one behind each output, as far as their types allow it.

    The layer in front passes its input on, but for its last channel, which is constant.
    """
    names = [name for name, value in case.feeds.items() if _has_channels(value)]
    try:
        outputs = dict(zip([value.name for value in case.model.graph.output], run(case, case.model), strict=True))
    except Exception:
        return None
    last = [name for name, value in outputs.items() if _has_channels(value)]
    if not names or not last or len(outputs) != len(case.model.graph.output) or opset_of(case.model) is None:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    graph, first = model.graph, names[0]
    channels = case.feeds[first].shape[1]
    weight, bias = np.eye(channels, dtype=np.float32), np.zeros(channels, np.float32)
    weight[-1], bias[-1] = 0, 0.5
    nodes = list(graph.node)
    for node in nodes:
        node.input[:] = ["made" if name == first else name for name in node.input]
    del graph.node[:]
    graph.node.extend([_layer(graph, first, "made", case.feeds[first], weight, bias), *nodes])
    generator = np.random.default_rng(0)
    for name in last:
        columns = generator.standard_normal((3, outputs[name].shape[1])).astype(np.float32)
        graph.node.append(_layer(graph, name, f"{name}_read", outputs[name], columns, np.zeros(3, np.float32)))
    kept = [value for value in graph.output if value.name not in last]
    del graph.output[:]
    graph.output.extend([*kept, *(onnx.ValueInfoProto(name=f"{name}_read") for name in last)])
    return Case(f"{case.name}, between layers", model, case.feeds)


def opset_of(model: onnx.ModelProto) -> int | None:
    """Version of the standard operators; None where the model does not use any."""
    return next((item.version for item in model.opset_import if item.domain == ""), None)


def _has_channels(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim in (2, 3, 4, 5) and value.size > 0


def _layer(
    graph: onnx.GraphProto, source: str, target: str, value: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]
) -> onnx.NodeProto:
    """A layer over axis 1: a Gemm for two axes, a convolution for more."""
    shaped = weight.T if value.ndim == 2 else weight.reshape(*weight.shape, *[1] * (value.ndim - 2))
    names = [f"{target}_weight", f"{target}_bias"]
    parameters = zip(names, (shaped, bias), strict=True)
    graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in parameters)
    return onnx.helper.make_node("Gemm" if value.ndim == 2 else "Conv", [source, *names], [target], f"{target}_layer")


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(case: Case, model: onnx.ModelProto) -> list[Any]:
    """The outputs of a model for the inputs of a case."""
    return list(session(model).run(None, case.feeds))


def objection_to(model: onnx.ModelProto) -> str:
    """What the full check of onnx.checker has to say against a model; empty if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).splitlines()[0]
    return ""


def differs(first: list[Any], second: list[Any], values: bool) -> str:
    """How outputs differ, in types and shapes or also in values; empty if they do not."""
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
            continue
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"output {number} is {other.dtype} {other.shape}, not {one.dtype} {one.shape}"
        if values and one.dtype.kind == "f" and not np.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"output {number} has other values"
        if values and one.dtype.kind in "biu" and not np.array_equal(one, other):
            return f"output {number} has other values"
    return ""


def execution() -> onnx_asr.Execution:
    return onnx_asr.Execution(onnx_asr.Runtime(threads=1))


def load(case: Case) -> onnx.ModelProto:
    return onnx_asr.load(case.model)


def prune(case: Case) -> onnx.ModelProto:
    return onnx_asr.prune(case.model, options=onnx_asr.PruneOptions(SPARSITY), execution=execution()).model


def prune_channels(case: Case) -> onnx.ModelProto:
    return onnx_asr.prune_channels(case.model, onnx_asr.ChannelPruneOptions(SPARSITY), execution=execution()).model


def shrink(case: Case) -> onnx.ModelProto:
    return onnx_asr.shrink(case.model, execution=execution()).model


def repair(case: Case) -> onnx.ModelProto:
    """Repair the pruned model from copies of the inputs."""
    pruned = prune(case)
    data = {name: np.concatenate([np.atleast_1d(value)] * REPEATS) for name, value in case.feeds.items()}
    source = data if len(data) > 1 else next(iter(data.values()))
    options = onnx_asr.RepairOptions(method="refit", verify_samples=0)
    return onnx_asr.repair(pruned, source, options, dense=case.model, execution=execution()).model


COMMANDS: dict[str, tuple[Callable[[Case], onnx.ModelProto], bool]] = {
    "load": (load, True),
    "shrink": (shrink, True),
    "prune": (prune, False),
    "prune --pattern channel": (prune_channels, False),
    "repair": (repair, False),
}
"""Commands, and whether the outputs stay the same."""


def judged(command: str, case: Case, expected: list[Any] | None) -> Outcome:
    """The outcome of a command; ``expected`` are the outputs of the given model, None where it does not run."""
    action, values = COMMANDS[command]
    try:
        result = action(case)
    except onnx_asr.OnnxAsrError as error:
        if any(words in str(error) for words in RIGHTLY_REFUSED):
            return Outcome(command, case.name, NOTHING)
        return Outcome(command, case.name, REFUSED if expected is None else FAULT, str(error))
    except Exception as error:
        return Outcome(command, case.name, FAULT, repr(error))
    if expected is None:
        return Outcome(command, case.name, PASSED)
    try:
        what = differs(expected, run(case, result), values)
    except Exception as error:
        what = f"the result does not run: {error}"
    if not what and objection_to(result) and not objection_to(case.model):
        what = f"onnx's checker refuses the result: {objection_to(result)}"
    return Outcome(command, case.name, FAULT if what else PASSED, what)


def outcomes(case: Case) -> Iterator[Outcome]:
    """The outcomes of all commands."""
    try:
        expected = run(case, case.model)
    except Exception:
        expected = None
    for command in COMMANDS:
        yield judged(command, case, expected)


@cache
def newest() -> int:
    return int(onnx.defs.onnx_opset_version())


def in_every_opset(case: Case) -> Iterator[Outcome]:
    """Outcomes of loading a case in other operator sets, in which it may or may not be valid."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for opset in range(OLDEST, newest() + 1):
        for item in model.opset_import:
            if item.domain == "":
                item.version = opset
        name = f"{case.name}, opset {opset}"
        try:
            onnx_asr.load(model)
        except onnx_asr.OnnxAsrError as error:
            try:
                session(model)
            except Exception:
                yield Outcome("load in any opset", name, REFUSED)
            else:
                yield Outcome("load in any opset", name, FAULT, str(error))
        except Exception as error:
            yield Outcome("load in any opset", name, FAULT, repr(error))
        else:
            yield Outcome("load in any opset", name, PASSED)


def all_outcomes(only: list[str] | None = None) -> Iterator[Outcome]:
    """The outcomes of all cases, or of those whose name contains one of the words."""
    for case in cases():
        chosen = only is None or any(word in case.name for word in only)
        if chosen and (opset_of(case.model) or OLDEST) >= OLDEST:
            weighted = with_weights(case)
            for variant in (case, weighted, between_layers(weighted or case)):
                if variant is not None:
                    yield from outcomes(variant)
            if len(case.model.graph.node) == 1 and opset_of(case.model) is not None:
                yield from in_every_opset(case)


def table(counts: Counter[tuple[str, str]]) -> str:
    """Verdicts by command."""
    verdicts = (PASSED, NOTHING, REFUSED, FAULT)
    commands = list(dict.fromkeys(command for command, _ in counts))
    rows = [f"{'':24}" + "".join(f"{verdict:>10}" for verdict in verdicts)]
    rows += [
        f"{command:24}" + "".join(f"{counts[command, verdict]:10}" for verdict in verdicts) for command in commands
    ]
    return "\n".join(rows)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", help="run only cases whose name contains one of these")
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in all_outcomes(parser.parse_args().only):
        counts[outcome.command, outcome.verdict] += 1
        if outcome.verdict == FAULT:
            print(f"{outcome.command}: {outcome.case}: {outcome.what}", file=sys.stderr)
    print(table(counts))
    sys.exit(any(verdict == FAULT for _, verdict in counts))


if __name__ == "__main__":
    main()
