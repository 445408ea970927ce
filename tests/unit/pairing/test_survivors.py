"""Channels that another tool removed, or whose record was lost, told by their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_asr.channels.units import read_kept
from onnx_asr.errors import StructureError
from onnx_asr.networks.pair import Network, Pair
from onnx_asr.pairing.survivors import survivors
from onnx_asr.pruning.channels import prune_channels
from onnx_asr.pruning.options import ChannelPruneOptions
from onnx_asr.pruning.shrinking import shrink
from tests.graphs import (
    copy,
    dense_net,
    digit_images,
    digits,
    folded,
    index,
    net,
    pruned,
    random_net,
    recalibrated,
    residual_net,
)

NETS = {name: (lambda name=name: digits(name)) for name in ("resnet", "densenet", "mobilenet", "vgg")}
UNTOLD = "which channels it kept is unknown: .* the weights do not tell: "


def without_record(model: onnx.ModelProto) -> onnx.ModelProto:
    model = copy(model)
    del model.metadata_props[:]
    return model


def changed(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """A copy with every float constant of several values changed."""
    model = copy(model)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(value)).astype(np.float32), tensor.name))
    return model


def noisy(model: onnx.ModelProto, share: float, seed: int = 0) -> onnx.ModelProto:
    """A copy whose weights moved by a share of their standard deviation."""
    generator = np.random.default_rng(seed)
    return changed(model, lambda value: value + share * value.std() * generator.normal(size=value.shape))


def redrawn(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The same network after another training: as large weights, with nothing in common."""
    generator = np.random.default_rng(seed)
    return changed(model, lambda value: value.std() * generator.permutation(generator.normal(size=value.shape)))


def smaller(dense: onnx.ModelProto, sparsity: float = 0.4) -> onnx.ModelProto:
    return prune_channels(dense, ChannelPruneOptions(sparsity)).model


def same(pair: Pair, other: Pair) -> bool:
    kept, wanted = pair.kept, other.kept
    return kept.keys() == wanted.keys() and all(np.array_equal(kept[name][1], wanted[name][1]) for name in wanted)


def attempt(cut: onnx.ModelProto, dense: onnx.ModelProto) -> Pair | str:
    """The pair, or why there is none."""
    try:
        return Pair.of(cut, dense)
    except StructureError as error:
        return str(error)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fold", [False, True])
def test_the_channels_are_those_of_the_record(name: str, fold: bool) -> None:
    dense = folded(NETS[name]()) if fold else NETS[name]()
    cut = smaller(dense)
    pair, recorded = Pair.of(without_record(cut), dense), Pair.of(cut, dense)
    assert same(pair, recorded)
    assert pair.survivors is not None
    assert pair.survivors.difference == 0.0
    assert recorded.survivors is None
    assert pair.missing_metadata == {
        entry.key: entry.value for entry in cut.metadata_props if entry.key == "onnx_asr.kept_channels"
    }
    for point in pair.pruned.survey.layers:
        assert np.array_equal(pair.dense_weight(point), recorded.dense_weight(point))


@pytest.mark.parametrize("make", [residual_net, dense_net])
def test_small_networks(make: Callable[[], onnx.ModelProto]) -> None:
    dense = make()
    cut = smaller(dense)
    assert same(Pair.of(without_record(cut), dense), Pair.of(cut, dense))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: pruned(model, 0.7),
        lambda model: changed(model, lambda value: value.astype(np.float16)),
        lambda model: noisy(model, 0.05),
        lambda model: pruned(noisy(model, 0.05), 0.5),
        folded,
        lambda model: pruned(folded(model), 0.5),
    ],
    ids=["zeros", "float16", "fine-tuned", "fine-tuned, zeros", "folded", "folded, zeros"],
)
@pytest.mark.parametrize("name", ["resnet", "densenet", "mobilenet"])
def test_what_tools_do_afterwards_does_not_hide_them(
    name: str, change: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    dense = NETS[name]()
    cut = smaller(dense)
    pair, recorded = Pair.of(change(without_record(cut)), dense), Pair.of(cut, dense)
    assert all(np.array_equal(pair.kept[name][1], positions) for name, (_, positions) in recorded.kept.items())


def test_statistics_that_were_measured_again_do_not_hide_them() -> None:
    dense, generator = digits("mobilenet"), np.random.default_rng(0)
    cut = smaller(dense)
    other = without_record(cut)
    for node in other.graph.node:
        if node.op_type == "BatchNormalization":
            for tensor in other.graph.initializer:
                if tensor.name in node.input[3:5]:
                    value = numpy_helper.to_array(tensor)
                    tensor.CopyFrom(numpy_helper.from_array(generator.permutation(value), tensor.name))
    assert same(Pair.of(other, dense), Pair.of(cut, dense))


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_statistics_measured_again_and_folded(name: str, sparsity: float) -> None:
    """Each channel has got a factor."""
    dense = NETS[name]()
    cut = smaller(dense, sparsity)
    other = folded(recalibrated(without_record(cut), {"input": digit_images()[0][:64]}))
    recorded = Pair.of(cut, dense)
    for pair in (Pair.of(other, dense), Pair.of(pruned(other, 0.3), folded(dense))):
        common = pair.kept.keys() & recorded.kept.keys()
        assert len(common) > 5
        assert all(np.array_equal(pair.kept[tensor][1], recorded.kept[tensor][1]) for tensor in common)
        assert pair.notes[0].endswith("apart from a factor for each channel, equal the dense model's up to rounding")


def test_batchnorm_folded_in_the_dense_file_only() -> None:
    dense = digits("resnet")
    cut = smaller(dense)
    pair, recorded = Pair.of(without_record(cut), folded(dense)), Pair.of(cut, folded(dense))
    assert same(pair, recorded)


def test_a_record_that_does_not_fit_is_not_believed() -> None:
    dense = digits("resnet")
    cut = smaller(dense)
    wrong = without_record(cut)
    wrong.metadata_props.add(key="onnx_asr.kept_channels", value='{"renamed": [0, 1]}')
    assert same(Pair.of(wrong, dense), Pair.of(cut, dense))
    wrong.metadata_props[0].value = "{}"
    assert same(Pair.of(wrong, dense), Pair.of(cut, dense))


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int) -> None:
    """The channels of the record or, in the few graphs whose sizes leave them open, a refusal; never others."""
    dense = random_net(seed)
    cut = smaller(dense, 0.5)
    recorded = Pair.of(cut, dense)
    for variant in (without_record(cut), noisy(without_record(cut), 0.02, seed)):
        found = attempt(variant, dense)
        assert "the sizes do not tell" in found if isinstance(found, str) else same(found, recorded)


@pytest.mark.parametrize("seed", range(24))
def test_another_network_is_refused(seed: int) -> None:
    dense = random_net(seed)
    cut = without_record(smaller(dense, 0.5))
    with pytest.raises(StructureError, match=UNTOLD):
        Pair.of(cut, redrawn(dense, seed + 1))


@pytest.mark.parametrize("name", NETS)
def test_another_training_is_refused(name: str) -> None:
    dense = NETS[name]()
    cut = without_record(smaller(dense, 0.2))
    for other in (redrawn(dense, 1), noisy(dense, 2.0)):
        with pytest.raises(StructureError, match=UNTOLD + "(channel .* of )?node .*; give the dense file"):
            Pair.of(cut, other)


def test_weights_that_moved_too_far_are_refused() -> None:
    """Even where no other channel comes close."""
    dense = digits("resnet")
    with pytest.raises(StructureError, match=UNTOLD + "channel .* is none of the dense model's"):
        Pair.of(noisy(without_record(smaller(dense)), 0.6), dense)


TWO = "g (float[N,3,5,5] x) => (float[N,2,5,5] y) { a = Conv (x, v)  r = Relu (a)  y = Conv (r, w) }"


def two(v: np.ndarray, w: np.ndarray) -> onnx.ModelProto:
    return net(TWO, v=v.astype(np.float32), w=w.astype(np.float32))


def weights() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    return generator.normal(size=(6, 3, 1, 1)), generator.normal(size=(2, 6, 1, 1))


def kept_of(cut: onnx.ModelProto, dense: onnx.ModelProto) -> list[int]:
    return [int(position) for position in Pair.of(cut, dense).kept["a"][1]]


def test_twins_that_are_read_alike_are_the_same() -> None:
    v, w = weights()
    v[3], w[:, 3] = v[1], w[:, 1]
    assert kept_of(two(v[[0, 3, 4]], w[:, [0, 3, 4]]), two(v, w)) == [0, 1, 4]


def test_twins_that_are_read_differently_are_told_apart() -> None:
    v, w = weights()
    v[3] = v[1]
    assert kept_of(two(v[[0, 3, 4]], w[:, [0, 3, 4]]), two(v, w)) == [0, 3, 4]


def test_a_channel_between_two_that_are_almost_equal_is_refused() -> None:
    v, w = weights()
    v[3], w[:, 3] = v[1] * 1.02, w[:, 1] * 1.02
    between = 0.5 * (v[1] + v[3]), 0.5 * (w[:, 1] + w[:, 3])
    near, read = v[[0, 1, 4]], w[:, [0, 1, 4]]
    near[1], read[:, 1] = between
    with pytest.raises(StructureError, match=UNTOLD + "channel 1 of node .* could be channel [13] of the dense model"):
        Pair.of(two(near, read), two(v, w))


def test_another_order_is_refused() -> None:
    v, w = weights()
    with pytest.raises(StructureError, match=UNTOLD + "node .* in another order"):
        Pair.of(two(v[[4, 0, 3]], w[:, [4, 0, 3]]), two(v, w))


def test_a_channel_twice_is_refused() -> None:
    v, w = weights()
    with pytest.raises(StructureError, match=UNTOLD + "node .* the same channel of the dense model twice"):
        Pair.of(two(v[[0, 3, 3]], w[:, [0, 3, 3]]), two(v, w))


def test_outputs_cannot_have_lost_channels() -> None:
    v, w = weights()
    with pytest.raises(StructureError, match="'y' is an output of the model"):
        Pair.of(two(v[:4], w[:1, :4]), two(v, w))


def test_operators_that_mix_channels_are_named() -> None:
    v, w = weights()
    text = TWO.replace("r = Relu (a)", "r = LRN <size=3> (a)")
    cut = net(text, v=v[:4].astype(np.float32), w=w[:, :4].astype(np.float32))
    dense = net(text, v=v.astype(np.float32), w=w.astype(np.float32))
    with pytest.raises(
        StructureError, match="along axis 1 no channels can be missing: LRN:r: it is not known to keep channels apart"
    ):
        Pair.of(cut, dense)


def test_inputs_cannot_have_lost_channels() -> None:
    v, w = weights()
    with pytest.raises(StructureError, match=r"of shape \(4, 2, 1, 1\), .* along axis 1 no channels can be missing;"):
        Pair.of(two(v[:4, :2], w[:, :4]), two(v, w))


def test_one_channel_that_is_all_zero_is_found_by_its_readers() -> None:
    v, w = weights()
    some = v.copy()
    some[4] = 0.0
    assert kept_of(two(some[[0, 2, 4]], w[:, [0, 2, 4]]), two(v, w)) == [0, 2, 4]


def test_which_one_a_dead_channel_is_does_not_matter() -> None:
    """Neither made nor read by any weight; without those, nothing told it."""
    v, w = weights()
    some, read = v.copy(), w.copy()
    some[4], read[:, 4] = 0.0, 0.0
    assert kept_of(two(some[[0, 4, 5]], read[:, [0, 4, 5]]), two(v, w)) == [0, 1, 5]


def test_dense_channels_that_nothing_tells_apart_but_their_statistics_are_refused() -> None:
    text = """g (float[N,3,5,5] x) => (float[N,2,5,5] y) {
        a = Conv (x, v)  n = BatchNormalization (a, n_gamma, n_beta, n_mean, n_var)  y = Conv (n, w) }"""
    v, w = weights()
    v[3], w[:, 3] = v[1], w[:, 1]
    values = {"n_gamma": np.ones(6), "n_beta": np.zeros(6), "n_mean": np.arange(6.0), "n_var": np.ones(6)}
    values = {name: value.astype(np.float32) for name, value in (values | {"v": v, "w": w}).items()}
    rows = [0, 3, 4]
    cut = {name: value[:, rows] if name == "w" else value[rows] for name, value in values.items()}
    with pytest.raises(StructureError, match=UNTOLD + "channel 1 of node .* could be channel 1 of the dense model or"):
        Pair.of(net(text, **cut), net(text, **values))


@pytest.mark.parametrize("name", NETS)
def test_a_record_that_counts_the_channels_of_another_model_is_not_believed(name: str) -> None:
    """Of one whose own record was lost."""
    dense = NETS[name]()
    cut = smaller(without_record(smaller(dense, 0.3)), 0.3)
    assert read_kept(cut)
    pair = Pair.of(cut, dense)
    assert pair.survivors is not None
    assert same(pair, Pair.of(without_record(cut), dense))


def test_a_record_is_believed_where_the_weights_do_not_tell() -> None:
    dense = digits("vgg")
    cut = smaller(dense)
    for changed_since in (redrawn(cut, 1), noisy(cut, 0.6), pruned(cut, 0.9)):
        pair = Pair.of(changed_since, dense)
        assert pair.survivors is None
        assert same(pair, Pair.of(cut, dense))


def test_the_difference_is_that_of_the_weights() -> None:
    """Not that of shifts of almost nothing, which half precision rounds to something else."""
    dense = digits("mobilenet")
    cut = changed(without_record(smaller(dense)), lambda value: value + 1e-7 * (value.ndim == 1))
    found = Pair.of(cut, dense).survivors
    assert found is not None
    assert found.difference == 0.0
    half = changed(without_record(smaller(dense)), lambda value: value.astype(np.float16))
    assert 0.0 < Pair.of(half, dense).survivors.difference < 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("name", ["densenet", "mobilenet"])
@pytest.mark.parametrize("fold", [False, True])
def test_what_shrink_leaves_is_told(name: str, fold: bool, sparsity: float) -> None:
    """Of dead channels, whose constants went into the biases of what reads them."""
    dense = folded(NETS[name]()) if fold else NETS[name]()
    cut = shrink(pruned(dense, sparsity)).model
    assert read_kept(Pair.of(without_record(cut), dense).parameters.index.model).keys() == read_kept(cut).keys()


@pytest.mark.parametrize("flattening", ["Flatten", "Reshape"])
def test_several_inputs_per_channel(flattening: str) -> None:
    """Flatten before a fully connected layer."""
    call = "Flatten (a)" if flattening == "Flatten" else "Reshape (a, shape)"
    text = f"g (float[N,3,2,2] x) => (float[N,4] y) {{ a = Conv (x, v)  f = {call}  y = Gemm (f, w) }}"
    dense = net(text, v=(6, 3, 1, 1), w=(24, 4), shape=np.array([0, -1], np.int64), seed=2)
    cut = smaller(dense, 0.5)
    assert same(Pair.of(without_record(cut), dense), Pair.of(cut, dense))


def test_the_layers_of_a_pair_may_be_written_differently() -> None:
    """A MatMul and an Add in place of a Gemm."""
    gemm = "g (float[N,5] x) => (float[N,3] y) { a = Gemm <transB=1> (x, v, b)  r = Relu (a)  y = Gemm (r, w, c) }"
    product = (
        "g (float[N,5] x) => (float[N,3] y) { p = MatMul (x, v)  a = Add (p, b)  r = Relu (a)  y = Gemm (r, w, c) }"
    )
    dense = net(gemm, v=(8, 5), b=(8,), w=(8, 3), c=(3,), seed=1)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in dense.graph.initializer}
    rows = [1, 2, 5, 7]
    values |= {"v": values["v"][rows].T.copy(), "b": values["b"][rows], "w": values["w"][rows]}
    pair = Pair.of(net(product, **values), dense)
    assert pair.kept["a"][1].tolist() == rows


def test_equal_sizes_are_nobodys_business() -> None:
    dense = residual_net()
    assert survivors(index(pruned(dense, 0.5)), index(dense)) is None


def test_a_network_without_channels_left_open_keeps_its_first_error() -> None:
    v, w = weights()
    strided = net(TWO.replace("Conv (r", "Conv <strides=[2,2]> (r"), v=v.astype(np.float32), w=w.astype(np.float32))
    with pytest.raises(StructureError, match="has strides="):
        Pair.of(strided, two(v, w))


def test_the_note_says_how_close_the_weights_are() -> None:
    dense = digits("resnet")
    cut = without_record(smaller(dense))
    (note,) = Pair.of(cut, dense).notes
    assert "171 of 288 channels are left" in note
    assert note.endswith("their weights equal the dense model's")
    (note,) = Pair.of(noisy(cut, 0.05), dense).notes
    assert note.endswith("differ from the dense model's by 3.9%")
    assert Pair.between(Network.of(cut, "pruned", compared=True), index(dense)).notes
