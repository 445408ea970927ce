"""Arrays, feeds and readers as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_asr.data import PRESETS, InputSpec, Preprocessing, open_data
from onnx_asr.errors import DataError, OptionError
from tests.unit.data.samples import ANY, FLOAT, RGB8, UNIT, VECTOR, pixels, write_image


class Reader:
    """A CalibrationDataReader by structure; it reuses one buffer."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self.buffer = np.zeros((2, 4), np.float32)

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self.values:
            return None
        self.buffer[:] = self.values.pop(0)
        self.buffer[1] += 0.5
        return {"x": self.buffer}


def test_npz_of_images(tmp_path: Path) -> None:
    images = pixels(4, 8, 8, 3)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([[3], [1], [2], [0]], np.uint8), extra=np.arange(2))
    dataset = open_data(tmp_path / "d.npz", [RGB8], preprocessing=PRESETS["raw"])
    assert dataset.names == ("#0", "#1", "#2", "#3")
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [3, 1, 2, 0]
    assert np.array_equal(dataset.batch(np.array([2, 0]))["input"], images[[2, 0]].transpose(0, 3, 1, 2))
    thumbnail = dataset.thumbnail(1)
    assert thumbnail is not None
    assert np.array_equal(np.asarray(thumbnail), images[1])


def test_npz_image_and_the_same_image_in_a_file_are_one(tmp_path: Path) -> None:
    array = pixels(40, 50, 3)
    write_image(tmp_path / "images" / "a.png", array)
    steps = Preprocessing(resize=20, crop=16, scale=1 / 255)
    from_file = open_data(tmp_path / "images", [ANY], preprocessing=steps)
    from_array = open_data({"images": array[None]}, [ANY], preprocessing=steps)
    assert from_file.digest([0]) == from_array.digest([0])


def test_input_called_images() -> None:
    spec = InputSpec("images", FLOAT, (None, 3, 8, 8))
    ready = np.ones((2, 3, 8, 8), np.float32)
    assert np.array_equal(open_data({"images": ready}, [spec]).batch([0, 1])["images"], ready)
    assert open_data({"images": pixels(2, 8, 8, 3)}, [spec], preprocessing=UNIT).load(0)["images"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((2, 8, 8, 3), np.float32),
            r"images of float32 in shape \(2, 8, 8, 3\): give uint8 in \(N, H, W\)",
        ),
        (pixels(2, 3, 8, 8), r"images of uint8 in shape \(2, 3, 8, 8\)"),
        (pixels(8, 8), r"images of uint8 in shape \(8, 8\).*under the name of the model's input, 'input'"),
        (pixels(0, 8, 8, 3), r"in shape \(0, 8, 8, 3\), which is empty"),
    ],
)
def test_image_arrays_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data({"images": images}, [RGB8], preprocessing=UNIT)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 10), int), r"labels of int64 in shape \(2, 10\): give class indices"),
        (np.zeros(2), r"labels of float64 in shape \(2,\)"),
        (np.array([0, -1]), r"labels of int64.*from 0 up"),
        (np.zeros(3, int), r"3 labels for 2 samples"),
    ],
)
def test_labels_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data({"images": pixels(2, 8, 8, 3), "labels": labels}, [RGB8], preprocessing=UNIT)
    with pytest.raises(DataError, match=message):
        open_data({"x": np.zeros((2, 4), np.float32), "labels": labels}, [VECTOR])


def test_ready_tensors(tmp_path: Path) -> None:
    x, y = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(3, dtype=np.int64)
    count = InputSpec("n", np.dtype(np.int64), (None,))
    np.savez(tmp_path / "d.npz", x=x, n=y, labels=[2, 1, 0])
    np.save(tmp_path / "x.npy", x)
    dataset = open_data(tmp_path / "d.npz", [VECTOR, count])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 1, 0]
    assert dataset.preprocessing is None
    assert dataset.thumbnail(0) is None
    batch = dataset.batch([2, 0])
    assert list(batch) == ["x", "n"]
    assert np.array_equal(batch["x"], x[[2, 0]])
    assert batch["n"].tolist() == [2, 0]
    sources: list[Any] = [tmp_path / "x.npy", x, {"x": x}, [{"x": x[:2]}, {"x": x[2:]}]]
    for source in sources:
        dataset = open_data(source, [VECTOR])
        assert len(dataset) == 3
        assert dataset.load(2)["x"].tolist() == [8, 9, 10, 11]
        assert dataset.digest([0, 2]) == open_data(x, [VECTOR]).digest([0, 2])
    assert dataset.digest([0, 2]) != dataset.digest([2, 0])


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (np.float64, np.float32),
        (np.float32, np.float16),
        (np.float16, np.float32),
        (np.int64, np.int32),
        (bool, np.uint8),
        (bool, bool),
        (">f4", "<f4"),
    ],
)
def test_casts_that_keep_values(have: Any, want: Any) -> None:
    spec = InputSpec("x", np.dtype(want), (None, 4))
    value = open_data(np.array([[0, 1, 1, 0]], have), [spec]).load(0)["x"]
    assert value.dtype == np.dtype(want)
    assert value.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("value", "want", "message"),
    [
        (np.zeros((1, 4)), np.int64, r"array of float64 for model input 'x', which expects int64: convert it"),
        (np.zeros((1, 4), complex), np.float32, r"array of complex128"),
        (np.array([["a"] * 4]), np.float32, r"array of <U1"),
        (np.array([[1, 2, 3, None]]), np.float32, r"array of object"),
        (np.array([[1, 2, 3, 300]]), np.uint8, r"sample #0 has values from 1 to 300, which uint8.*cannot hold"),
        (
            np.array([[0, 0, 0, 7]]),
            np.float32,
            r"int64 for model input 'x', which expects float32, .* pass --preset",
        ),
        (
            np.ones((1, 4), np.uint8),
            np.float16,
            r"uint8 for model input 'x', which expects float16, .* pass --preset",
        ),
        (
            np.ones((1, 4), bool),
            np.float32,
            r"bool for model input 'x', which expects float32, .* pass --preset",
        ),
        (np.full((1, 4), 1e5), np.float16, r"sample #0 has values from 100000.0 to 100000.0, which float16"),
        (np.array([[0, 0, 0, np.nan]]), np.float32, r"sample #0 has NaN or infinite values for model input 'x'"),
        (np.array([[0, 0, 0, np.inf]], np.float32), np.float32, r"sample #0 has NaN or infinite values"),
    ],
)
def test_values_refused(value: np.ndarray, want: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(value, [InputSpec("x", np.dtype(want), (None, 4))]).load(0)


@pytest.mark.parametrize("have", [np.uint8, np.int16, np.int64, bool])
def test_whole_numbers_are_scaled_as_pixels_are(have: Any) -> None:
    values = pixels(2, 3, 8, 8).astype(have)
    steps = Preprocessing(scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    dataset = open_data({"input": values}, [RGB8], preprocessing=steps)
    mean, std = (np.array(numbers).reshape(3, 1, 1) for numbers in (steps.mean, steps.std))
    expected = ((values.astype(np.float64) * (1 / 255) - mean) / std).astype(np.float32)
    batch = dataset.batch([0, 1])["input"]
    assert batch.dtype == np.float32
    np.testing.assert_array_equal(batch, expected)
    assert dataset.preprocessing == steps
    if have is np.uint8:
        images = open_data({"images": np.moveaxis(values, 1, -1)}, [RGB8], preprocessing=steps)
        np.testing.assert_array_equal(batch, images.batch([0, 1])["input"])
        np.testing.assert_array_equal(batch, open_data(values, [RGB8], preprocessing=steps).batch([0, 1])["input"])
    last = InputSpec("input", FLOAT, (None, 8, 8, 3))
    turned = open_data([{"input": np.moveaxis(values, 1, -1)}], [last], preprocessing=steps).batch([0, 1])["input"]
    np.testing.assert_array_equal(np.moveaxis(turned, -1, 1), expected)


def test_only_whole_numbers_for_floats_are_scaled() -> None:
    count, steps = InputSpec("n", np.dtype(np.int64), (None,)), Preprocessing(scale=2.0, mean=(1.0,))
    feed = {"x": np.ones((1, 4), np.int8), "n": np.array([5])}
    sample = open_data([feed], [VECTOR, count], preprocessing=steps).load(0)
    assert sample["x"].tolist() == [1.0] * 4
    assert sample["n"] == 5
    with pytest.raises(OptionError, match="holds ready tensors, to which the given preprocessing does not apply"):
        open_data([{**feed, "x": np.ones((1, 4), np.float32)}], [VECTOR, count], preprocessing=steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (Preprocessing(mean=(1.0,)), "pass --preset, or --scale"),
        (PRESETS["imagenet"], "are not resized, cropped or padded"),
        (Preprocessing(scale=1.0, resize=9), "are not resized, cropped or padded"),
        (Preprocessing(scale=1.0, channel_order="BGR"), "drop --channel-order"),
        (Preprocessing(scale=1.0, mean=(1.0, 2.0, 3.0), layout="NHWC"), "have no 3 channels"),
    ],
)
def test_other_steps_do_not_apply_to_whole_numbers(steps: Preprocessing, message: str) -> None:
    with pytest.raises((DataError, OptionError), match=message):
        open_data({"input": pixels(2, 3, 8, 8)}, [RGB8], preprocessing=steps)
    fitting = Preprocessing(scale=1.0, resize=9, crop=8)  # as of a preset that made these tensors
    assert len(open_data({"input": pixels(2, 3, 8, 8)}, [RGB8], preprocessing=fitting)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"y": np.zeros((1, 4))}, r"holds 'y', the model's inputs are 'n', 'x': give exactly one array per input"),
        (
            {"x": np.zeros((1, 4)), "n": np.zeros(1), "z": np.zeros(1)},
            r"holds 'n', 'x', 'z', the model's inputs are 'n', 'x'",
        ),
        ({"x": np.zeros((2, 4)), "n": np.zeros(3)}, r"different numbers of samples: 2 for 'x', 3 for 'n'"),
        ({"x": np.zeros(4), "n": np.zeros(4)}, r"shape \(4,\) for model input 'x', which expects \(4\) per sample"),
        ({"x": np.zeros((1, 5)), "n": np.zeros(1)}, r"shape \(1, 5\) for model input 'x'"),
        ({"x": np.zeros((1, 4)), "n": np.float32(3)}, r"shape \(\) for model input 'n'"),
        ({"x": np.zeros((0, 4)), "n": np.zeros(0)}, r"the data holds no samples"),
        ({"x": [[1, 2], [3]], "n": np.zeros(1)}, r"the data: 'x' is not an array"),
        ([{"x": np.zeros((1, 4)), "n": np.zeros(1)}, {"x": np.zeros((1, 4))}], r"feed 1 of the data holds 'x'"),
        ([np.zeros((1, 4))], r"feed 0 of the data is of type ndarray: give a dict"),
        ([], r"holds no samples"),
        (np.zeros((1, 4)), r"is one array, but the model has the inputs 'x', 'n'"),
        (7, r"the data are of type int: give a path, an array"),
    ],
)
def test_feeds_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(source, [VECTOR, InputSpec("n", FLOAT, (None,))])


def test_preprocessing_does_not_go_with_ready_tensors() -> None:
    with pytest.raises(OptionError, match=r"ready tensors, to which the given preprocessing does not apply: drop it"):
        open_data(np.zeros((2, 3, 8, 8), np.float32), [RGB8], preprocessing=UNIT)


def test_reader_and_generator_are_read_once_and_copied() -> None:
    dataset = open_data(Reader([1, 2, 3]), [VECTOR])
    assert len(dataset) == 6
    assert dataset.batch([0, 1, 2, 5])["x"][:, 0].tolist() == [1, 1.5, 2, 3.5]

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        buffer = np.zeros((1, 4))
        for value in range(3):
            buffer[:] = value
            yield {"x": buffer}

    dataset = open_data(feeds(), [VECTOR])
    assert dataset.batch([2, 1])["x"][:, 0].tolist() == [2, 1]
    with pytest.raises(DataError, match=r"holds no samples: give at least one .and rewind"):
        open_data(Reader([]), [VECTOR])


def test_feeds_of_different_sizes() -> None:
    feeds = [{"input": np.zeros((2, 3, 8, 8))}, {"input": np.zeros((1, 3, 9, 8))}]
    dataset = open_data(feeds, [ANY])
    assert dataset.batch([0, 1])["input"].shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match=r"#1 is \(3, 8, 8\), #2 is \(3, 9, 8\)"):
        dataset.batch([1, 2])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
def test_pickles_and_broken_archives_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    value = np.array([Bomb()], object)
    if name == "d.npz":
        np.savez(path, x=value)
    else:
        np.save(path, value, allow_pickle=True)
    message = r"cannot read arrays from .*d\.np.: .*pickled Python objects are refused"
    with pytest.raises(DataError, match=message):
        open_data(path, [VECTOR])
    assert "unpickled" not in capsys.readouterr().out
    for content in (b"", b"garbage", b"PK\x03\x04garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_data(path, [VECTOR])
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DataError, match=r"another kind of file, .* begins with b'version https"):
        open_data(path, [VECTOR])


def test_an_open_dataset_is_returned_as_it_is() -> None:
    dataset = open_data(np.zeros((2, 4), np.float32), [VECTOR])
    assert open_data(dataset, [RGB8], preprocessing=UNIT) is dataset
