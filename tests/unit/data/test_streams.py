"""Data of other libraries, by twins that can do what the real ones can; tests/integration has the real ones."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_asr.data import InputSpec, Preprocessing, open_data
from onnx_asr.errors import DataError, OptionError
from tests.unit.data.samples import ANY, FLOAT, RGB8, UNIT, VECTOR, pixels

PHOTOS = pixels(6, 8, 8, 3)
CLASSES = np.array([3, 1, 2, 0, 1, 5])
EXPECTED = open_data({"images": PHOTOS}, [RGB8], preprocessing=UNIT).batch(range(6))["input"]
LAST = InputSpec("input", FLOAT, (None, 8, 8, 3))


class Tensor:
    """A tensor of torch: with a gradient on a device, it gives no array before it is detached and copied."""

    def __init__(self, values: np.ndarray, ready: int = 0) -> None:
        self.values, self.ready = values, ready

    def detach(self) -> Tensor:
        return Tensor(self.values, self.ready + 1)

    def cpu(self) -> Tensor:
        return Tensor(self.values, self.ready + 1)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.ready < 2:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")
        return self.values


class MapStyle:
    """A data set of torch: positions and a length, no iterator; it counts what is read."""

    def __init__(self, items: Any, **attributes: Any) -> None:
        self.items, self.read = list(items), []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        self.read.append(index)
        return self.items[index]


class Columns(MapStyle):
    """A data set of Hugging Face: rows by number, columns by name."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows, column_names=list(rows[0]))

    def __getitem__(self, index: Any) -> Any:
        return [row[index] for row in self.items] if isinstance(index, str) else super().__getitem__(index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


class Loader:
    """A loader of torch or a tf.data.Dataset: batches again and again, the number of them, no positions."""

    def __init__(self, batches: Any) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def photo(index: int) -> Image.Image:
    return Image.fromarray(PHOTOS[index])


def rows() -> list[dict[str, Any]]:
    return [{"image": photo(index), "label": int(CLASSES[index])} for index in range(6)]


def planes(start: int, stop: int) -> np.ndarray:
    """Pixels with channels first, as torchvision reads them."""
    return np.ascontiguousarray(np.moveaxis(PHOTOS[start:stop], 3, 1))


SOURCES: dict[str, Any] = {
    "a data set of Hugging Face": lambda: Columns(rows()),
    "a stream of rows": lambda: iter(rows()),
    "rows with img": lambda: Loader({"img": photo(index), "box": [1.0]} for index in range(6)),
    "rows with another column": lambda: Loader({"scan": photo(index), "name": "a"} for index in range(6)),
    "a batch of rows": lambda: [{"image": [photo(0), photo(1)]}, {"image": [photo(index) for index in range(2, 6)]}],
    "images": lambda: [photo(index) for index in range(6)],
    "a data set of images and classes": lambda: MapStyle([(photo(index), 0) for index in range(6)]),
    "arrays of one image": lambda: (PHOTOS[index] for index in range(6)),
    "batches of images": lambda: Loader([PHOTOS[:4], PHOTOS[4:]]),
    "batches with classes": lambda: Loader([(PHOTOS[:4], CLASSES[:4]), (PHOTOS[4:], CLASSES[4:])]),
    "tensors of pixels": lambda: Loader([Tensor(planes(0, 4)), Tensor(planes(4, 6))]),
    "one tensor of pixels a position": lambda: MapStyle(
        [(Tensor(planes(index, index + 1)[0]), 0) for index in range(6)]
    ),
    "batches of Ultralytics": lambda: Loader(
        {"img": Tensor(planes(start, start + 3)), "cls": np.zeros((9, 1)), "im_file": ["a.jpg"]} for start in (0, 3)
    ),
    "one tensor": lambda: Tensor(planes(0, 6)),
    "feeds": lambda: [{"input": Tensor(planes(0, 6))}],
    "positions that hold batches": lambda: MapStyle([planes(0, 3), planes(3, 6)]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pixels_of_every_source_become_the_same_inputs(name: str) -> None:
    dataset = open_data(SOURCES[name](), [RGB8], preprocessing=UNIT)
    assert len(dataset) == 6
    np.testing.assert_array_equal(dataset.batch([5, 0, 3])["input"], EXPECTED[[5, 0, 3]])
    assert not dataset.is_cut


def test_images_are_cropped_whatever_gives_them() -> None:
    large = [Image.fromarray(image) for image in pixels(3, 12, 20, 3, seed=1)]
    steps = Preprocessing(scale=1 / 255, resize=10, crop=8)
    expected = open_data({"images": np.stack([np.asarray(image) for image in large])}, [RGB8], preprocessing=steps)
    for source in (large, MapStyle(large), Columns([{"image": image} for image in large])):
        dataset = open_data(source, [RGB8], preprocessing=steps)
        assert dataset.digest([2, 0, 1]) == expected.digest([2, 0, 1])
        assert dataset.thumbnail(1) is not None


def test_floats_are_used_as_they_are() -> None:
    values = EXPECTED
    pairs = [(Tensor(values[index]), int(CLASSES[index])) for index in range(6)]
    for source in (
        MapStyle(pairs),
        Loader([(values[:5], CLASSES[:5]), (values[5:], CLASSES[5:])]),
        Loader([[Tensor(values[:3])], [Tensor(values[3:])]]),
        iter(values),
        Columns([{"input": list(map(list, value)), "label": 0} for value in values]),
        Columns([{"pixel_values": value} for value in values]),
    ):
        np.testing.assert_array_equal(open_data(source, [RGB8]).batch(range(6))["input"], values)
    turned = np.moveaxis(values, 1, 3)
    np.testing.assert_array_equal(open_data(Loader([turned]), [LAST]).batch(range(6))["input"], turned)
    with pytest.raises(OptionError, match="sample #0 of the data holds ready tensors, to which the given"):
        open_data(MapStyle(pairs), [RGB8], preprocessing=UNIT)


def test_classes_come_with_the_samples() -> None:
    def labels(source: Any) -> list[int] | None:
        found = open_data(source, [RGB8], preprocessing=UNIT).labels
        return None if found is None else found.tolist()

    wanted = CLASSES.tolist()
    assert labels(Columns(rows())) == wanted
    assert labels(iter(rows())) == wanted
    images = [photo(index) for index in range(6)]
    assert labels(MapStyle(images, targets=wanted)) == wanted
    assert labels(MapStyle(images, targets=[[1.0]] * 6)) is None
    assert labels(Loader([(PHOTOS[:4], CLASSES[:4, None]), (PHOTOS[4:], CLASSES[4:, None])])) == wanted
    assert labels(Loader([(PHOTOS[:4], CLASSES[:4]), (PHOTOS[4:], None)])) is None
    assert labels(Loader([(PHOTOS, [{"boxes": 1}])])) is None
    assert labels(Loader([(PHOTOS, CLASSES.astype(float))])) is None


def test_positions_are_read_when_they_are_needed() -> None:
    source = MapStyle([photo(index) for index in range(6)])
    dataset = open_data(source, [RGB8], preprocessing=UNIT, most=2)
    assert len(dataset) == 6
    source.read.clear()
    dataset.batch([4, 2])
    assert source.read == [4, 2]
    sent = pickle.loads(pickle.dumps(dataset))
    assert sent.digest([1]) == dataset.digest([1])


def test_a_stream_is_read_as_far_as_samples_are_needed() -> None:
    read = []

    def endless() -> Iterator[Any]:
        for number in itertools.count():
            read.append(number)
            yield {"x": np.full((2, 4), number, np.float32)}

    dataset = open_data(endless(), [VECTOR], most=5)
    assert (len(dataset), len(read), dataset.is_cut) == (6, 3, True)
    feeds = [{"x": np.zeros((2, 4), np.float32)} for _ in range(5)]
    assert len(open_data(feeds, [VECTOR], most=3)) == 10  # it is in memory anyway
    short = open_data(iter(feeds), [VECTOR], most=11)
    assert (len(short), short.is_cut) == (10, False)


class Rewinding:
    """A reader as ModelOpt and Olive have it, which a quantizer uses after us."""

    def __init__(self) -> None:
        self.position = 0

    def rewind(self) -> None:
        self.position = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self.position += 1
        return {"x": np.full((1, 4), self.position, np.float32)} if self.position < 4 else None


def test_a_reader_is_read_from_its_beginning_and_left_there() -> None:
    reader = Rewinding()
    reader.get_next()
    assert open_data(reader, [VECTOR]).batch([0, 1, 2])["x"][:, 0].tolist() == [1, 2, 3]
    assert reader.position == 0


class Iterable:
    """torch's IterableDataset: its positions are not implemented."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Image.Image]:
        return map(photo, range(6))


def test_positions_that_are_not_implemented() -> None:
    assert len(open_data(Iterable(), [RGB8], preprocessing=UNIT, most=4)) == 4


def failing() -> Iterator[Any]:
    yield {"x": np.zeros((1, 4), np.float32)}
    raise ConnectionError("the hub is gone")


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        (failing(), VECTOR, r"feed 1 of the data cannot be read \(ConnectionError: the hub is gone\)"),
        (MapStyle([]), VECTOR, r"the data hold no samples"),
        (
            [1.5],
            VECTOR,
            r"feed 0 of the data is of type float: give a dict .*, an array or tensor, an image, or a pair",
        ),
        (["a.jpg"], RGB8, r"a\.jpg does not exist: give a folder of images, a \.txt"),
        (["a.jpg", 3], RGB8, r"feed 0 of the data is of type str"),
        (MapStyle([{"text": "a"}]), RGB8, r"sample #0 of the data holds 'text': give images as 'image', or .* 'input'"),
        ([photo(0), EXPECTED[:1]], RGB8, r"feed 1 of the data holds tensors, and those before it hold images"),
        ([Tensor(EXPECTED[:1], ready=-9)], RGB8, r"'input' is not an array \(Can't call numpy"),
        ([np.zeros((1, 5), np.float32)], VECTOR, r"the data has an array of shape \(1, 5\) for model input 'x'"),
        (
            {"train": Columns(rows()), "test": Columns(rows())},
            RGB8,
            r"the splits 'train', 'test' of a data set: give one",
        ),
        ([Image.new("I;16", (8, 8))], RGB8, r"sample #0 of the data has pixels of mode I;16"),
    ],
)
def test_what_is_refused(source: Any, spec: InputSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(source, [spec], preprocessing=UNIT if spec is RGB8 and not _has_floats(source) else None)


def _has_floats(source: Any) -> bool:
    return isinstance(source, list) and isinstance(source[0], Tensor)


def test_a_position_that_fails_later() -> None:
    source = MapStyle([photo(0), "no image", photo(2)])
    dataset = open_data(source, [RGB8], preprocessing=UNIT)
    with pytest.raises(DataError, match="sample #1 of the data is of type str"):
        dataset.load(1)
    source.items[1] = EXPECTED[0]
    with pytest.raises(DataError, match="sample #1 of the data is not one image, as the first is"):
        dataset.load(1)


def test_images_without_a_scale_are_refused() -> None:
    with pytest.raises(DataError, match="nothing says how to normalise their pixels"):
        open_data([photo(0)], [ANY])
