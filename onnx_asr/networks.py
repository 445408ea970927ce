"""The networks of one repair, paired and surveyed, and how the walks over them are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import onnx

from onnx_asr.calibration import Calibration
from onnx_asr.engine.lockstep import BufferPool, Lane
from onnx_asr.engine.session import Runtime
from onnx_asr.errors import ModelError, StructureError
from onnx_asr.graph.edit import EditPlan
from onnx_asr.graph.index import GraphIndex, ancestors
from onnx_asr.graph.match import Pairing, match
from onnx_asr.graph.points import Point, Survey, survey
from onnx_asr.model_io import check_finite

Progress = Callable[[str, float], None]
"""Told what is being done and how much of it is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Execution:
    """How walks run: sessions, memory for boundary tensors in bytes (None: no limit), progress."""

    runtime: Runtime = field(default_factory=Runtime)
    memory_limit: int | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class Networks:
    """A pruned network, its correction points, and the dense one it came from, if there is one."""

    pruned: GraphIndex
    survey: Survey
    dense: GraphIndex | None
    pairing: Pairing | None

    @classmethod
    def of(cls, pruned: onnx.ModelProto, dense: onnx.ModelProto | None) -> Networks:
        """Index, check, survey and pair.

        Raises:
            ModelError: When a model is quantized, not finite, or has nothing to repair.
            StructureError: When the two are not the same network.
        """
        index = GraphIndex.of(pruned)
        found = survey(index)
        if not found.points:
            reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in found.skips[:3])
            raise ModelError(
                "the model has no Conv, ConvTranspose, Gemm, MatMul or BatchNormalization that can be repaired"
                + (f" ({reasons})" if reasons else "; give a network with constant weights")
            )
        check_finite(index, "pruned")
        if dense is None:
            return cls(index, found, None, None)
        dense_index = GraphIndex.of(dense)
        check_finite(dense_index, "dense")
        if len(index.inputs) != len(dense_index.inputs):
            raise StructureError(
                f"the pruned model has {len(index.inputs)} inputs, the dense one {len(dense_index.inputs)}: "
                "give the dense model that the pruned one was made from"
            )
        return cls(index, found, dense_index, match(index, dense_index))

    def dense_tensor(self, name: str) -> str:
        """The dense network's counterpart of a tensor."""
        assert self.pairing is not None
        return self.pairing.tensors[name]

    def dense_point(self, point: Point) -> Point:
        """The dense network's counterpart of a point with weights."""
        assert self.dense is not None
        assert self.pairing is not None
        nodes = self.pairing.nodes
        return replace(
            point,
            node=nodes[point.node],
            tensor=self.dense_tensor(point.tensor),
            bias_node=None if point.bias_node is None else nodes[point.bias_node],
            batchnorm=None if point.batchnorm is None else nodes[point.batchnorm],
        )

    def first_layers(self) -> set[int]:
        """Nodes with weights that no other node with weights stands before: their input is the raw data."""
        producers = {point.node for point in self.survey.points if point.weight_slot is not None}
        return {
            node
            for node in producers
            if producers.isdisjoint(ancestors(self.pruned, [self.pruned.nodes[node].input[0]]))
        }

    def pruned_lane(
        self, targets: Iterable[str], calibration: Calibration, pool: BufferPool, execution: Execution, plan: EditPlan
    ) -> Lane:
        """The pruned network at the start of a walk."""
        return Lane(self.pruned, targets, calibration.chunks, pool, execution.runtime, plan)

    def dense_lane(
        self, targets: Iterable[str], calibration: Calibration, pool: BufferPool, execution: Execution
    ) -> Lane:
        """The dense network at the start of a walk, fed with the same arrays."""
        assert self.dense is not None
        renamed = dict(zip((v.name for v in self.pruned.inputs), (v.name for v in self.dense.inputs), strict=True))
        chunks = [{renamed[name]: value for name, value in chunk.items()} for chunk in calibration.chunks]
        return Lane(self.dense, targets, chunks, pool, execution.runtime)


def by_level(points: Sequence[Point]) -> Iterator[tuple[int, list[Point]]]:
    """Points grouped by level, lowest first."""
    for level in sorted({point.level for point in points}):
        yield level, [point for point in points if point.level == level]
