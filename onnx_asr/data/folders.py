"""Image files: those of a folder, of a COCO or VOC data set, or of a text file with one path per line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from onnx_asr.arrays import Integers
from onnx_asr.data.labels import IMAGE_SUFFIXES
from onnx_asr.errors import DataError

LIST_SUFFIX = ".txt"
_COCO = ("annotations/*.json", "instances_*.json", "*.coco.json", "*/*.coco.json")
"""Annotations of a COCO data set, where they are usually kept."""
_VOC_IMAGES, _VOC_BOXES = "JPEGImages", "Annotations"
_ANNOTATIONS = "annotations"


@dataclass(frozen=True)
class ImageFiles:
    """Image files in the order of their names.

    Attributes:
        root: The folder that the names are relative to.
        names: Paths with forward slashes.
        is_flat: Whether the sub-folders say nothing about classes.
    """

    root: Path
    names: list[str]
    is_flat: bool = False

    @classmethod
    def of(cls, source: Path) -> ImageFiles:
        """The images of a folder, or those that a text file lists.

        Raises:
            DataError: When there are none, a folder cannot be listed, or the text file names something else.
        """
        if not source.is_dir():
            return cls(source.parent, _listed(source), is_flat=True)
        names = _found(source)
        if not names:
            raise DataError(f"{source} holds no images: give files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
        photographs = _of_voc(source, names)
        if photographs:
            return cls(source, photographs, is_flat=True)
        if any(next(source.glob(pattern), None) is not None for pattern in _COCO):
            return cls(
                source, [name for name in names if not name.startswith(f"{_ANNOTATIONS}/")] or names, is_flat=True
            )
        return cls(source, names)

    def without(self, names: Sequence[str]) -> ImageFiles:
        """All but some of them."""
        return ImageFiles(self.root, [name for name in self.names if name not in set(names)], self.is_flat)

    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    def classes(self) -> tuple[Integers, tuple[str, ...]] | None:
        """The class of each image by its sub-folder, and the names of classes that are numbered by their order.

        A class is the name of its sub-folder if all names are whole numbers, else its position in sorted order.

        Raises:
            DataError: When images lie beside sub-folders of images.
        """
        loose = [name for name in self.names if "/" not in name]
        if self.is_flat or len(loose) == len(self.names):
            return None
        folders = (entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        classes = tuple(sorted(folders))
        if loose:
            raise DataError(
                f"{self.root} holds images ({loose[0]}) beside sub-folders of images: put all of them into one folder, "
                "or into one sub-folder per class, or pass --labels"
            )
        numbered = all(name.isascii() and name.isdecimal() for name in classes)
        if len(classes) == 1 and not numbered:
            return None  # one sub-folder alone is not a class
        index = {name: int(name) if numbered else position for position, name in enumerate(classes)}
        labels = np.array([index[name.partition("/")[0]] for name in self.names], np.int64)
        return labels, () if numbered else classes


def images_of(source: Path) -> list[Path]:
    """The files that are read as images where a folder or a list of paths is given; none where something else is.

    Raises:
        DataError: When they cannot be listed.
    """
    if source.is_dir():
        return [source / name for name in _found(source)]
    return ImageFiles.of(source).paths() if is_list(source) else []


def is_list(source: Path) -> bool:
    """Whether a file lists paths."""
    return source.suffix.lower() == LIST_SUFFIX and source.is_file()


def _found(root: Path) -> list[str]:
    """The image files under a folder, hidden ones aside, as sorted paths with forward slashes."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(
            f"cannot list the folder {error.filename}: {error.strerror}. Make it readable or remove it"
        ) from error

    names = []
    entered = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in entered:  # a link back up
            subfolders.clear()
            continue
        entered.add(real)
        names += [
            (Path(folder) / file).relative_to(root).as_posix()
            for file in files
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(names)


def _of_voc(root: Path, names: Sequence[str]) -> list[str]:
    """The photographs of VOC data sets, whose other folders hold masks; none where the folder has no such set."""
    sets = {
        parent
        for folder in {PurePosixPath(name).parent for name in names}
        for parent in (folder, *folder.parents)
        if parent.name == _VOC_IMAGES and (root / parent.parent / _VOC_BOXES).is_dir()
    }
    return [name for name in names if not sets.isdisjoint(PurePosixPath(name).parents)]


def _listed(file: Path) -> list[str]:
    """The paths in a text file, each relative to its folder or absolute."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read the list {file}: {error.strerror}; give a text file with one path per line"
        ) from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        what = f"{file}, line {number}: '{name[:200]}'"
        try:
            known = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and (file.parent / name).is_file()
        except (OSError, ValueError):  # too long, or with a null
            known = False
        if not known:
            raise DataError(
                f"{what} is no image file: give one path per line, relative to the folder of the list, that ends in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if name in seen:
            raise DataError(f"{what} is in line {seen[name]}, too: list every image once")
        seen[name] = number
    if not seen:
        raise DataError(f"the list {file} is empty: give one path of an image per line")
    return list(seen)
