"""Images as detectors want them: against OpenCV, scalar arithmetic, and the preprocessing of another tool."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_asr.data import PRESETS, Dataset, InputSpec, Preprocessing, open_data
from onnx_asr.data.framing import Frame, opencv_linear
from onnx_asr.errors import DataError, OptionError
from tests.scorer import scorer
from tests.unit.data.samples import ANY, FLOAT, pixels, write_image
from tools.paths import ASSETS

WIDE = InputSpec("input", FLOAT, (None, 3, 20, 32))
SQUARE = InputSpec("input", FLOAT, (None, 3, 16, 16))


def fitted(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear values in exact arithmetic, rounded: what every implementation should be close to."""
    rows, columns = image.shape[:2]
    result = np.empty((height, width, *image.shape[2:]))

    def parts(index: int, want: int, have: int) -> list[tuple[int, Fraction]]:
        place = Fraction(2 * index + 1, 2) * Fraction(have, want) - Fraction(1, 2)
        low = floor(place)
        share = place - low
        return [(min(max(low, 0), have - 1), 1 - share), (min(max(low + 1, 0), have - 1), share)]

    for y in range(height):
        for x in range(width):
            for channel in range(image.shape[2]):
                result[y, x, channel] = float(
                    sum(
                        int(image[row, column, channel]) * a * b
                        for row, a in parts(y, height, rows)
                        for column, b in parts(x, width, columns)
                    )
                )
    return result


def letterboxed(image: np.ndarray, size: tuple[int, int], *, centre: bool, value: float) -> np.ndarray:
    """An image in its letterbox, step by step."""
    rows, columns = image.shape[:2]
    width, height = size
    factor = min(Fraction(width, columns), Fraction(height, rows))
    w, h = round(columns * factor), round(rows * factor)
    left, top = ((width - w) // 2, (height - h) // 2) if centre else (0, 0)
    result = np.full((height, width, image.shape[2]), value)
    result[top : top + h, left : left + w] = opencv_linear(image, (w, h))
    return result


@pytest.mark.parametrize("size", [(13, 7), (5, 4), (9, 6), (18, 12), (1, 1), (9, 13), (4, 3)])
def test_opencv_linear_is_bilinear(size: tuple[int, int]) -> None:
    image = pixels(6, 9, 3)
    found = opencv_linear(image, size)
    assert found.shape == (size[1], size[0], 3)
    # Weights are off by 1/4096 at most along each axis, the products and the sum are cut off to whole quarters.
    assert np.abs(found - fitted(image, *size)).max() <= 0.5 + 2 * 255 / 4096 + 0.5
    assert np.array_equal(opencv_linear(image[..., 0], size), found[..., 0])


def test_opencv_linear_by_hand() -> None:
    """Half of each of two pixels: 1024 * 10 + 1024 * 21 = 31744, then >> 4, * 2048 >> 16, + 2 >> 2."""
    assert opencv_linear(np.array([[10, 21]], np.uint8), (1, 1)).tolist() == [[16]]
    assert opencv_linear(np.array([[10, 20], [30, 40]], np.uint8), (1, 1)).tolist() == [[25]]
    assert opencv_linear(np.array([[0, 255]], np.uint8), (4, 1)).tolist() == [[0, 64, 191, 255]]


def test_opencv_linear_is_what_opencv_does() -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    random = np.random.default_rng(0)
    for trial in range(300):
        height, width, wanted_height, wanted_width = (int(side) for side in random.integers(1, 80, 4))
        if trial % 5 == 0:  # exactly half, for which OpenCV has another path
            wanted_height, wanted_width = max(1, height // 2), max(1, width // 2)
        image = pixels(height, width, 3, seed=trial)
        expected = cv2.resize(image, (wanted_width, wanted_height), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(opencv_linear(image, (wanted_width, wanted_height)), expected), image.shape


@pytest.mark.parametrize("kind", ["yolox", "yolov5", "nanodet", "fastestdet"])
@pytest.mark.parametrize("sides", [(416, 416), (352, 640)])
def test_presets_prepare_images_as_the_scorer_does(tmp_path: Path, kind: str, sides: tuple[int, int]) -> None:
    photographs = sorted((ASSETS / "coco" / "val2017").glob("*.jpg"))[:3]
    if not photographs:
        pytest.skip("needs ../shared/assets/coco")
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in photographs))
    spec = InputSpec("images", FLOAT, (1, 3, *sides))
    dataset = open_data(tmp_path / "list.txt", [spec], preprocessing=PRESETS[kind])
    other = scorer()
    for index, path in enumerate(photographs):
        image = other.cv2.imread(str(path))
        expected, (scale_x, scale_y, left, top) = other.KINDS[kind][0](image, *sides)
        np.testing.assert_allclose(dataset.load(index)["images"], expected[0], rtol=0, atol=1e-5)
        frame = dataset.frame(index)
        assert frame is not None
        back = frame.points_of_image(np.array([[100.0, 60.0]]))
        np.testing.assert_allclose(back, [[(100 - left) / scale_x, (60 - top) / scale_y]], rtol=1e-12)


def prepared(image: np.ndarray, spec: InputSpec, steps: Preprocessing | None) -> np.ndarray:
    return open_data(image[None], [spec], preprocessing=steps).load(0)["input"]


@pytest.mark.parametrize(("height", "width"), [(30, 40), (33, 17), (20, 32), (10, 16), (7, 90), (1, 300)])
@pytest.mark.parametrize("spec", [WIDE, SQUARE])
def test_letterboxes_of_the_presets_against_plain_numpy(height: int, width: int, spec: InputSpec) -> None:
    image = pixels(height, width, 3)
    size = (spec.shape[3], spec.shape[2])
    assert size[0] is not None
    assert size[1] is not None
    if height == 1:  # as no image has less than one row
        assert prepared(image, spec, PRESETS["yolov5"]).shape == spec.shape[1:]
        return
    boxed = letterboxed(image, size, centre=False, value=114)  # type: ignore[arg-type]
    assert np.array_equal(prepared(image, spec, PRESETS["yolox"]), boxed[..., ::-1].transpose(2, 0, 1))
    boxed = letterboxed(image, size, centre=True, value=114)  # type: ignore[arg-type]
    found = prepared(image, spec, PRESETS["yolov5"])
    np.testing.assert_allclose(found, boxed.transpose(2, 0, 1) / 255, rtol=1e-6)
    boxed = letterboxed(image, size, centre=True, value=0)  # type: ignore[arg-type]
    boxed = (boxed - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    found = prepared(image, spec, PRESETS["nanodet"])
    np.testing.assert_allclose(found, boxed[..., ::-1].transpose(2, 0, 1), rtol=1e-6, atol=1e-6)
    stretched = opencv_linear(image, size).astype(float)  # type: ignore[arg-type]
    found = prepared(image, spec, PRESETS["fastestdet"])
    np.testing.assert_allclose(found, stretched[..., ::-1].transpose(2, 0, 1) / 255, rtol=1e-6)
    found = prepared(image, spec, PRESETS["ssd"])
    np.testing.assert_allclose(found, stretched.transpose(2, 0, 1) / 127.5 - 1, rtol=1e-6, atol=1e-6)


def test_padding_before_and_after_normalization() -> None:
    image = np.full((8, 16, 3), 200, np.uint8)
    steps = {"letterbox": 16, "scale": 1.0, "mean": (100.0, 0.0, 0.0), "std": (50.0, 1.0, 1.0)}
    before = prepared(image, SQUARE, Preprocessing(**steps, pad_value=50))  # type: ignore[arg-type]
    assert (before[:, 0, 0] == [-1, 50, 50]).all()
    assert (before[:, 8, 0] == [2, 200, 200]).all()
    after = prepared(image, SQUARE, Preprocessing(**steps, pad_value=-0.5, pad_normalized=True))  # type: ignore[arg-type]
    assert (after[:, 0, 0] == -0.5).all()
    assert np.array_equal(after[:, 4:12], before[:, 4:12])
    corner = prepared(image, SQUARE, Preprocessing(**steps, pad="corner", pad_value=50))  # type: ignore[arg-type]
    assert np.array_equal(corner[:, :8], before[:, 4:12])
    assert np.array_equal(corner[:, 8:12], before[:, :4])


def test_mean_and_padding_follow_the_channel_order() -> None:
    image = np.zeros((4, 16, 3), np.uint8)
    steps = Preprocessing(letterbox=16, pad_value=0, scale=1.0, mean=(1.0, 2.0, 3.0), channel_order="BGR")
    assert (prepared(image, SQUARE, steps)[:, 0, 0] == [-3, -2, -1]).all()


@pytest.mark.parametrize(
    ("interpolation", "filter_"),
    [(name, getattr(Image.Resampling, name.upper())) for name in ("bilinear", "bicubic", "lanczos", "nearest")],
)
def test_interpolations_of_pillow(interpolation: Any, filter_: Image.Resampling) -> None:
    image = pixels(30, 40, 3)
    steps = Preprocessing(resize=(16, 16), interpolation=interpolation, scale=1.0)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), filter_))
    assert np.array_equal(prepared(image, SQUARE, steps), expected.transpose(2, 0, 1).astype(np.float32))


def test_sizes_come_from_the_model_or_are_given() -> None:
    image = pixels(30, 40, 3)
    for key in ("resize", "letterbox"):
        steps = Preprocessing(scale=1.0).from_options(**{key: "model", "scale": 1.0})
        assert prepared(image, WIDE, steps).shape == (3, 20, 32)
        with pytest.raises(DataError, match=rf"'input'.*leaves it open: pass a size, such as --{key} 640x640"):
            prepared(image, ANY, steps)
        steps = Preprocessing.from_options(**{key: (24, 18), "scale": 1.0})
        assert prepared(image, ANY, steps).shape == (3, 18, 24)
        with pytest.raises(DataError, match=rf"has shape \(3, 18, 24\).*expects \(3, 20, 32\): pass --{key} 32x20"):
            prepared(image, WIDE, steps)
    assert prepared(image, ANY, Preprocessing(letterbox=24, scale=1.0)).shape == (3, 24, 24)
    half_open = InputSpec("input", FLOAT, (None, 3, 20, None))
    with pytest.raises(DataError, match="leaves it open"):
        prepared(image, half_open, PRESETS["yolox"])


def test_channels_last_grey_and_whole_numbers() -> None:
    image = pixels(10, 20, 3)
    nhwc = InputSpec("input", np.dtype(np.uint8), (None, 16, 16, 3))
    found = prepared(image, nhwc, PRESETS["yolov5"])
    assert found.dtype == np.uint8
    assert np.array_equal(found, letterboxed(image, (16, 16), centre=True, value=114))
    grey = prepared(image, InputSpec("input", FLOAT, (None, 1, 16, 16)), Preprocessing(letterbox=16, scale=1.0))
    assert grey.shape == (1, 16, 16)
    assert (grey[0, :4] == 114).all()
    with pytest.raises(DataError, match=r"pad-value 0.5 does not fit model input 'input' \(uint8"):
        prepared(image, nhwc, Preprocessing(letterbox=16, pad_value=0.5, pad_normalized=True))


def test_stretching_then_cropping() -> None:
    image = pixels(30, 40, 3)
    steps = Preprocessing(resize=(20, 18), crop=16, scale=1.0)
    expected = np.asarray(Image.fromarray(image).resize((20, 18), Image.Resampling.BILINEAR))[1:17, 2:18]
    assert np.array_equal(prepared(image, SQUARE, steps), expected.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize(
    "steps",
    [
        Preprocessing(letterbox=(32, 20), scale=1.0),
        Preprocessing(letterbox=(32, 20), pad="corner", scale=1.0),
        Preprocessing(resize=(32, 20), scale=1.0),
        Preprocessing(resize=40, crop=16, scale=1.0),
        Preprocessing(scale=1.0),
    ],
)
def test_points_go_back_to_the_image(tmp_path: Path, steps: Preprocessing) -> None:
    """A bright spot is where its coordinates say, in the input and in the image."""
    image = np.zeros((60, 100, 3), np.uint8)
    image[24:36, 46:56] = 255  # its centre is at x = 51, y = 30
    write_image(tmp_path / "a.png", image)
    dataset = open_data(tmp_path, [ANY], preprocessing=steps)
    bright = np.argwhere(dataset.load(0)["input"][0] > 130)
    centre = (bright.min(axis=0) + bright.max(axis=0) + 1)[::-1] / 2  # x, y
    frame = dataset.frame(0)
    assert frame is not None
    assert frame.image == (100, 60)
    assert frame.size == dataset.load(0)["input"].shape[:0:-1]
    assert np.abs(frame.points_of_image(centre) - [51, 30]).max() < 1.6  # half a pixel of the smaller input


def test_frames_of_turned_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(8, 6, 3)).save(tmp_path / "a.png", exif=exif)
    for upright, size in ((True, (8, 6)), (False, (6, 8))):
        dataset = open_data(tmp_path, [ANY], preprocessing=Preprocessing(scale=1.0, exif=upright))
        frame = dataset.frame(0)
        assert frame is not None
        assert frame.image == size
        assert dataset.load(0)["input"].shape == (3, *size[::-1])


def test_tensors_have_no_frames() -> None:
    dataset = open_data({"input": np.zeros((1, 3, 16, 16), np.float32)}, [SQUARE])
    assert dataset.frame(0) is None
    assert Dataset.thumbnail(dataset, 0) is None


def test_thumbnails_show_the_padding() -> None:
    image = np.full((8, 16, 3), 200, np.uint8)
    for steps, level in (
        (PRESETS["yolov5"], 114),
        (PRESETS["nanodet"], 0),
        (Preprocessing(letterbox=16, scale=1 / 255, mean=(0.5,), pad_value=0, pad_normalized=True), 128),
    ):
        shown = open_data(image[None], [SQUARE], preprocessing=steps).thumbnail(0)
        assert shown is not None
        assert np.asarray(shown)[0, 0].tolist() == [level] * 3
        assert np.asarray(shown)[8, 8].tolist() == [200] * 3


def test_a_long_image_keeps_a_row() -> None:
    frame = Frame.of((1000, 1), Preprocessing(letterbox=(16, 16), scale=1.0), "a.png")
    assert frame.resized == (16, 1)


def test_a_letterbox_must_not_blow_an_image_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"#0 is 20 x 10 pixels and would become 40 x 40: remove it, or give a smaller"):
        prepared(pixels(10, 20, 3), ANY, Preprocessing(letterbox=(40, 40), pad="corner", scale=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": (0, 3)}, r"resize is \(0, 3\): give a whole number"),
        ({"resize": "640x480"}, r"resize is '640x480': give .* a width and a height such as \[640, 480\]"),
        ({"letterbox": (3, 4, 5)}, r"letterbox is \(3, 4, 5\): give a whole number of pixels .* a width and a height"),
        ({"letterbox": "net"}, r"letterbox is 'net': .* or 'model'"),
        ({"letterbox": True}, r"letterbox is True"),
        ({"letterbox": 416, "resize": 416}, r"letterbox 416 came with resize: give only one"),
        ({"letterbox": 416, "crop": 416}, r"letterbox 416 came with crop"),
        ({"resize": (40, 30), "crop": 32}, r"crop 32 is larger than the short side after resize \(40, 30\)"),
        ({"letterbox": 416, "pad": "left"}, r"pad is 'left': give one of centre, corner"),
        ({"pad": "corner"}, r"pad was given without a letterbox to pad: give --letterbox, too"),
        ({"pad_value": 0}, r"pad-value was given without a letterbox"),
        ({"preset": "fastestdet", "pad_value": 0}, r"pad-value was given without a letterbox"),
        ({"letterbox": 416, "pad_value": 300}, r"pad-value 300 is no pixel value from 0 to 255: .* --pad-normalized"),
        ({"letterbox": 416, "pad_value": "grey"}, r"pad-value is 'grey': give a number"),
        ({"letterbox": 416, "pad_normalized": 1}, r"pad-normalized is 1: give true or false"),
        (
            {"interpolation": "area"},
            r"interpolation is 'area': give one of bilinear, bicubic, lanczos, nearest, opencv",
        ),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preprocessing.from_options(**options)


def test_another_geometry_replaces_that_of_a_preset(tmp_path: Path) -> None:
    boxed = Preprocessing.from_options(preset="imagenet", letterbox=416, pad_value=0)
    assert boxed is not None
    assert (boxed.resize, boxed.crop, boxed.letterbox, boxed.mean) == (None, None, 416, PRESETS["imagenet"].mean)
    stretched = Preprocessing.from_options(preset="yolox", resize=(640, 480))
    assert stretched == Preprocessing(resize=(640, 480), scale=1.0, channel_order="BGR", interpolation="opencv-linear")
    sized = Preprocessing.from_options(preset="yolov5", letterbox=640, pad="corner")
    assert sized is not None
    assert (sized.letterbox, sized.pad, sized.pad_value) == (640, "corner", 114)
    file = tmp_path / "steps.toml"
    file.write_text('letterbox = [416, 320]\npad = "corner"\npad_value = 0\nscale = 1\ninterpolation = "nearest"\n')
    assert Preprocessing.from_options(file=file) == Preprocessing(
        letterbox=(416, 320), pad="corner", pad_value=0, scale=1, interpolation="nearest"
    )


def test_ready_tensors_of_the_size_of_the_letterbox_are_scaled() -> None:
    tensors = {"input": pixels(2, 3, 20, 32)}
    steps = Preprocessing(letterbox=(32, 20), scale=1 / 255)
    np.testing.assert_allclose(
        open_data(tensors, [WIDE], preprocessing=steps).load(1)["input"], tensors["input"][1] / 255
    )
    for other in (Preprocessing(letterbox=32, scale=1.0), Preprocessing(resize=(20, 32), scale=1.0)):
        with pytest.raises(OptionError, match="are not resized, cropped or padded"):
            open_data(tensors, [WIDE], preprocessing=other)
