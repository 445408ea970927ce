"""Preprocessing: pixels to values, against plain numpy; options, presets and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_asr.data import PRESETS, InputSpec, Preprocessing, open_data
from onnx_asr.errors import DataError, OptionError
from onnx_asr.json_values import plain
from tests.unit.data.samples import ANY, FLOAT, RGB8, UNIT, pixels, write_image


def test_normalisation_against_plain_numpy() -> None:
    images = pixels(5, 8, 8, 3)
    for name, preset in PRESETS.items():
        if preset.crop is not None or preset.letterbox is not None:
            continue
        batch = open_data({"images": images}, [RGB8], preprocessing=preset).batch([3, 1])["input"]
        x = images[[3, 1]].astype(np.float64).transpose(0, 3, 1, 2)
        x = x[:, ::-1] if preset.channel_order == "BGR" else x
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
        "exif": True,
        "letterbox": None,
        "pad": "centre",
        "pad_value": 114.0,
        "pad_normalized": False,
        "interpolation": "bilinear",
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
        ({"exif": 1}, r"exif is 1: give true or false"),
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
