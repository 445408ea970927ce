"""Bytes of weights in a file, against the files that onnx and zlib write."""

from __future__ import annotations

import importlib.util
import sys
import zlib

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_asr
from onnx_asr.targets.packing import FileUse, Packed, file_use
from tests.graphs import first_output, index, net

HAS_BROTLI = importlib.util.find_spec("brotli") is not None


def mostly_zero(share: float) -> onnx.ModelProto:
    draw = np.random.default_rng(0)
    weight = (draw.standard_normal((128, 64)) * (draw.random((128, 64)) >= share)).astype(np.float32)
    return net("g (float[N,128] x) => (float[N,64] y) { y = Gemm (x, w, b) }", w=weight, b=(64,))


def of(model: onnx.ModelProto) -> Packed:
    (weight,) = file_use(index(model)).weights
    return weight


def as_sparse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its first initializer as a sparse one."""
    dense = model.graph.initializer.pop(0)
    value = numpy_helper.to_array(dense).ravel()
    places = np.flatnonzero(value)
    values = numpy_helper.from_array(value[places], dense.name)
    positions = numpy_helper.from_array(places.astype(np.int64), f"{dense.name}_places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, positions, dense.dims))
    return model


def test_sizes_are_those_of_files() -> None:
    model = mostly_zero(0.9)
    weight, dense_bytes = of(model), model.ByteSize()
    content = model.graph.initializer[0].raw_data
    assert (weight.stored, weight.gzip) == (len(content), len(zlib.compress(content)))
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    before = first_output(model, x)
    sparse = as_sparse(model)
    assert weight.sparse == pytest.approx(sparse.ByteSize() - (dense_bytes - len(content)), abs=100)
    np.testing.assert_allclose(first_output(sparse, x), before, rtol=1e-5)


@pytest.mark.parametrize(("share", "smaller"), [(0.6, False), (0.7, True)])
def test_a_sparse_initializer_is_smaller_from_two_thirds_on(share: float, smaller: bool) -> None:
    model = mostly_zero(share)
    weight = of(model)
    assert (weight.sparse < weight.stored) == smaller
    assert file_use(index(model)).sparse_where_smaller == min(weight.sparse, weight.stored)


def test_brotli_is_measured_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (of(mostly_zero(0.9)).brotli is None) != HAS_BROTLI
    monkeypatch.setitem(sys.modules, "brotli", None)
    use = onnx_asr.inspect(mostly_zero(0.9), target="file").target
    assert isinstance(use, FileUse)
    assert (use.brotli, use.has_brotli, use.weights[0].smallest) == (None, False, "gzip")
