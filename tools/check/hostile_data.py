"""Broken and hostile data for tools/check/fuzz.py: array files, folders of images, weights kept outside the model.

Whatever is made here follows from the generator that is given.
"""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

SIZE = 8
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MODES = ("L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "F", "LA")


def flipped(rng: random.Random, data: bytes) -> bytes:
    """One to 64 bits, half of the times near the start or the end, where there are few weights."""
    result = bytearray(data)
    for _ in range(2 ** rng.randrange(7)):
        near = rng.choice([len(data), len(data), 4096])
        place = rng.randrange(min(near, len(data)))
        result[place if rng.random() < 0.5 else -1 - place] ^= 1 << rng.randrange(8)
    return bytes(result)


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def spliced(rng: random.Random, data: bytes) -> bytes:
    """A piece copied over, put in, or taken out."""
    start, length, place = rng.randrange(len(data)), 2 ** rng.randrange(1, 14), rng.randrange(len(data))
    piece = data[start : start + length]
    over = data[:place] + piece + data[place + length :]
    return rng.choice([over, data[:place] + piece + data[place:], data[:start] + data[start + length :]])


def noise(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(2 ** rng.randrange(1, 16))


BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bits": flipped,
    "cut": truncated,
    "splice": spliced,
    "noise": noise,
}


def _spoilt(rng: random.Random, data: bytes) -> bytes:
    return BYTES[rng.choice(sorted(BYTES))](rng, data)


# --- array files ---


def _saved(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def _odd(rng: random.Random, images: NDArray[Any]) -> Any:
    """An array that is none of images, or no array of numbers at all."""
    kind = np.dtype(rng.choice(["c8", "M8[s]", "S9", "U3", "O", "?", "f2", "f8", "i8", ">f4", "V7", "u8,f4"]))
    shape = rng.choice([(), (0,), (6,), images.shape, images.shape[:3], (6, 3, 4, 0), (1, *images.shape), (6, 5, 5, 2)])
    if rng.random() < 0.3:
        worst: list[float] = [np.nan, np.inf, -1e38, 1e38]
        return np.full(images.shape, rng.choice(worst), np.float32)
    return np.zeros(shape, kind)


def _header(rng: random.Random, data: bytes) -> bytes:
    """An .npy file whose header says something else."""
    text = rng.choice(
        [
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 8, 8, 1), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (6, -8, 8, 1), }",
            "{'descr': '|u1', 'fortran_order': True, 'shape': (6, 8, 8, 1), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
            "{'descr': '<f8', 'fortran_order': 0, 'shape': 6}",
            "{'descr': [('a', '<f4', (9999999,))], 'fortran_order': False, 'shape': (6,)}",
            "{'shape': (6,)}",
            "__import__('os').getpid()",
            "(" * 9000,
        ]
    )
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(header), 65535)) + header + data


def _archive(rng: random.Random, members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(
        stream, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    ) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return stream.getvalue()


def spoilt_arrays(rng: random.Random, folder: Path) -> Path:
    """An .npz or .npy that is broken, or holds what it should not."""
    images = np.random.default_rng(rng.randrange(999)).integers(0, 256, (6, SIZE, SIZE, 1), np.uint8)
    labels = np.arange(6)
    one, how = rng.random() < 0.3, rng.choice(["bytes", "bytes", "bytes", "odd", "header", "names", "bomb"])
    if how == "bytes":
        save = rng.choice([np.savez, np.savez_compressed])
        data = _spoilt(rng, _saved(np.save, images) if one else _saved(save, images=images, labels=labels))
    elif how == "odd":
        odd = _odd(rng, images)
        named = {"images": images, "labels": labels} | {rng.choice(["images", "labels", "input"]): odd}
        data = _saved(np.save, odd) if one else _saved(np.savez, **named)
    elif how == "header":
        data = _header(rng, images.tobytes())
        data = data if one else _archive(rng, {"images.npy": data, "labels.npy": _saved(np.save, labels)})
    elif how == "names":
        one = False
        name = rng.choice(
            ["images", "../images.npy", "images.npy/", ".npy", "/etc/passwd.npy", "ä" * 300, "labels.npy"]
        )
        data = _archive(rng, {name: rng.choice([_saved(np.save, images), b"", b"text"])})
    else:
        one = False
        data = _saved(np.savez_compressed, images=np.zeros((1 << 17, SIZE, SIZE, rng.choice([1, 3])), np.uint8))
    path = folder / f"data.{'npy' if one else 'npz'}"
    path.write_bytes(data)
    return path


# --- images ---


def _image(rng: random.Random) -> bytes:
    mode, side = rng.choice(MODES), rng.choice([SIZE, SIZE, SIZE, 1, 30])
    pixels = np.random.default_rng(rng.randrange(999)).integers(0, 256, (side, side, 3), np.uint8)
    picture = Image.fromarray(pixels)
    stream = io.BytesIO()
    try:
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else picture.convert(mode)
        picture.save(stream, rng.choice(FORMATS))
    except (OSError, ValueError):  # not every format has every mode
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def spoilt_images(rng: random.Random, folder: Path) -> Path:
    """A folder of sound images, with broken ones and other things among them."""
    root = folder / "images"
    root.mkdir()
    for number in range(6):
        Image.fromarray(np.full((SIZE, SIZE), 40 * number, np.uint8)).save(root / f"sound{number}.png")
    for number in range(rng.randrange(1, 4)):
        path = root / f"spoilt{number}.{rng.choice(['png', 'jpg', 'bmp', 'gif', 'tif', 'webp', 'ppm', 'txt'])}"
        how = rng.choice(["bytes", "bytes", "bytes", "whole", "empty", "folder", "link", "pipe", "script", "name"])
        if how in ("bytes", "whole"):
            path.write_bytes(_spoilt(rng, _image(rng)) if how == "bytes" else _image(rng))
        elif how == "empty":
            path.touch()
        elif how == "folder":
            path.mkdir()
            (path / "inner.png").write_bytes((root / "sound1.png").read_bytes())
        elif how == "link":
            path.symlink_to(rng.choice([root, Path("nowhere"), path, Path("/dev/zero"), Path("/etc/passwd")]))
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "script":
            path.write_text(
                rng.choice(["%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "P6\n8 8\n", "P5 99999 99999 255\n"])
            )
        else:
            os.rename(root / "sound5.png", os.fsencode(root) + b"/\xff\xfe\n.png")
            break
    return root


def remove(path: Path) -> None:
    """Remove what is there, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


# --- weights outside the model ---


def outside(rng: random.Random, model: onnx.ModelProto, folder: Path) -> None:
    """Some weights are said to be in a file: one of the folder, one elsewhere, or none; at places that it may lack."""
    (folder / "sub").mkdir()
    (folder / "weights.bin").write_bytes(bytes(1 << 20))
    (folder / "link.bin").symlink_to("/etc/passwd")
    (folder / "out").symlink_to("/etc")
    os.mkfifo(folder / "pipe.bin")
    places = ["weights.bin", "weights.bin", "weights.bin", "./weights.bin", "sub/../weights.bin", "../weights.bin"]
    places += ["/etc/passwd", "../../etc/passwd", "link.bin", "out/passwd", "pipe.bin", "sub", "", ".", "no", "a\0b"]
    for tensor in rng.sample(list(model.graph.initializer), min(len(model.graph.initializer), rng.randrange(1, 4))):
        size = numpy_helper.to_array(tensor).nbytes
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": "weights.bin", "offset": "4096", "length": str(size)}
        for key in rng.sample(["location", "location", "offset", "length", "basepath", "none", "none"], 2):
            if key == "location":
                entries[key] = rng.choice(places)
            elif key == "offset":
                entries[key] = rng.choice(["0", "-1", "x", str(2**63), "1048576", "1e3"])
            elif key == "length":
                entries[key] = rng.choice(["0", "-5", str(2**40), "1"])
            elif key == "basepath":
                entries[key] = rng.choice(["/etc", "..", str(folder)])
            elif rng.random() < 0.2:
                del entries[rng.choice(sorted(entries))]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)


def reads_outside(path: Path) -> list[str]:
    """Locations of a model's weights that lead out of its folder."""
    model = onnx.load(path, load_external_data=False)
    found = [
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    ]
    folder = os.path.realpath(path.parent)
    return [
        name for name in found if "\0" not in name and os.path.realpath(path.parent / name) != f"{folder}/weights.bin"
    ]
