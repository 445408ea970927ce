"""Label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_asr.data import open_data
from onnx_asr.data.labels import read_labels
from onnx_asr.errors import DataError, OptionError
from tests.unit.data.samples import RGB8, UNIT, pixels


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
    with pytest.raises(OptionError, match=r"needs images in files: put 'labels' beside the arrays"):
        open_data(pixels(2, 8, 8, 3), [RGB8], preprocessing=UNIT, labels=tmp_path / "bytes.tsv")
