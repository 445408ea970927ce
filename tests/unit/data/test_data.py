from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onnx_asr.data import PRESETS, InputSpec, Preprocessing, open_data, sample_indices
from onnx_asr.data.labels import read_labels
from onnx_asr.errors import DataError, OptionError
from onnx_asr.json_values import plain

FLOAT = np.dtype(np.float32)
RGB8 = InputSpec("input", FLOAT, (None, 3, 8, 8))
ANY = InputSpec("input", FLOAT, (None, 3, None, None))
VECTOR = InputSpec("x", FLOAT, (None, 4))
UNIT = PRESETS["unit"]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three 8 x 8 images."""
    root = tmp_path / "images"
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        write_image(root / name, pixels(8, 8, 3, seed=seed))
    return root


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


# Preprocessing


def test_normalisation_against_plain_numpy() -> None:
    images = pixels(5, 8, 8, 3)
    for name, preset in PRESETS.items():
        if preset.crop is not None:
            continue
        batch = open_data({"images": images}, [RGB8], preprocessing=preset).batch([3, 1])["input"]
        x = images[[3, 1]].astype(np.float64).transpose(0, 3, 1, 2)
        mean, std = (np.array(values).reshape(1, -1, 1, 1) for values in (preset.mean, preset.std))
        assert preset.scale is not None
        # One rounding to float32: half a unit in the last place of a value below 256.
        np.testing.assert_allclose(batch, (x * preset.scale - mean) / std, rtol=2**-24, atol=1e-12, err_msg=name)
        assert batch.dtype == np.float32


def test_presets_have_the_published_values() -> None:
    black_white = np.stack([np.zeros((300, 280, 3), np.uint8), np.full((300, 280, 3), 255, np.uint8)])
    spec = InputSpec("input", FLOAT, (None, 3, 224, 224))
    tf = open_data(black_white, [spec], preprocessing=PRESETS["tf"]).batch([0, 1])["input"]
    assert (tf[0] == -1).all()
    assert (tf[1] == 1).all()
    imagenet = open_data(black_white, [spec], preprocessing=PRESETS["imagenet"]).load(1)["input"]
    np.testing.assert_allclose(imagenet[:, 0, 0], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 301), (255, 255), (224, 500), (640, 225)])
def test_resize_and_crop_round_as_torchvision_does(tmp_path: Path, width: int, height: int) -> None:
    array = pixels(height, width, 3)
    write_image(tmp_path / "a.png", array)
    steps = Preprocessing(resize=225, crop=224, scale=1.0)
    dataset = open_data(tmp_path, [ANY], preprocessing=steps)

    # torchvision.transforms.functional: _compute_resized_output_size and center_crop
    short, long = sorted((width, height))
    new = (225, int(225 * long / short))
    size = new if width <= height else new[::-1]
    image = Image.fromarray(array).resize(size, Image.Resampling.BILINEAR)
    left, top = int(round((size[0] - 224) / 2.0)), int(round((size[1] - 224) / 2.0))  # noqa: RUF046
    expected = np.asarray(image)[top : top + 224, left : left + 224]
    assert np.array_equal(dataset.load(0)["input"], expected.transpose(2, 0, 1).astype(np.float32))
    thumbnail = dataset.thumbnail(0)
    assert thumbnail is not None
    assert np.array_equal(np.asarray(thumbnail), expected)


def test_pixels_resized_and_cropped_back_to_their_size_are_not_taken_as_they_are() -> None:
    images = pixels(2, 8, 8, 3)
    batch = open_data(images, [RGB8], preprocessing=Preprocessing(resize=12, crop=8, scale=1.0)).batch([1])["input"]
    expected = np.asarray(Image.fromarray(images[1]).resize((12, 12), Image.Resampling.BILINEAR))[2:10, 2:10]
    assert np.array_equal(batch[0], expected.transpose(2, 0, 1).astype(np.float32))


def test_mean_is_in_rgb_order_whatever_the_channel_order() -> None:
    images = pixels(2, 8, 8, 3)
    rgb = Preprocessing(scale=1.0, mean=(1.0, 2.0, 3.0))
    bgr = Preprocessing(scale=1.0, mean=(1.0, 2.0, 3.0), channel_order="BGR")
    a, b = (open_data(images, [RGB8], preprocessing=steps).batch([0, 1])["input"] for steps in (rgb, bgr))
    assert np.array_equal(a[:, ::-1], b)
    assert np.array_equal(a[0, 2], images[0, :, :, 2].astype(np.float32) - 3)


def test_layout_comes_from_the_model_and_a_contradiction_is_an_error() -> None:
    images = pixels(2, 8, 8, 3)
    last = InputSpec("input", FLOAT, (None, 8, 8, 3))
    dataset = open_data(images, [last], preprocessing=UNIT)
    assert dataset.preprocessing is not None
    assert dataset.preprocessing.layout == "NHWC"
    first = open_data(images, [RGB8], preprocessing=UNIT).load(1)["input"]
    assert np.array_equal(dataset.load(1)["input"], first.transpose(1, 2, 0))
    undecided = InputSpec("input", FLOAT, (None, None, None, None))
    assert open_data(images, [undecided], preprocessing=UNIT).load(0)["input"].shape == (3, 8, 8)
    with pytest.raises(
        DataError, match=r"layout NCHW was given.*'input' \(float32, \(8, 8, 3\).*is NHWC.*--layout NHWC"
    ):
        open_data(images, [last], preprocessing=Preprocessing(scale=1.0, layout="NCHW"))


def test_integer_input_takes_pixels_as_they_are() -> None:
    images = pixels(2, 8, 8, 3)
    spec = InputSpec("input", np.dtype(np.uint8), (1, 8, 8, 3))
    for steps in (None, PRESETS["cifar10"]):
        dataset = open_data({"images": images}, [spec], preprocessing=steps)
        batch = dataset.batch([0, 1])["input"]
        assert batch.dtype == np.uint8
        assert np.array_equal(batch, images)
        assert dataset.preprocessing == Preprocessing(layout="NHWC")
    with pytest.raises(DataError, match=r"int8.*cannot hold pixel values 0..255"):
        open_data({"images": images}, [InputSpec("input", np.dtype(np.int8), (1, 8, 8, 3))])


def test_half_precision_input() -> None:
    spec = InputSpec("input", np.dtype(np.float16), (None, 3, 8, 8))
    images = pixels(2, 8, 8, 3)
    value = open_data(images, [spec], preprocessing=UNIT).load(0)["input"]
    assert value.dtype == np.float16
    assert np.array_equal(value[0], (images[0, :, :, 0] / 255).astype(np.float16))


def test_grey_and_colour_are_converted_to_what_the_model_wants(tmp_path: Path) -> None:
    colour, grey = pixels(8, 8, 3), pixels(8, 8)
    write_image(tmp_path / "a.png", colour)
    write_image(tmp_path / "b.png", grey)
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    one = InputSpec("input", FLOAT, (None, 1, 8, 8))
    for source in (tmp_path, {"images": grey[None]}):
        values = open_data(source, [one], preprocessing=PRESETS["digits"])
        np.testing.assert_allclose(values.load(len(values) - 1)["input"][0], (grey / 255 - 0.5) / 0.5, atol=1e-7)
        values = open_data(source, [RGB8], preprocessing=PRESETS["raw"])
        assert np.array_equal(values.load(len(values) - 1)["input"], np.stack([grey] * 3).astype(np.float32))
    for source in (tmp_path, {"images": colour[None]}):
        values = open_data(source, [one], preprocessing=PRESETS["raw"])
        assert np.array_equal(values.load(0)["input"][0], luma.astype(np.float32))


def test_options_build_on_a_preset_or_a_file(tmp_path: Path) -> None:
    assert Preprocessing.from_options() is None
    assert Preprocessing.from_options(preset="imagenet") == PRESETS["imagenet"]
    own = Preprocessing.from_options(
        preset="imagenet", resize=300, crop=299, mean=0.5, std=[0.1, 0.2, 0.3], layout="NHWC"
    )
    assert own == Preprocessing(300, 299, 1 / 255, (0.5,), (0.1, 0.2, 0.3), "NHWC")
    assert own is not None
    assert json.loads(json.dumps(plain(own))) == {
        "resize": 300,
        "crop": 299,
        "scale": 1 / 255,
        "mean": [0.5],
        "std": [0.1, 0.2, 0.3],
        "layout": "NHWC",
        "channel_order": "RGB",
    }
    file = tmp_path / "steps.toml"
    file.write_text('resize = 300\nscale = 1\nmean = [1, 2, 3]\nstd = 2\nchannel_order = "BGR"\n')
    assert Preprocessing.from_options(file=file, crop=224) == Preprocessing(
        300, 224, 1, (1, 2, 3), (2,), channel_order="BGR"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "imagnet"}, r"no preset 'imagnet': choose one of imagenet, cifar10"),
        ({"preset": "raw", "file": "x.toml"}, r"both a preset \(raw\) and a preprocessing file \(x.toml\)"),
        ({"resize": 0}, r"resize is 0: give a whole number"),
        ({"preset": "imagenet", "crop": 300}, r"crop 300 is larger than the short side after resize 256"),
        ({"scale": 0.0}, r"scale is 0.0"),
        ({"scale": float("nan")}, r"scale is nan"),
        ({"mean": (1.0, 2.0)}, r"mean is \(1.0, 2.0\): give one number, or three"),
        ({"mean": "0.5"}, r"mean is '0.5'"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is \(1.0, 0.0, 1.0\): give values above 0"),
        ({"layout": "HWC"}, r"layout is 'HWC': give NCHW or NHWC"),
        ({"channel_order": "GBR"}, r"channel order is 'GBR': give RGB or BGR"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preprocessing.from_options(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read the preprocessing file .*No such file"),
        ("resize = ", r"cannot read the preprocessing file"),
        ("resise = 3", r"sets resise: the known keys are resize, crop"),
        ('crop = "224"', r"crop is '224'"),
        ("mean = [0.1, true, 0.3]", r"mean is \(0.1, True, 0.3\)"),
    ],
)
def test_preprocessing_file_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "steps.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(OptionError, match=message):
        Preprocessing.from_options(file=file)


# Folders


def test_flat_folder(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"left behind by a Mac")
    write_image(folder / ".cache" / "z.png", pixels(8, 8, 3))
    dataset = open_data(folder, [RGB8], preprocessing=UNIT)
    assert dataset.names == ("a.png", "b.png", "c.png")
    assert dataset.labels is None
    assert len(dataset) == 3
    batch = dataset.batch([2, 0])["input"]
    assert batch.shape == (2, 3, 8, 8)
    assert np.array_equal(batch[0], dataset.load(2)["input"])
    assert np.array_equal(open_data(str(folder), [RGB8], preprocessing=UNIT).load(2)["input"], batch[0])


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "ppm", "gif", "tif", "PNG"])
def test_image_formats(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a.{suffix}", np.full((8, 8, 3), 200, np.uint8))
    value = open_data(tmp_path, [RGB8], preprocessing=PRESETS["raw"]).load(0)["input"]
    np.testing.assert_allclose(value, 200, atol=2)  # JPEG and WebP lose a little


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/deep/2.png", "cat/1.png"):
        write_image(tmp_path / name, pixels(8, 8, 3))
    (tmp_path / "bird").mkdir()  # a class without images keeps its place
    dataset = open_data(tmp_path, [RGB8], preprocessing=UNIT)
    assert dataset.names == ("cat/1.png", "cat/deep/2.png", "dog/1.png")
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [1, 1, 2]


def test_class_folders_with_numbers_for_names(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/b.png", "007/c.png"):
        write_image(tmp_path / name, pixels(8, 8, 3))
    dataset = open_data(tmp_path, [RGB8], preprocessing=UNIT)
    assert dataset.labels is not None
    assert dict(zip(dataset.names, dataset.labels.tolist(), strict=True)) == {
        "007/c.png": 7,
        "10/a.png": 10,
        "9/b.png": 9,
    }


def test_a_single_sub_folder_is_not_a_class(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", pixels(8, 8, 3))
    assert open_data(tmp_path, [RGB8], preprocessing=UNIT).labels is None


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "0").symlink_to(folder)
    (folder / "loop").symlink_to(linked)
    assert open_data(linked, [RGB8], preprocessing=UNIT).names == ("0/a.png", "0/b.png", "0/c.png")


def test_loose_images_beside_class_folders(folder: Path) -> None:
    write_image(folder / "cat" / "x.png", pixels(8, 8, 3))
    with pytest.raises(DataError, match=r"holds images \(a.png\) beside sub-folders of images.*--labels"):
        open_data(folder, [RGB8], preprocessing=UNIT)


def test_empty_and_missing_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images: give files ending in \.bmp, "):
        open_data(tmp_path, [RGB8], preprocessing=UNIT)
    with pytest.raises(DataError, match=r"nowhere does not exist: give a folder of images, an \.npz or an \.npy"):
        open_data(tmp_path / "nowhere", [RGB8], preprocessing=UNIT)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(DataError, match=r"a\.csv is not a supported data source: give a folder"):
        open_data(tmp_path / "a.csv", [RGB8], preprocessing=UNIT)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_broken_image_is_named(folder: Path, index: int, content: bytes | str) -> None:
    broken = folder / ("a.png", "b.png")[index]
    broken.write_bytes(broken.read_bytes()[:100] if isinstance(content, str) else content)
    with pytest.raises(DataError, match=rf"{re.escape(str(broken))} cannot be read as an image: .*Replace or remove"):
        open_data(folder, [RGB8], preprocessing=UNIT).batch([0, 1, 2])


@pytest.mark.parametrize("limit", [50, 20])  # Pillow warns above the limit and raises above twice the limit
def test_decompression_bomb_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    dataset = open_data(folder, [RGB8], preprocessing=UNIT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for use in (dataset.load, dataset.thumbnail):
        with pytest.raises(DataError, match=r"c\.png is too large to open safely.*Scale it down"):
            use(2)


def test_resizing_must_not_blow_an_image_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    write_image(tmp_path / "line.png", pixels(1, 500, 3))
    with pytest.raises(DataError, match=r"line\.png is 500 x 1 pixels and would become 128000 x 256"):
        open_data(tmp_path, [ANY], preprocessing=PRESETS["imagenet"])


def test_sixteen_bit_image_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.full((8, 8), 1000, np.uint16))
    with pytest.raises(DataError, match=r"a\.png has pixels of mode I;16: convert it to 8 bits per channel"):
        open_data(tmp_path, [RGB8], preprocessing=UNIT)


def test_float_input_needs_to_know_how_pixels_become_values(folder: Path) -> None:
    for steps in (None, Preprocessing(resize=8, crop=8)):
        for source in (folder, pixels(2, 8, 8, 3), {"images": pixels(2, 8, 8, 3)}):
            with pytest.raises(DataError, match=r"'input' \(float32.*--preset \(imagenet, cifar10, .*or --scale"):
                open_data(source, [RGB8], preprocessing=steps)


def test_sizes_that_do_not_fit(folder: Path) -> None:
    spec = InputSpec("input", FLOAT, (None, 3, 224, 224))
    message = (
        r"has shape \(3, 8, 8\) after preprocessing, but model input 'input' expects \(3, 224, 224\): "
        "pass --resize 224 --crop 224"
    )
    for source, name in ((folder, "a.png"), (pixels(2, 8, 8, 3), "#0")):
        with pytest.raises(DataError, match=name + " " + message):
            open_data(source, [spec], preprocessing=UNIT)
    with pytest.raises(DataError, match=r"expects \(3, 240, 320\): crops are square, so give images of 320 x 240"):
        open_data(folder, [InputSpec("input", FLOAT, (1, 3, 240, 320))], preprocessing=UNIT)
    with pytest.raises(
        DataError, match=r"a\.png is 8 x 8 pixels, too small for a crop of 9 x 9: pass --resize 9 or more"
    ):
        open_data(folder, [ANY], preprocessing=Preprocessing(crop=9, scale=1.0))


def test_images_of_different_sizes(folder: Path) -> None:
    write_image(folder / "d.png", pixels(8, 9, 3))
    dataset = open_data(folder, [RGB8], preprocessing=UNIT)
    with pytest.raises(
        DataError,
        match=r"d\.png has shape \(3, 8, 9\) after preprocessing, but model input 'input' expects \(3, 8, 8\)",
    ):
        dataset.load(3)
    dataset = open_data(folder, [ANY], preprocessing=UNIT)
    assert dataset.load(3)["input"].shape == (3, 8, 9)
    assert len(dataset.digest(range(4))) == 64
    with pytest.raises(DataError, match=r"a\.png is \(3, 8, 8\), d\.png is \(3, 8, 9\).*pass --crop"):
        dataset.batch([0, 1, 3])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([RGB8, VECTOR], r"holds images, but the model has the inputs 'input', 'x': give a dict with a ready tensor"),
        ([VECTOR], r"'x' \(float32, \(4\) per sample\) has no height, width and channels"),
        ([InputSpec("y", FLOAT, (None, 4, 8, 8))], r"1 or 3 channels, but model input 'y' \(float32, \(4, 8, 8\)"),
        ([InputSpec("y", np.dtype(bool), (None, 3, 8, 8))], r"'y' \(bool.*does not take numbers"),
        ([InputSpec("y", FLOAT, (None, 1, 8, 8))], r"mean has 3 values.*has 1 channel: pass --mean with one value"),
        ([InputSpec("y", FLOAT, ())], r"'y' is a scalar, and data need a batch axis"),
        ([], r"the model has no inputs"),
    ],
)
def test_models_that_take_no_such_images(folder: Path, specs: list[InputSpec], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(folder, specs, preprocessing=PRESETS["cifar10"])


# Label files


@pytest.mark.parametrize(
    "text",
    [
        "a.png\t3\nb.png\t1\nc.png\t4\n",
        "3\ta.png\n1\tb.png\n4\tc.png\n9\tother.png\n",
        "file,label\nc.png,4\nb.png,1\na.png,3\n",
        "\ufeffclass_index;name\r\n3;a\r\n1;b\r\n4;c\r\n",
        "a 3\n\nb 1\nc 4",
        "images/a.png,3\nimages/b.png,1\nimages/c.png,4\n",
        ",image,label\n0,a.png,3\n1,b.png,1\n2,c.png,4\n",  # as pandas writes it
        '"a.png", 3\n"b.png", 1\n"c.png", 4\n',
        "3\tn01440764\ta.JPEG\ttench\t500x375\n1\tn0144\tb.JPEG\tgoldfish\t3x3\n4\tn01\tc.JPEG\tshark\t3x3\n",
    ],
)
def test_label_files(folder: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_text(text, encoding="utf-8")
    dataset = open_data(folder, [RGB8], preprocessing=UNIT, labels=file)
    assert dataset.labels is not None
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [3, 1, 4]


def test_a_label_file_takes_precedence_over_class_folders_and_distinguishes_equal_names(tmp_path: Path) -> None:
    names = ["cat/1.png", "dog/1.png"]
    file = tmp_path / "labels.csv"
    file.write_text("dog/1.png,5\ncat\\1.png,6\n")
    assert read_labels(file, names).tolist() == [6, 5]
    file.write_text("1.png,5\n1.png,6\n")
    with pytest.raises(DataError, match=r"'cat/1\.png' is missing"):
        read_labels(file, names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.csv is empty: give a row of file name and class index"),
        ("a,3\nb,1\n", r"does not give every image one class index: 'c.png' is missing \(2 of 3 images are listed\)"),
        ("a,cat\nb,dog\nc,cat\n", r"has no column of class indices"),
        ("a,3\nb,-1\nc,4\n", r"has no column of class indices"),
        ("a,3\nb,1,2\nc,4\n", r"row 2 has 3 columns, the first row has 2"),
        ("a,3\nb,1\nc,4\na,5\n", r"'a' has more than one class: keep one row of it"),
        ("a,3,0\nb,1,1\nc,4,2\n", r"read in two ways: name and class in columns 1 and 2, or 1 and 3: add a header row"),
        ("3\n1\n4\n", r"it needs two columns"),
    ],
)
def test_label_files_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(folder, [RGB8], preprocessing=UNIT, labels=file)


def test_label_file_of_numbered_images(tmp_path: Path) -> None:
    names = ["0.png", "1.png", "2.png"]
    file = tmp_path / "labels.csv"
    file.write_text("0,1\n1,2\n2,0\n")  # which of the two columns is the name?
    with pytest.raises(DataError, match=r"can be read in two ways"):
        read_labels(file, names)
    file.write_text("image,label\n0,1\n1,2\n2,0\n")
    assert read_labels(file, names).tolist() == [1, 2, 0]
    file.write_text("0,7\n1,7\n2,5\n")
    assert read_labels(file, names).tolist() == [7, 7, 5]


def test_unreadable_label_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the labels file .*No such file"):
        open_data(folder, [RGB8], preprocessing=UNIT, labels=tmp_path / "none.tsv")
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"cannot read the labels file"):
        open_data(folder, [RGB8], preprocessing=UNIT, labels=tmp_path / "bytes.tsv")
    with pytest.raises(OptionError, match=r"needs a folder of images: put 'labels' beside the arrays"):
        open_data(pixels(2, 8, 8, 3), [RGB8], preprocessing=UNIT, labels=tmp_path / "bytes.tsv")


# Arrays


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
        (np.uint8, np.float32),
        (bool, np.uint8),
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
        (np.array([[0, 0, 0, 2**24 + 1]]), np.float32, r"which float32 of model input 'x' cannot hold"),
        (np.full((1, 4), 1e5), np.float16, r"sample #0 has values from 100000.0 to 100000.0, which float16"),
        (np.array([[0, 0, 0, np.nan]]), np.float32, r"sample #0 has NaN or infinite values for model input 'x'"),
        (np.array([[0, 0, 0, np.inf]], np.float32), np.float32, r"sample #0 has NaN or infinite values"),
    ],
)
def test_values_refused(value: np.ndarray, want: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(value, [InputSpec("x", np.dtype(want), (None, 4))]).load(0)


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


# Sampling


@given(count=st.integers(1, 200), n=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_sampling(count: int, n: int, seed: int) -> None:
    indices = sample_indices(count, n, seed)
    assert len(indices) == min(count, n)
    assert len(set(indices.tolist())) == len(indices)
    assert indices.min() >= 0
    assert indices.max() < count
    assert np.array_equal(indices[: n // 2], sample_indices(count, max(1, n // 2), seed)[: n // 2])
    assert np.array_equal(indices, sample_indices(count, n, seed))


def test_sampling_is_the_same_everywhere() -> None:
    assert sample_indices(1000, 5, seed=0).tolist() == [459, 206, 222, 162, 711]
    assert not np.array_equal(sample_indices(1000, 5, 0), sample_indices(1000, 5, 1))
    with pytest.raises(OptionError, match=r"the number of samples is 0: give at least 1"):
        sample_indices(10, 0, 0)
