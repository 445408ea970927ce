"""The precision of detectors, as a user measures it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.detectors import BOXES, annotations, detector, write_annotations, write_images
from tests.end_to_end.conftest import DENSE, VALIDATION, cli

pytest.importorskip("pycocotools", reason="pycocotools is not installed")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two versions of a detector, of which the second misses one of two classes, images and their boxes."""
    onnx.save(detector(), tmp_path / "dense.onnx")
    onnx.save(detector([(*BOXES[0][:5], 0.0), BOXES[1]]), tmp_path / "pruned.onnx")
    write_images(tmp_path / "images")
    write_annotations(tmp_path / "boxes.json", annotations())
    return tmp_path


SCORED = ("--data", "images", "--preset", "yolov5", "--annotations", "boxes.json", "--decode", "yolov5", "--threads", 1)


def test_one_model(place: Path) -> None:
    done = cli("evaluate", "pruned.onnx", *SCORED, "--dense", "dense.onnx", "--json", cwd=place)
    assert (done.code, done.err) == (0, "")
    assert done.json["model"] == "pruned.onnx"
    assert done.json["samples"] == 3
    assert done.json["mean_ap"] == pytest.approx(0.5)
    assert done.json["mean_ap50"] == pytest.approx(0.5)
    assert done.json["snr_db"] is not None
    assert done.json["detector"] == {
        "annotations": "boxes.json",
        "decode": "yolov5",
        "nms_iou": None,
        "category_ids": False,
    }


def test_models_side_by_side(place: Path) -> None:
    done = cli("evaluate", "dense.onnx", "pruned.onnx", *SCORED, "--json", cwd=place)
    assert [item["model"] for item in done.json["models"]] == ["dense.onnx", "pruned.onnx"]
    assert [item["mean_ap"] for item in done.json["models"]] == pytest.approx([1.0, 0.5])
    table = [line.split() for line in cli("evaluate", "dense.onnx", "pruned.onnx", *SCORED, cwd=place).out.splitlines()]
    assert ["3", "samples", "dense.onnx", "pruned.onnx"] in table
    assert ["mAP@[.5:.95]", "100.0%", "50.0%"] in table
    assert ["mAP@.5", "100.0%", "50.0%"] in table


def test_classifiers_side_by_side() -> None:
    done = cli("evaluate", DENSE, DENSE, "--data", VALIDATION, "--preset", "digits", "--samples", 64, "--json")
    first, second = done.json["models"]
    assert first == second
    assert first["top1"] > 0.9


def test_a_bar_on_precision(place: Path) -> None:
    met = cli("check", "dense.onnx", *SCORED, "--min-mean-ap", 0.9, "--min-mean-ap50", 0.9, cwd=place)
    assert met.code == 0, met.err
    missed = cli("check", "pruned.onnx", *SCORED, "--min-mean-ap", 0.9, cwd=place)
    assert missed.code == 1
    assert "mean_ap 0.5 is below min-mean-ap 0.9" in missed.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--preset yolov5 --annotations boxes.json", "give --decode, one of yolox, yolov5"),
        ("--preset yolov5 --decode yolov5", "give --annotations FILE.json, too"),
        (
            "--preset yolov5 --annotations boxes.json --decode yolo",
            "--decode",
        ),
        ("--preset yolov5 --annotations boxes.json --decode yolox", "cannot be decoded so"),
        ("--preset yolov5 --annotations no.json --decode yolov5", "No such file"),
        ("--preset yolov5 --annotations dense.onnx --decode yolov5", "in COCO's format"),
        ("--preset yolov5 --annotations none.json --decode yolov5", "none of the 3 images"),
        ("--annotations boxes.json --decode yolov5", "nothing says how to normalise"),
        ("no.onnx --annotations boxes.json --decode yolov5", "no.onnx"),
    ],
)
def test_bad_usage(place: Path, line: str, words: str) -> None:
    write_annotations(place / "none.json", annotations({"x.png": (64, 64)}))
    assert words in cli("evaluate", "dense.onnx", *line.split(), "--data", "images", cwd=place).error


def test_a_detector_is_repaired_on_its_images(place: Path) -> None:
    """Boxes are no part of a repair: only the images are read, as the detector wants them."""
    pruned = cli("prune", "dense.onnx", "-o", "half.onnx", "--sparsity", 0.5, cwd=place)
    assert pruned.code == 0, pruned.err
    (place / "list.txt").write_text("images/a.png\nimages/c.png\n")
    options = ("--data", "list.txt", "--preset", "yolov5", "--method", "refit", "--threads", 1, "--force", "--json")
    done = cli("repair", "half.onnx", "-o", "repaired.onnx", "--dense", "dense.onnx", *options, cwd=place)
    assert done.code in (0, 1), done.err
    assert json.loads(done.out)["preprocessing"]["letterbox"] == "model"
    assert (place / "repaired.onnx").exists()
