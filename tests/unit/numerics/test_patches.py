"""Patches of convolutions against naive loops over onnx's definition, and sampled positions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_asr.numerics.patches import (
    ConvGeometry,
    ConvRows,
    MatrixRows,
    gather_outputs,
    gather_patches,
    input_positions,
    sample_positions,
    weighted_positions,
)


def naive_patches(tensor: np.ndarray, geometry: ConvGeometry, output_shape: tuple[int, ...]) -> np.ndarray:
    """[N, outputs, C, taps]: the input value at every tap; scattered for transposed convolutions."""
    spatial = tensor.shape[2:]
    outputs = list(itertools.product(*map(range, output_shape)))
    taps = list(itertools.product(*map(range, geometry.kernel)))
    result = np.zeros((*tensor.shape[:1], len(outputs), tensor.shape[1], len(taps)), np.float32)
    number = {place: count for count, place in enumerate(outputs)}
    if geometry.transposed:
        for place in itertools.product(*map(range, spatial)):
            for column, tap in enumerate(taps):
                target = tuple(
                    s * i + d * k - p
                    for s, i, d, k, p in zip(
                        geometry.strides, place, geometry.dilations, tap, geometry.pads, strict=True
                    )
                )
                if target in number:
                    result[:, number[target], :, column] = tensor[(slice(None), slice(None), *place)]
        return result
    for row, place in enumerate(outputs):
        for column, tap in enumerate(taps):
            source = tuple(
                s * o + d * k - p
                for s, o, d, k, p in zip(geometry.strides, place, geometry.dilations, tap, geometry.pads, strict=True)
            )
            if all(0 <= i < size for i, size in zip(source, spatial, strict=True)):
                result[:, row, :, column] = tensor[(slice(None), slice(None), *source)]
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]]:
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    geometry = ConvGeometry(
        each(1, 3), each(1, 3), each(1, 2), each(0, 2), draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    )
    return geometry, each(1, 5), each(1, 5)


@given(case=cases(), seed=st.integers(0, 99))
def test_patches_are_what_the_taps_meet(case: tuple[ConvGeometry, tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    geometry, input_shape, output_shape = case
    generator = np.random.default_rng(seed)
    tensor = generator.normal(size=(2, 4, *input_shape)).astype(np.float32)
    everything = naive_patches(tensor, geometry, output_shape)
    count = int(generator.integers(1, 4))
    positions = generator.integers(0, np.prod(output_shape), (2, count))
    table = input_positions(geometry, input_shape, output_shape)
    actual = gather_patches(tensor, table, positions, geometry.groups)
    taps = int(np.prod(geometry.kernel))
    assert table.shape == (np.prod(output_shape), taps)
    assert ((table >= -1) & (table < np.prod(input_shape))).all()
    assert actual.dtype == np.float32
    assert actual.shape == (2 * count, geometry.groups, taps * 4 // geometry.groups)
    for image, place in itertools.product(range(2), range(count)):
        patch = everything[image, positions[image, place]].reshape(geometry.groups, -1, taps)  # [G, C / G, taps]
        expected = patch.swapaxes(1, 2).reshape(geometry.groups, -1)
        np.testing.assert_array_equal(actual[count * image + place], expected)


def test_outputs_are_taken_at_the_same_positions() -> None:
    tensor = np.arange(2 * 3 * 4.0).reshape(2, 3, 2, 2)
    positions = np.array([[0, 3], [2, 2]])
    expected = [[0, 4, 8], [3, 7, 11], [14, 18, 22], [14, 18, 22]]
    np.testing.assert_array_equal(gather_outputs(tensor, positions), expected)


@given(images=st.integers(1, 20), size=st.integers(1, 60), rows=st.integers(1, 400), seed=st.integers(0, 9))
def test_positions_are_spread_over_every_image(images: int, size: int, rows: int, seed: int) -> None:
    positions = sample_positions(images, size, rows, (seed, 1))
    assert len(positions) == images
    assert positions.size <= max(rows, images)
    assert positions.min() >= 0
    assert positions.max() < size
    per_image = positions.shape[1]
    assert per_image == min(size, max(1, rows // images))
    for row in positions:
        assert (np.diff(row) >= 0).all()
        # one in each of equal runs: no gap is longer than two of them
        assert np.diff(np.concatenate([[-1], row, [size]])).max() <= 2 * size / per_image + 1
    np.testing.assert_array_equal(positions, sample_positions(images, size, rows, (seed, 1)))
    if per_image < size // 2 and images > 5:
        assert not np.array_equal(positions, sample_positions(images, size, rows, (seed, 2)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_image", [1, 4, 36])
def test_rows_of_a_chunk_are_taken_in_any_pieces(groups, per_image):
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((5, 4, 6, 6)).astype(np.float32)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups, False)
    table = input_positions(geometry, (6, 6), (6, 6))
    positions = sample_positions(5, 36, 5 * per_image, (0,))
    chunk = ConvRows(tensor, table, positions, groups)
    whole = gather_patches(tensor, table, positions, groups)
    assert chunk.shape == whole.shape
    for begin in range(0, len(whole), 3):
        for end in (begin + 1, begin + 5, len(whole)):
            rows = slice(begin, min(end, len(whole)))
            out = np.full(whole[rows].shape, np.nan, np.float32)
            chunk.take(rows, out)
            np.testing.assert_array_equal(out, whole[rows])
    pieces = list(chunk.pieces())
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, len(whole))
    np.testing.assert_array_equal(chunk.of(tensor), gather_outputs(tensor, positions))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_matrix_are_taken_in_any_pieces(transposed):
    tensor = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
    rows = np.array([0, 5, 6, 11])
    expected = (np.swapaxes(tensor, 1, 2) if transposed else tensor).reshape(-1, 7 if transposed else 4)[rows]
    chunk = MatrixRows(tensor, rows, transposed)
    assert chunk.shape == (4, 1, expected.shape[1])
    out = np.full((2, *chunk.shape[1:]), np.nan, np.float32)
    chunk.take(slice(1, 3), out)
    np.testing.assert_array_equal(out[:, 0], expected[1:3])
    np.testing.assert_array_equal(chunk.of(tensor), expected)
    assert sum(piece.stop - piece.start for piece in chunk.pieces()) == 4


def test_weighted_positions_follow_the_shares() -> None:
    generator = np.random.default_rng(0)
    shares = generator.uniform(0, 1, (3, 40)) ** 4
    shares /= shares.sum(axis=1, keepdims=True)
    shares[1] = np.eye(40)[7]
    positions = weighted_positions(shares, 60, (1, 2))
    assert positions.shape == (3, 20)
    assert set(positions[1]) == {7}
    np.testing.assert_array_equal(positions, weighted_positions(shares, 60, (1, 2)))
    counts = sum(np.bincount(weighted_positions(shares, 60, (0, k))[0], minlength=40) for k in range(500))
    np.testing.assert_allclose(counts / counts.sum(), shares[0], atol=0.004)
    assert np.abs(np.bincount(positions[0], minlength=40) - 20 * shares[0]).max() < 1.5  # strata: not all at random
    assert weighted_positions(shares, 10**6, (1, 2)).shape == (3, 40)  # as many as there are, some repeatedly
