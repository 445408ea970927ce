"""Class indices from a text table: one row per image, its name in one column and its class index in another.

The columns need not be declared: a reading is a pair of columns that gives every image exactly one class. Images are
looked up by their path in the folder, then by file name, then by file name without extension. Two readings that give
different classes make the table ambiguous, which is an error.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from onnx_asr.arrays import Integers
from onnx_asr.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"})

_CLASS_HEADERS = frozenset({"label", "labels", "class", "class_index", "class_id", "class index", "target"})


def read_labels(path: Path, names: Sequence[str]) -> Integers:
    """Read the class index of each image from a TSV or CSV file.

    Args:
        path: The table: separated by tabs, commas, semicolons or spaces, with or without a header row. Rows for other
            images, and columns that are neither name nor class, are ignored.
        names: The images' paths in their folder, with forward slashes.

    Raises:
        DataError: The file cannot be read, does not cover every image, or is ambiguous.
    """
    rows = _read_rows(path)
    names = [os.fsencode(name).decode(errors="surrogateescape") for name in names]  # as the table has them
    # A row of data holds a class index, so a whole number.
    header = [] if any(map(_is_index, rows[0])) else [cell.lower() for cell in rows.pop(0)]
    columns = list(zip(*rows, strict=True))
    class_columns = _class_columns(columns, header, path)
    readings: dict[tuple[int, int], list[int]] = {}
    problem, most_found = "it needs two columns", -1
    for form in (_path, _file_name, _stem):
        keys = [form(name) for name in names]
        if len(set(keys)) < len(keys):
            continue  # images of one file name in different sub-folders: only their paths differ
        wanted = set(keys)
        for pair in itertools.product(range(len(columns)), class_columns):
            if pair[0] == pair[1]:
                continue
            table: dict[str, set[int]] = {}
            for cell, index in zip(*(columns[number] for number in pair), strict=True):
                if (key := form(cell)) in wanted:
                    table.setdefault(key, set()).add(int(index))
            missing = next((name for name, key in zip(names, keys, strict=True) if key not in table), None)
            repeated = next((key for key, indices in table.items() if len(indices) > 1), None)
            if missing is None and repeated is None:
                readings[pair] = [index for key in keys for index in table[key]]
            elif len(table) > most_found:
                most_found = len(table)
                problem = f"{missing!r} is missing ({len(table)} of {len(keys)} images are listed): add the rest"
                if repeated is not None:
                    problem = f"{repeated!r} has more than one class: keep one row of it"
        if readings:
            break

    if not readings:
        raise DataError(f"{path} does not give every image one class index: {problem}")
    (first, labels), *others = readings.items()
    for other, different in others:
        if different != labels:
            raise DataError(
                f"{path} can be read in two ways: name and class in columns {first[0] + 1} and {first[1] + 1}, or "
                f"{other[0] + 1} and {other[1] + 1}: add a header row that calls the class column 'label'"
            )
    return np.array(labels, np.int64)


def _read_rows(path: Path) -> list[list[str]]:
    """The non-empty rows of a table, cells stripped, all of one length."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        delimiter = next((mark for mark in "\t,;" if lines and mark in lines[0]), " ")
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the labels file {path}: {error}; give a TSV or CSV file in UTF-8") from error
    if not rows:
        raise DataError(f"the labels file {path} is empty: give a row of file name and class index for each image")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise DataError(
                f"{path}: row {number} has {len(row)} columns, the first row has {len(rows[0])}: "
                "give every row the same columns"
            )
    return rows


def _class_columns(columns: Sequence[Sequence[str]], header: Sequence[str], path: Path) -> list[int]:
    """Columns that can hold the class: those of whole numbers, narrowed down by the header where it names one."""
    found = [number for number, cells in enumerate(columns) if all(map(_is_index, cells))]
    if not found:
        raise DataError(
            f"{path} has no column of class indices: give one that holds a whole number from 0 up in every row"
        )
    return [number for number in found if header and header[number] in _CLASS_HEADERS] or found


def _is_index(cell: str) -> bool:
    return cell.isascii() and cell.isdecimal() and len(cell) < 19  # fits an int64


def _path(text: str) -> str:
    return text.replace("\\", "/").removeprefix("./")


def _file_name(text: str) -> str:
    return _path(text).rpartition("/")[2]


def _stem(text: str) -> str:
    file = PurePosixPath(_file_name(text))
    return file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name
