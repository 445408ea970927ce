"""The nets and images of ../shared/assets (see MANIFEST.md there) that benchmarks run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_asr.data import InputSpec, Preprocessing, open_data

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Net:
    """Files of one net, its preprocessing, and the sparsities it is measured at."""

    graphs: dict[str, str]
    preprocessing: Preprocessing
    sparsities: tuple[str, ...] = ("0.7", "0.8", "0.9", "0.95")
    data: str = "cifar10"
    label_offset: int = 0


NETS = {
    "resnet20": Net(
        {"bn": "cifar10/resnet20_bn.onnx", "folded": "cifar10/resnet20_folded.onnx"},
        Preprocessing(scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
    ),
    "resnet56": Net(
        {
            "bn": "cifar10/resnet56_bn3_l1sparse_bn.onnx",
            "folded": "cifar10/resnet56_bn3_l1sparse_folded.onnx",
        },
        Preprocessing(scale=1 / 255, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    ),
    "resnet8": Net(
        {
            "bn": "cifar10/resnet8_mlperftiny_tf2onnx_bn.onnx",
            "folded": "cifar10/resnet8_mlperftiny_tf2onnx_folded.onnx",
        },
        Preprocessing(scale=1.0),
    ),
    "resnet18": Net(
        {"bn": "imagenet/resnet18_ktb_bn.onnx"},
        Preprocessing(scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        ("0.5", "0.7", "0.8", "0.9"),
        "imagenet",
    ),
    "mobilenetv2": Net(
        {"folded": "imagenet/mobilenetv2_1.0_224_tfqat_folded.onnx"},
        Preprocessing(scale=1 / 127.5, mean=(1.0,)),
        ("0.3", "0.5", "0.7"),
        "imagenet",
        1,
    ),
}
"""Classifiers."""

YOLOV5N = Net({"bn": "coco/yolov5n_coco_bn_416.onnx"}, Preprocessing(scale=1 / 255), data="coco")


@dataclass(frozen=True)
class Images:
    """uint8 pixels (N, H, W, C) for calibration; pixels and labels for scoring."""

    calibration: NDArray[np.uint8]
    scored: NDArray[np.uint8]
    labels: NDArray[np.int64]


def cifar10(assets: Path) -> Images:
    with (
        np.load(assets / "data/cifar10_train4k_lossless.npz") as train,
        np.load(assets / "data/cifar10_test1k_lossless.npz") as test,
    ):
        return Images(train["images"], test["images"], test["labels"])


def imagenet(assets: Path) -> Images:
    """Short side 256, centre crop 224; every fifth class index calibrates, the others are scored.

    Behind these 200 calibration images come the 650 of ilsvrc2012_val, which are 227 pixels wide and only cropped.
    """
    spec = InputSpec("image", np.dtype(np.uint8), (None, 224, 224, 3))
    data = open_data(assets / "data/imagenet1k", [spec], preprocessing=Preprocessing(resize=256, crop=224))
    labels = np.array([int(name.partition("_")[0]) for name in data.names], np.int64)
    pixels = data.batch(np.arange(len(labels)))["image"]
    calibrate = labels % 5 == 0
    more = open_data(assets / "data/ilsvrc2012_val", [spec], preprocessing=Preprocessing(crop=224))
    calibration = np.concatenate([pixels[calibrate], more.batch(np.arange(len(more)))["image"]])
    return Images(calibration, pixels[~calibrate], labels[~calibrate])


def coco(assets: Path) -> Images:
    """Letterbox of 416 x 416 with grey borders; no labels."""
    spec, steps = InputSpec("image", np.dtype(np.uint8), (None, 416, 416, 3)), Preprocessing(letterbox=416)
    folders = (open_data(assets / "coco" / name, [spec], preprocessing=steps) for name in ("train2017", "val2017"))
    calibration, scored = (data.batch(np.arange(len(data.names)))["image"] for data in folders)
    return Images(calibration, scored, np.zeros(0, np.int64))
