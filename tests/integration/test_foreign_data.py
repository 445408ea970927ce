"""Whole runs on data that other libraries give: every source of the same images has the same result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader
from PIL import Image

import onnx_asr
from tests.graphs import digits, pruned
from tools.paths import MODELS

STEPS = onnx_asr.Preprocessing.from_options(preset="digits")
OPTIONS = onnx_asr.RepairOptions(method="paired", samples=96, verify_samples=32)
with np.load(MODELS / "data" / "digits_calibration.npz") as archive:
    PIXELS = archive["images"][:128]
TENSORS = ((PIXELS / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2)


class Calibration(CalibrationDataReader):
    """A reader of onnxruntime's own class, with the usual rewind."""

    def __init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        self.batches = iter(np.split(TENSORS, 8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch}


def images() -> list[Image.Image]:
    return [Image.fromarray(image[..., 0]) for image in PIXELS]


def torch_loader() -> Any:
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(TENSORS), torch.zeros(len(TENSORS), dtype=torch.int64))
    return torch.utils.data.DataLoader(data, batch_size=20)


def torch_dataset() -> Any:
    torch = pytest.importorskip("torch")
    return torch.utils.data.TensorDataset(torch.from_numpy(TENSORS).requires_grad_())


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images(), "label": [0] * len(PIXELS)}, features=features)


def hugging_face_stream() -> Any:
    return hugging_face().to_iterable_dataset()


def hugging_face_arrays() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"input": list(TENSORS)}).with_format("numpy")


def tensorflow() -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((PIXELS, np.zeros(len(PIXELS), np.int64))).batch(16)


TENSOR_SOURCES: dict[str, Any] = {
    "onnxruntime": Calibration,
    "torch loader": torch_loader,
    "torch data set": torch_dataset,
    "arrays of datasets": hugging_face_arrays,
    "a generator": lambda: ({"input": batch} for batch in np.split(TENSORS, 16)),
}
IMAGE_SOURCES: dict[str, Any] = {
    "datasets": hugging_face,
    "a stream of datasets": hugging_face_stream,
    "tf.data": tensorflow,
    "images": images,
}


def repaired(source: Any, preprocessing: onnx_asr.Preprocessing | None) -> onnx_asr.RepairResult:
    dense = digits("resnet")
    return onnx_asr.repair(pruned(dense, 0.8), source, OPTIONS, dense=dense, preprocessing=preprocessing)


@pytest.fixture(scope="module")
def expected() -> bytes:
    model: onnx.ModelProto = repaired({"images": PIXELS}, STEPS).model
    return model.SerializeToString()


@pytest.mark.parametrize("name", [*TENSOR_SOURCES, *IMAGE_SOURCES])
def test_the_same_images_from_another_source(name: str, expected: bytes) -> None:
    steps = STEPS if name in IMAGE_SOURCES else None
    source = ({**TENSOR_SOURCES, **IMAGE_SOURCES})[name]()
    result = repaired(source, steps)
    assert result.improved
    assert without_metadata(result.model) == without_metadata(onnx.load_from_string(expected))


def without_metadata(model: onnx.ModelProto) -> bytes:
    """A model without the record of the options."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    return copy.SerializeToString()


def test_an_endless_generator() -> None:
    read = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        for index in itertools.cycle(range(len(TENSORS))):
            read.append(index)
            yield {"input": TENSORS[index : index + 1]}

    result = repaired(endless(), None)
    assert len(read) == 128
    assert result.calibration_samples == 96
    assert any("only the first 128 samples of the data were read" in note for note in result.notes)
    read.clear()
    dense = digits("resnet")
    measured = onnx_asr.evaluate(dense, endless(), dense=dense, samples=40)
    assert (measured.samples, len(read)) == (40, 40)
    sparse = onnx_asr.compress(dense, endless(), onnx_asr.CompressOptions(0.5, rounds=1, repair=OPTIONS))
    assert sparse.repair.calibration_samples == 96


def test_accuracy_on_classes_that_come_with_the_samples() -> None:
    with np.load(MODELS / "data" / "digits_validation.npz") as file:
        pixels, labels = file["images"], file["labels"]
    rows = (
        {"image": Image.fromarray(image[..., 0]), "label": label} for image, label in zip(pixels, labels, strict=True)
    )
    dense = digits("resnet")
    found = onnx_asr.evaluate(dense, rows, preprocessing=STEPS)
    assert found == onnx_asr.evaluate(dense, {"images": pixels, "labels": labels}, preprocessing=STEPS)
    assert found.top1 is not None
