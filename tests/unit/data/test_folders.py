"""Where images are: data sets of COCO and VOC, lists of paths, and several places at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_asr.data import PRESETS, open_data
from onnx_asr.errors import DataError, OptionError
from tests.unit.data.samples import RGB8, UNIT, VECTOR, pixels, write_image


def names(source: Any, **options: Any) -> tuple[str, ...]:
    dataset = open_data(source, [RGB8], preprocessing=UNIT, **options)
    assert dataset.labels is None
    return dataset.names


def fill(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        write_image(root / path, pixels(8, 8, 3, seed=seed))
    return root


@pytest.mark.parametrize(
    "annotations", ["annotations/instances_val2017.json", "instances_val.json", "val/_annotations.coco.json"]
)
def test_folder_of_coco(tmp_path: Path, annotations: str) -> None:
    fill(tmp_path, "val/2.png", "val/1.png", "train/3.png", "annotations/panoptic_val/1.png")
    classes = open_data(tmp_path, [RGB8], preprocessing=UNIT).labels
    assert classes is not None  # without annotations these are folders of classes
    assert len(classes) == 4
    (tmp_path / annotations).write_text("{}")
    assert names(tmp_path) == ("train/3.png", "val/1.png", "val/2.png")


@pytest.mark.parametrize("above", ["", "VOC2007/", "VOCdevkit/VOC2012/"])
def test_folder_of_voc(tmp_path: Path, above: str) -> None:
    fill(
        tmp_path / above, "JPEGImages/b.png", "JPEGImages/a.png", "SegmentationClass/a.png", "SegmentationObject/a.png"
    )
    assert open_data(tmp_path, [RGB8], preprocessing=UNIT).names != (
        f"{above}JPEGImages/a.png",
        f"{above}JPEGImages/b.png",
    )
    (tmp_path / above / "Annotations").mkdir()
    assert names(tmp_path) == (f"{above}JPEGImages/a.png", f"{above}JPEGImages/b.png")


def test_two_sets_of_voc_in_one_folder(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        fill(tmp_path / year, "JPEGImages/a.png", "SegmentationClass/a.png")
        (tmp_path / year / "Annotations").mkdir()
    assert names(tmp_path) == ("VOC2007/JPEGImages/a.png", "VOC2012/JPEGImages/a.png")


def test_list_of_paths(tmp_path: Path, folder: Path) -> None:
    listed = tmp_path / "lists" / "train.txt"
    listed.parent.mkdir()
    listed.write_text(f"\ufeff../images/c.png\r\n\n  ../images/a.png  \n{folder / 'b.png'}\n", encoding="utf-8")
    dataset = open_data(listed, [RGB8], preprocessing=UNIT)
    assert dataset.names == ("../images/c.png", "../images/a.png", str(folder / "b.png"))
    whole = open_data(folder, [RGB8], preprocessing=UNIT)
    for mine, other in ((0, 2), (1, 0), (2, 1)):
        assert np.array_equal(dataset.load(mine)["input"], whole.load(other)["input"])
    assert dataset.labels is None
    table = tmp_path / "labels.csv"
    table.write_text("a.png,4\nb.png,5\nc.png,6\n")
    labelled = open_data(listed, [RGB8], preprocessing=UNIT, labels=table).labels
    assert labelled is not None
    assert labelled.tolist() == [6, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the list .*list\.txt is empty: give one path of an image per line"),
        ("a.png\nd.png\n", r"list\.txt, line 2: 'd\.png' is no image file: give one path per line, relative to"),
        ("a.png 3\n", r"line 1: 'a\.png 3' is no image file"),
        ("a.png\n\nb.png\na.png\n", r"line 4: 'a\.png' is in line 1, too: list every image once"),
        ("list.txt\n", r"line 1: 'list\.txt' is no image file"),
        (".\n", r"line 1: '\.' is no image file"),
        ("x" * 5000 + ".png\n", r"line 1: 'x{200}' is no image file"),
        ("a\0.png\n", r"line 1: .* is no image file"),
    ],
)
def test_lists_refused(folder: Path, text: str, message: str) -> None:
    (folder / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(folder / "list.txt", [RGB8], preprocessing=UNIT)


def test_broken_images_of_a_list_are_skipped(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"no image")
    (folder / "list.txt").write_text("c.png\nb.png\n")
    dataset = open_data(folder / "list.txt", [RGB8], preprocessing=UNIT, skip_bad_images=True)
    assert (dataset.names, dataset.unreadable) == (("c.png",), ("b.png",))


def test_several_places(tmp_path: Path, folder: Path) -> None:
    other = fill(tmp_path / "other", "x.png", "y.png")
    stored = tmp_path / "stored.npz"
    np.savez(stored, images=pixels(2, 8, 8, 3, seed=9))
    (tmp_path / "list.txt").write_text("images/b.png\n")
    places: list[Any] = [str(other), folder, stored, tmp_path / "list.txt"]
    dataset = open_data(places, [RGB8], preprocessing=UNIT)
    assert len(dataset) == 8
    assert dataset.labels is None
    assert dataset.names[:3] == (f"{other}/x.png", f"{other}/y.png", f"{folder}/a.png")
    assert dataset.names[5:] == (f"{stored}/#0", f"{stored}/#1", f"{tmp_path}/list.txt/images/b.png")
    parts = [open_data(place, [RGB8], preprocessing=UNIT) for place in places]
    singles = [part.load(index)["input"] for part in parts for index in range(len(part))]
    order = [7, 0, 3, 5, 4, 2, 6, 1]
    assert np.array_equal(dataset.batch(order)["input"], np.stack([singles[index] for index in order]))
    assert np.array_equal(dataset.load(5)["input"], singles[5])
    thumbnail, frame = dataset.thumbnail(3), dataset.frame(3)
    assert thumbnail is not None
    assert np.array_equal(np.asarray(thumbnail), pixels(8, 8, 3, seed=1))
    assert frame is not None
    assert frame.image == (8, 8)
    assert dataset.preprocessing == parts[0].preprocessing
    assert open_data((folder,), [RGB8], preprocessing=UNIT).names == ("a.png", "b.png", "c.png")


def test_labels_of_several_places(tmp_path: Path) -> None:
    for place in ("A", "B"):
        fill(tmp_path / place, f"cat/{place}1.png", f"dog/{place}2.png")
    fill(tmp_path / "C", "cat/C1.png", "fox/C2.png")
    fill(tmp_path / "D", "7/D1.png")
    fill(tmp_path / "E", "8/E1.png", "2/E2.png")

    def labels(*places: str, **options: Any) -> list[int] | None:
        found = open_data([tmp_path / place for place in places], [RGB8], preprocessing=UNIT, **options).labels
        return None if found is None else found.tolist()

    assert labels("A", "B") == [0, 1, 0, 1]
    assert labels("A", "C") is None  # class 1 would be two things
    assert labels("D", "E") == [7, 2, 8]
    assert labels("A", "D") is None
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"{name},{number}\n" for number, name in enumerate(("A1", "A2", "C1", "C2"))))
    assert labels("A", "C", labels=table) == [0, 1, 2, 3]


def test_broken_images_of_several_places(tmp_path: Path, folder: Path) -> None:
    other = fill(tmp_path / "other", "x.png", "y.png")
    (other / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png cannot be read as an image"):
        open_data([folder, other], [RGB8], preprocessing=UNIT)
    dataset = open_data([folder, other], [RGB8], preprocessing=UNIT, skip_bad_images=True)
    assert dataset.names[3:] == (f"{other}/y.png",)
    assert dataset.unreadable == (f"{other}/x.png",)


def test_several_places_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"images is given twice: give every folder or file of samples once"):
        open_data([folder, folder / ".." / "images"], [RGB8], preprocessing=UNIT)
    with pytest.raises(DataError, match=r"images lies in .*, whose images are read with it: give only one of them"):
        open_data([tmp_path, folder], [RGB8], preprocessing=UNIT)
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        open_data([folder, tmp_path / "nowhere"], [RGB8], preprocessing=UNIT)
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4), np.float32))
    with pytest.raises(DataError, match=r"images holds images|has no height"):
        open_data([folder, tmp_path / "a.npz"], [VECTOR], preprocessing=PRESETS["unit"])
    np.save(tmp_path / "b.npy", pixels(2, 8, 8, 3))
    (tmp_path / "labels.csv").write_text("a,1\nb,2\nc,3\n")
    with pytest.raises(OptionError, match=r"needs images in files"):
        open_data([folder, tmp_path / "b.npy"], [RGB8], preprocessing=UNIT, labels=tmp_path / "labels.csv")
