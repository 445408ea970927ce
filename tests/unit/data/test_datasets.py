"""Folders of images, and the choice of samples."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onnx_asr.data import PRESETS, InputSpec, Preprocessing, open_data, sample_indices
from onnx_asr.errors import DataError, OptionError
from tests.unit.data.samples import ANY, FLOAT, RGB8, UNIT, VECTOR, pixels, write_image


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


UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""What the values of the orientation tag mean (EXIF 2.32, 4.6.4): where the first row and column of the image are."""


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9, None])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_images_are_turned_upright(tmp_path: Path, suffix: str, orientation: int | None) -> None:
    stored = pixels(8, 6, 3)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif, lossless=True)
    for wanted, steps in (
        (UPRIGHT.get(orientation or 1, UPRIGHT[1])(stored), Preprocessing(scale=1.0)),
        (stored, Preprocessing(scale=1.0, exif=False)),
    ):
        dataset = open_data(tmp_path, [ANY], preprocessing=steps)
        assert np.array_equal(dataset.load(0)["input"], np.moveaxis(wanted, -1, 0))
        assert dataset.thumbnail(0).size == wanted.shape[1::-1]


def test_tiff_is_turned_once(tmp_path: Path) -> None:
    stored = pixels(8, 6, 3)
    Image.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    value = open_data(tmp_path, [ANY], preprocessing=Preprocessing(scale=1.0)).load(0)["input"]
    assert np.array_equal(value, np.moveaxis(np.rot90(stored, -1), -1, 0))


def test_broken_exif_data_turn_nothing(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", pixels(8, 8, 3))
    whole = open_data(tmp_path, [RGB8], preprocessing=UNIT).load(0)["input"]
    for broken in (b"Exif\0\0MM\0*\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"):
        Image.open(tmp_path / "a.png").save(tmp_path / "a.png", exif=broken)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            assert np.array_equal(open_data(tmp_path, [RGB8], preprocessing=UNIT).load(0)["input"], whole)
        assert not shown


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
    with pytest.raises(DataError, match=r"nowhere does not exist: give a folder of images, a \.txt that lists"):
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
    with pytest.raises(DataError, match=r"expects \(3, 240, 320\): pass --resize 320x240 to stretch images, --letterb"):
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
