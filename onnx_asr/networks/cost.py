"""Cost of a network: parameters, operations, bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx

from onnx_asr.arrays import Array
from onnx_asr.graph.index import FLOAT_TYPES, GraphIndex, node_reads, subgraphs
from onnx_asr.graph.tensors import content_of, is_left, size_of, value_of
from onnx_asr.networks.operations import Operations, Probe

_NAMED = 3  # of initializers that nothing reads
_FAST = 1  # zlib level: enough to see what zeros are worth


@dataclass(frozen=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: Elements of all floating-point constants that the network reads.
        nonzeros: Those that are not zero.
        flops: Two per multiplication of a convolution or a matrix product, of weights and of activations, for one
            input (see :mod:`onnx_asr.networks.operations`); None where not all are known. Products with zero count.
        nonzero_flops: Those without a weight that is zero: what a sparse kernel would do.
        size: Bytes of the model with its weights.
        compressed: Compressed bytes (deflate, as in gzip).
        unknown: Why FLOPs are not known, and what would help; None where they are.
    """

    parameters: int
    nonzeros: int
    flops: int | None
    nonzero_flops: int | None
    size: int
    compressed: int
    unknown: str | None


def cost(index: GraphIndex, probe: Probe) -> Cost:
    """Parameters, operations and bytes of a network.

    Raises:
        OptionError: When a shape of the probe does not fit the network.
        ModelError: When shape inference fails.
    """
    parameters = nonzeros = 0
    for value in _float_constants(index):
        parameters += value.size
        nonzeros += int(np.count_nonzero(value))
    done = Operations.of(index, probe)
    flops, nonzero_flops = (done.total, done.nonzero) if done.gap is None else (None, None)
    size, compressed = byte_size(index.model), compressed_size(index.model)
    return Cost(parameters, nonzeros, flops, nonzero_flops, size, compressed, done.gap)


def _float_constants(index: GraphIndex) -> Iterator[Array]:
    """Every floating-point constant that a node reads, and those stored in subgraphs."""
    for name in {name for node in index.nodes for name in node_reads(node) if index.is_constant(name)}:
        if index.element_type(name) in FLOAT_TYPES:
            yield index.value(name)
    for tensor in (tensor for node in index.nodes for graph in subgraphs(node) for tensor in _initializers(graph)):
        if tensor.data_type in FLOAT_TYPES:
            yield value_of(tensor)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _initializers(inner)


def byte_size(model: onnx.ModelProto) -> int:
    """Bytes of a model with its weights, those left in their file included."""
    return int(model.ByteSize()) + sum(size_of(tensor) for tensor in model.graph.initializer if is_left(tensor))


def leftovers(index: GraphIndex) -> dict[str, onnx.TensorProto]:
    """Initializers that no node reads and that are no output, by name, in file order."""
    known = {name: tensor.values for name, tensor in index.sparse.items()} | index.initializers
    used = {*index.consumers, *index.outputs}
    return {name: tensor for name, tensor in known.items() if name not in used}


def leftover_note(index: GraphIndex) -> tuple[str, ...]:
    """A note on initializers that nothing reads, where there are any, as some tools leave the weights they replace."""
    found = leftovers(index)
    if not found:
        return ()
    size = sum(size_of(tensor) if is_left(tensor) else tensor.ByteSize() for tensor in found.values())
    named = ", ".join(list(found)[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    return (
        f"{len(found)} initializers ({size:,} bytes) that no node reads are left in the file: {named}; a simplifier "
        "such as onnxslim or onnxsim removes them",
    )


def compressed_size(model: onnx.ModelProto) -> int:
    """Size after deflate, part by part, as a model over 2 GB cannot be serialized as one."""
    packer = zlib.compressobj(_FAST)
    shell = onnx.ModelProto(metadata_props=model.metadata_props, opset_import=model.opset_import)
    for name in ("input", "output", "value_info"):
        getattr(shell.graph, name).extend(getattr(model.graph, name))
    parts = (shell, *model.graph.node, *model.graph.initializer, *model.graph.sparse_initializer)
    left = (content_of(tensor) for tensor in model.graph.initializer if is_left(tensor))
    contents = chain((part.SerializeToString() for part in parts), left)
    return sum(len(packer.compress(content)) for content in contents) + len(packer.flush())
