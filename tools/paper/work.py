"""The folder in which tools/paper/reproduce.py keeps its images, its nets and the finished cells of its grid."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NETS = ("resnet18", "resnet50", "densenet121", "vgg16")


@dataclass(frozen=True)
class Images:
    """uint8 pixels [N, H, W, C] and classes [N], in an order that mixes the classes."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def head(self, count: int) -> Images:
        """The first `count` images.

        Raises:
            SystemExit: When there are fewer.
        """
        if count > len(self.labels):
            raise SystemExit(f"{count} images were asked for, and there are {len(self.labels)}: ask for fewer")
        return Images(self.pixels[:count], self.labels[:count])


@dataclass(frozen=True)
class Work:
    """The folder. Every file is written under another name and then renamed, so that no file is ever incomplete."""

    folder: Path

    def net(self, name: str) -> Path:
        """Path of a trained net."""
        return self.folder / f"{name}.onnx"

    def record(self, name: str) -> Path:
        """Path of the record of its training: settings and accuracy."""
        return self.folder / f"{name}.json"

    def digest(self, name: str) -> str:
        """SHA-256 of a trained net. Cells belong to one digest, so training a net again invalidates its cells."""
        return hashlib.sha256(self.net(name).read_bytes()).hexdigest()

    def nets(self) -> list[str]:
        """Names of the trained nets: those of the paper in its order, then all others."""
        found = {path.stem for path in self.folder.glob("*.onnx")} & {path.stem for path in self.folder.glob("*.json")}
        return [name for name in NETS if name in found] + sorted(found - set(NETS))

    def images(self, part: str, archive: Path) -> Images:
        """One part of the images ("train", "test"); the archive is read only once."""
        path = self.folder / f"{part}.npz"
        if not path.exists():
            images = unpack(archive, part)
            content = io.BytesIO()
            np.savez(content, images=images.pixels, labels=images.labels)
            write(path, content.getvalue())
        with np.load(path) as arrays:
            return Images(arrays["images"], arrays["labels"])

    def finish(
        self, net: str, sparsity: str, name: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> str | None:
        """Compute a cell, store it and describe it in a line; None if it is stored with the same settings."""
        path = self.folder / "cells" / net / f"{sparsity} {name}.json".replace(":", "-")
        if done_before(path, settings):
            return None
        started = time.perf_counter()
        values = compute()
        seconds = round(time.perf_counter() - started, 2)
        key = {"net": net, "sparsity": sparsity, "name": name}
        write_json(path, {**key, **values, "seconds": seconds, "settings": settings})
        return f"{net} {sparsity} {name}: {values} {seconds:.0f} s"

    def cells(self) -> Iterator[dict[str, Any]]:
        """The finished cells of all trained nets."""
        for name in self.nets():
            digest = self.digest(name)
            for path in sorted(self.folder.glob(f"cells/{name}/*.json")):
                cell = read_json(path)
                if cell["settings"]["dense"] == digest:
                    yield cell


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def merged_cells(data: Path, work: Path | None, key_of: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, Any]]:
    """The cells of a JSON file by their keys, with those of a work folder, which replace them in the file too."""
    known = {key_of(cell): cell for cell in read_json(data)["cells"]} if data.exists() else {}
    if work is not None:
        known |= {key_of(cell): cell for cell in map(read_json, sorted(work.glob("*/*.json")))}
        write_json(data, {"cells": [known[key] for key in sorted(known)]})
    return known


def done_before(path: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a record with these settings exists."""
    return path.exists() and read_json(path)["settings"] == json.loads(json.dumps(settings))


def unpack(archive: Path, part: str) -> Images:
    """One part of an archive PART/CLASS/*.jpg, shuffled; classes are numbered by name."""
    if not archive.exists():
        raise SystemExit(f"{archive} is missing: name an archive of CIFAR-10 (PART/CLASS/*.jpg) with --archive")
    found: dict[tuple[str, str], NDArray[np.uint8]] = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name)
            content = files.extractfile(member)
            if content is not None and name.parts[0] == part:
                found[name.parent.name, name.name] = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
    names = sorted(found)
    classes = sorted({label for label, _ in names})
    order = np.random.default_rng(0).permutation(len(names))
    pixels = np.stack([found[name] for name in names])
    return Images(pixels[order], np.array([classes.index(label) for label, _ in names])[order])
