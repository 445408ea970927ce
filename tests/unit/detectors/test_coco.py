"""Annotations in COCO's format: what is read, refused and scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_asr.detectors import coco
from onnx_asr.detectors.boxes import Boxes
from onnx_asr.detectors.coco import Annotations
from onnx_asr.errors import DataError, OptionError

pytest.importorskip("pycocotools", reason="pycocotools is not installed")


def content(**changes: Any) -> dict[str, Any]:
    """Two images; a box of category 7 on each, and one of category 9 on the second."""
    boxes = [(10, 7, [10, 10, 40, 40]), (11, 7, [0, 0, 30, 30]), (11, 9, [50, 50, 40, 20])]
    return {
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 11, "file_name": "val/b.jpg"},
        ],
        "categories": [{"id": 9, "name": "late"}, {"id": 7, "name": "early"}],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, category, box) in enumerate(boxes)  # from 0, which pycocotools takes for none
        ],
        **changes,
    }


def boxes(*rows: tuple[float, ...]) -> Boxes:
    """From rows of left, top, right, bottom, category, score."""
    values = np.array(rows, np.float64).reshape(-1, 6)
    return Boxes(values[:, :4], values[:, 5], values[:, 4].astype(np.int64))


RIGHT = {10: boxes((10, 10, 50, 50, 7, 0.9)), 11: boxes((0, 0, 30, 30, 7, 0.8), (50, 50, 90, 70, 9, 0.7))}


def test_all_boxes_found() -> None:
    precision = Annotations.of(content()).precision(RIGHT)
    assert precision.mean_ap == pytest.approx(1.0)
    assert precision.mean_ap50 == pytest.approx(1.0)


def test_precision_by_hand() -> None:
    """Of category 7 one box overlaps by 0.75 (6 of the 10 thresholds), after a false one; category 9 is missed."""
    found = {
        10: boxes((10, 10, 40, 50, 7, 0.5)),  # 30 x 40 of 40 x 40
        11: boxes((60, 0, 99, 30, 7, 0.9)),
    }
    precision = Annotations.of(content()).precision(found)
    # Recall 1/2 at precision 1/2: at the recalls 0, 0.01, ... 0.5, which are 51 of 101, precision is 0.5.
    assert precision.mean_ap50 == pytest.approx(0.5 * 51 / 101 / 2)
    assert precision.mean_ap == pytest.approx(0.5 * 51 / 101 / 2 * 6 / 10)


def test_only_the_images_that_were_run_count() -> None:
    annotations = Annotations.of(content())
    assert annotations.precision({10: RIGHT[10]}).mean_ap == pytest.approx(1.0)
    assert annotations.precision({10: boxes(), 11: boxes()}).mean_ap == 0.0
    with pytest.raises(DataError, match="has no box on the 1 images that are scored"):
        Annotations.of(content(annotations=content()["annotations"][1:])).precision({10: RIGHT[10]})


def test_crowds_are_no_misses() -> None:
    crowded = content()
    crowded["annotations"][2]["iscrowd"] = 1
    found = {10: RIGHT[10], 11: boxes((0, 0, 30, 30, 7, 0.8))}
    assert Annotations.of(crowded).precision(found).mean_ap == pytest.approx(1.0)


def test_area_and_crowd_may_be_left_out() -> None:
    short = content()
    for box in short["annotations"]:
        del box["area"], box["iscrowd"], box["id"]
    assert Annotations.of(short).precision(RIGHT).mean_ap == pytest.approx(1.0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Annotations.of(content()).precision(RIGHT)
    assert capsys.readouterr() == ("", "")


def test_classes_of_a_model_are_categories() -> None:
    annotations = Annotations.of(content())
    found = boxes((0, 0, 1, 1, 0, 0.5), (0, 0, 2, 2, 1, 0.4))
    assert annotations.named(found, offset=0, are_categories=False).classes.tolist() == [7, 9]
    shifted = annotations.named(found, offset=1, are_categories=False)
    assert shifted.classes.tolist() == [7]
    assert shifted.corners.tolist() == [[0, 0, 2, 2]]
    ids = boxes((0, 0, 1, 1, 9, 0.5), (0, 0, 2, 2, 8, 0.4))
    assert annotations.named(ids, offset=0, are_categories=True).classes.tolist() == [9]
    with pytest.raises(DataError, match=r"finds class 2 .* has 2 categories: .*--label-offset 1.*--category-ids"):
        annotations.named(boxes((0, 0, 1, 1, 2, 0.5)), offset=0, are_categories=False)


def test_images_are_found_by_name() -> None:
    annotations = Annotations.of(content())
    assert set(annotations.matched(["x/a.jpg", "c.jpg", "/data/val/b.jpg"])) == {0, 2}
    assert annotations.matched(["train/b.jpg", "a.jpg"]).keys() == {1}
    assert annotations.matched(["a.jpg"])[0].size == (100, 80)
    with pytest.raises(DataError, match=r"one image for x/a\.jpg and y/a\.jpg: give the images of one folder"):
        annotations.matched(["x/a.jpg", "y/a.jpg"])
    with pytest.raises(DataError, match=r"none of the 2 images \(the first is #0\) is among the 2 of the set"):
        annotations.matched(["#0", "#1"])


def without(**changes: Any) -> dict[str, Any]:
    """Contents with an annotation changed."""
    changed = content()
    changed["annotations"][0] = {
        key: value for key, value in (changed["annotations"][0] | changes).items() if value != ""
    }
    return changed


TWICE = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "./a.jpg"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"cannot read the annotations file .*give a JSON file in COCO's format"),
        ("[" * 100_000, r"cannot read the annotations file"),
        ("[]", r"is not in COCO's format \(it is a list\)"),
        ("{}", r"it has no 'images'"),
        (json.dumps(content(images=[])), r"it has no images, or no categories"),
        (json.dumps(content(categories=[])), r"it has no images, or no categories"),
        (json.dumps(content(categories=None)), r"is not in COCO's format \(its 'categories' are no list\)"),
        (json.dumps(content(images={"a.jpg": 1})), r"its 'images' are no list"),
        (json.dumps(content(images=["a.jpg"])), r"entry 0 of its 'images' is no object"),
        (json.dumps(content(annotations=[[1]])), r"entry 0 of its 'annotations' is no object"),
        (json.dumps(content(images=[{"id": 1}])), r"it has no 'file_name'"),
        (json.dumps(content(images=[{"id": 1, "file_name": 3}])), r"a file name is 3"),
        (json.dumps(content(images=TWICE)), r"it has two images a\.jpg, with ids 1 and 2"),
        (json.dumps(without(bbox="")), r"it has no 'bbox'"),
        (json.dumps(without(bbox=[1, 2, 3])), r"is not in COCO's format \(not enough values"),
        (json.dumps(without(bbox=[1, 2, 3, float("nan")])), r"a box is not finite"),
        (json.dumps(without(image_id=12)), r"a box has an image or a category that is not listed"),
        (json.dumps(without(category_id=8)), r"a box has an image or a category that is not listed"),
    ],
)
def test_files_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Annotations.of(tmp_path / "a.json")


def test_missing_files_and_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read the annotations file .*a\.json: No such file"):
        Annotations.of(tmp_path / "a.json")
    monkeypatch.setattr(coco, "find_spec", lambda name: None if name == "pycocotools" else sys)
    with pytest.raises(OptionError, match=r"need pycocotools, .*: pip install onnx-resuscitate\[coco\]"):
        Annotations.of(content())
