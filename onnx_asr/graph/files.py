"""Write files: checked before work begins, and each put in place whole by a rename, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_asr.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The destination as a path, after making sure that a file can be made there.

    Raises:
        OutputError: When the folder is missing or not writable, or the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"output path '{target}' is a folder; give the name of the file to write")
    folder = target.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise OutputError(f"output folder '{folder}' {what}")
    probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to '{folder}': {error.strerror}; choose another output path") from error
    except BaseException:
        probe.unlink(missing_ok=True)
        raise
    return target


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file atomically, in UTF-8; undecodable bytes of file names are escaped.

    Raises:
        OutputError: When it cannot be written.
    """
    return write_bytes(text.encode(errors="backslashreplace"), path)


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a file atomically.

    Raises:
        OutputError: When it cannot be written.
    """
    target = check_writable(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def cannot_write(target: Path, error: OSError) -> OutputError:
    """The error to raise when the system refuses to write a file."""
    return OutputError(f"cannot write '{target}': {error.strerror or error}; make room or choose another output path")


def write_through(path: Path) -> None:
    """Have the operating system put a file's content on the disk before it is renamed into place."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def permissions(path: Path) -> int:
    """Permission bits of a file, or those that a new one would get."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def size_text(size: float) -> str:
    """A number of bytes for a reader."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
