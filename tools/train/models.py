"""Train the four small nets in `models/` on the handwritten digits that ship with scikit-learn.

Writes `digits_{resnet,vgg,mobilenet,densenet}.onnx`, the calibration and validation images under `data/`, and
`manifest.json`. The images are part of scikit-learn, so no network access is needed:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install scikit-learn onnx onnxruntime pillow
    python -m tools.train.models [--output models] [--seed 0]

Input of every net: float32 [N, 1, 8, 8], (pixel / 255 - 0.5) / 0.5 with 8-bit grey pixels. Output: logits [N, 10].
The same machine and package versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F

from tools.arguments import script_parser
from tools.paths import MODELS
from tools.train.exporting import OPSET, exported
from tools.train.families import FAMILIES

VALIDATION_IMAGES = 600
CALIBRATION_IMAGES = 512
MIN_TOP1 = 0.97
EXPORT_TOLERANCE = 1e-4

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Digits:
    """Images (uint8, N,8,8,1), labels (int64, N) and each image's index in `load_digits`."""

    images: Array
    labels: Array
    index: Array

    def take(self, rows: Array) -> Digits:
        """The given rows, in that order."""
        return Digits(self.images[rows], self.labels[rows], self.index[rows])


def load_splits(seed: int) -> tuple[Digits, Digits, Digits]:
    """Training, calibration (a part of training, ordered as its image folder is read) and validation digits."""
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    digits = Digits(images, raw.target.astype(np.int64), np.arange(len(images)))
    train_rows, validation_rows = train_test_split(
        digits.index, test_size=VALIDATION_IMAGES, stratify=digits.labels, random_state=seed
    )
    calibration_rows, _ = train_test_split(
        train_rows, train_size=CALIBRATION_IMAGES, stratify=digits.labels[train_rows], random_state=seed
    )
    calibration_rows = calibration_rows[np.lexsort((calibration_rows, digits.labels[calibration_rows]))]
    return digits.take(train_rows), digits.take(calibration_rows), digits.take(np.sort(validation_rows))


def to_input(images: Array) -> Array:
    """uint8 [N,8,8,1] -> float32 [N,1,8,8]: the preset `digits`."""
    scaled = (images.astype(np.float32) / 255 - 0.5) / 0.5
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def shifted(images: Array, rng: np.random.Generator) -> Array:
    """Each image moved by -1, 0 or 1 pixel along both axes, black shifted in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.arange(8) + rng.integers(0, 3, (len(images), 1))  # [N,8]
    columns = np.arange(8) + rng.integers(0, 3, (len(images), 1))
    moved: Array = padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


def train(build: Callable[[], nn.Module], digits: Digits, seed: int, epochs: int, batch: int = 64) -> nn.Module:
    """Train by SGD with a one-cycle schedule and return the net in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = build()
    steps = len(digits.labels) // batch
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * steps)
    for _ in range(epochs):
        order = rng.permutation(len(digits.labels))
        for rows in order[: steps * batch].reshape(steps, batch):
            x = torch.from_numpy(to_input(shifted(digits.images[rows], rng)))
            loss = F.cross_entropy(net(x), torch.from_numpy(digits.labels[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def check(net: nn.Module, path: Path, digits: Digits) -> float:
    """Check the file against the net and the promises of the manifest; return its top-1 in onnxruntime."""
    x = to_input(digits.images)
    logits = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"input": x})[0]
    with torch.no_grad():
        difference = float(np.abs(logits - net(torch.from_numpy(x)).numpy()).max())
    top1 = float((logits.argmax(axis=1) == digits.labels).mean())
    if difference > EXPORT_TOLERANCE:
        raise SystemExit(f"{path}: onnxruntime and torch differ by {difference:.1e}, over {EXPORT_TOLERANCE:.0e}")
    if top1 < MIN_TOP1:
        raise SystemExit(f"{path}: validation top-1 is {top1:.4f}, below {MIN_TOP1}; train longer (--epochs)")
    return top1


def write_data(folder: Path, calibration: Digits, validation: Digits) -> None:
    """Write the image folder (a sub-folder a class) and the two .npz files."""
    images = folder / "digits_calibration"
    shutil.rmtree(images, ignore_errors=True)
    for image, label, index in zip(calibration.images, calibration.labels, calibration.index, strict=True):
        path = images / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(path)
    for name, digits in (("calibration", calibration), ("validation", validation)):
        np.savez_compressed(folder / f"digits_{name}.npz", images=digits.images, labels=digits.labels)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    training, calibration, validation = load_splits(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    write_data(args.output / "data", calibration, validation)

    models = []
    for family, build in FAMILIES.items():
        net = train(build, training, args.seed, args.epochs)
        path = args.output / f"digits_{family}.onnx"
        path.write_bytes(exported(net, (1, 8, 8)))
        top1 = check(net, path, validation)
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{path.name}: {parameters} parameters, {path.stat().st_size} bytes, validation top-1 {top1:.4f}")
        models.append(
            {
                "file": path.name,
                "family": family,
                "parameters": parameters,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "validation_top1": round(top1, 6),
                "opset": OPSET,
            }
        )
    manifest = {
        "generator": "tools/train/models.py",
        "seed": args.seed,
        "epochs": args.epochs,
        "torch": torch.__version__,
        "source": "sklearn.datasets.load_digits (UCI optical recognition of handwritten digits, CC BY 4.0)",
        "split": {
            "training": len(training.labels),
            "calibration": len(calibration.labels),
            "calibration_is_part_of": "training",
            "validation": len(validation.labels),
        },
        "data": {
            "calibration_folder": "data/digits_calibration",
            "calibration_npz": "data/digits_calibration.npz",
            "validation_npz": "data/digits_validation.npz",
        },
        "preprocessing": {
            "preset": "digits",
            "formula": "(pixel / 255 - 0.5) / 0.5",
            "scale": 1 / 255,
            "mean": [0.5],
            "std": [0.5],
            "size": [8, 8],
            "channels": "grey",
            "layout": "NCHW",
            "dtype": "float32",
        },
        "input": {"name": "input", "shape": ["N", 1, 8, 8]},
        "output": {"name": "logits", "shape": ["N", 10]},
        "models": models,
    }
    (args.output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
