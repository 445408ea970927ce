from __future__ import annotations

import numpy as np
import pytest

from onnx_asr.graph.layers import Layer, WeightLayout, is_channel_bias
from tests.graphs import LAYERS, copy, first_output, index, layer, parameter, set_parameter

LAYOUTS = [
    WeightLayout((6, 2, 3, 5), groups=3),
    WeightLayout((6, 2, 3, 5), groups=3, inputs_first=True),
    WeightLayout((4, 1, 3), groups=4),
    WeightLayout((5, 7)),
    WeightLayout((5, 7), inputs_first=True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_holds_every_weight_once_and_goes_back(layout: WeightLayout) -> None:
    stored = np.arange(np.prod(layout.shape)).reshape(layout.shape)
    forms = (
        (layout.to_rows(stored), layout.from_rows),
        (layout.to_blocks(stored), layout.from_blocks),
        (layout.to_patches(stored), layout.from_patches),
    )
    for form, back in forms:
        assert sorted(form.ravel()) == list(range(stored.size))
        np.testing.assert_array_equal(back(form), stored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_patches_order_the_blocks(layout: WeightLayout) -> None:
    """Blocks [G, O, I, k] are rows [G O, I k] and, with the last two axes swapped, patches [G, O, k I]."""
    stored = np.arange(np.prod(layout.shape)).reshape(layout.shape)
    blocks = layout.to_blocks(stored)
    assert blocks.shape == (layout.groups, layout.outputs, layout.inputs, layout.taps)
    np.testing.assert_array_equal(layout.to_rows(stored), blocks.reshape(layout.channels, -1))
    np.testing.assert_array_equal(layout.to_patches(stored), blocks.swapaxes(2, 3).reshape(*blocks.shape[:2], -1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_run_along_the_axes_that_the_layout_names(layout: WeightLayout) -> None:
    """One of the two axes holds the channels of one group, the other those of all groups."""
    for axis, blocks_axis, size in (
        (layout.input_axis, 2, layout.inputs),
        (layout.output_axis, 1, layout.outputs),
    ):
        along = np.arange(layout.shape[axis]).reshape([-1 if each == axis else 1 for each in range(len(layout.shape))])
        blocks = np.moveaxis(layout.to_blocks(np.broadcast_to(along, layout.shape)), blocks_axis, 1)
        first = np.arange(layout.groups) * (size if layout.shape[axis] == layout.groups * size else 0)
        expected = (first[:, None] + np.arange(size))[:, :, None, None]
        np.testing.assert_array_equal(blocks, np.broadcast_to(expected, blocks.shape))


def test_patches_have_the_channels_of_a_tap_side_by_side() -> None:
    weight = np.array([[[10, 11], [20, 21], [30, 31]]])  # three channels, two taps
    assert WeightLayout(weight.shape).to_patches(weight).tolist() == [[[10, 20, 30, 11, 21, 31]]]


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_channel_is_read_by_its_own_blocks_alone(name: str) -> None:
    """Zeros in blocks [g, :, i] do what zeros in input channel g I + i do."""
    model, x, point = layer(name)
    layout, axis = point.layer.layout, point.layer.input_axis
    for channel in range(layout.groups * layout.inputs):
        blocks = layout.to_blocks(parameter(model, *point.weight)).copy()
        blocks[channel // layout.inputs, :, channel % layout.inputs] = 0.0
        unread, silent = copy(model), x.copy()
        set_parameter(unread, *point.weight, layout.from_blocks(blocks))
        np.moveaxis(silent, axis, 0)[channel] = 0.0
        np.testing.assert_allclose(first_output(unread, x), first_output(model, silent), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_point_carries_the_layer_of_its_node(name: str) -> None:
    model, _, point = layer(name)
    assert Layer.of(index(model), point.node) == point.layer


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((6,), -1, True),
        ((1,), -1, True),
        ((), -1, True),
        ((5,), -1, False),
        ((1, 6), -1, True),
        ((6, 1), -1, False),
        ((6, 1), -2, True),
        ((1, 6, 1, 1), -3, True),
        ((1, 1, 1, 1), -3, True),
        ((1, 6, 1, 2), -3, False),
        ((2, 6, 1, 1), -3, False),
        ((6,), -3, False),
        ((1,), -3, False),
    ],
)
def test_a_channel_bias_has_one_value_per_channel_or_one_for_all(
    shape: tuple[int, ...], axis: int, expected: bool
) -> None:
    assert is_channel_bias(np.ones(shape, np.float32), 6, axis) == expected
