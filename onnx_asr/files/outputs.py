"""Write outputs: a file is put in place whole by a rename or not at all; a device or pipe is written into."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from onnx_asr.errors import OutputError

STDIN, STDOUT = Path("/dev/stdin"), Path("/dev/stdout")
_STREAMS = {STDOUT: 1, Path("/dev/stderr"): 2}
_MOST_LINKS = 40
READER_PATIENCE = 60
"""Seconds that writing into a FIFO waits for somebody who reads it."""


@dataclass(frozen=True)
class Destination:
    """Where an output goes.

    Attributes:
        path: As it was given.
        file: The file to make, or to replace by a rename: symbolic links to it stay. None for a device, a FIFO or a
            stream of this process, which is written into.
        descriptor: Of the stream of this process that the path names, as /dev/stdout does.
    """

    path: Path
    file: Path | None
    descriptor: int | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str], *, text: bool = False) -> Destination:
        """The destination that a path names, after making sure that it can be written; ``text`` may go to a terminal.

        Raises:
            OutputError: The folder is missing or not writable; or the path is a folder, a socket, a disk, a circle of
                links, a link to a stream, or a terminal.
        """
        given = Path(path)
        descriptor = _descriptor(given)
        if descriptor is not None:
            result = cls(given, None, descriptor)
        else:
            try:
                mode = given.stat().st_mode
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise OutputError(f"output path '{given}' is a link to itself; choose another one") from error
                mode = stat.S_IFREG  # to be made, or in a folder that the check of the folder refuses
            if stat.S_ISDIR(mode):
                raise OutputError(f"output path '{given}' is a folder; give the name of the file to write")
            if stat.S_ISREG(mode):
                file = Path(os.path.realpath(given)) if given.is_symlink() else given
                _check_folder(file)
                return cls(given, file)
            if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
                raise OutputError(
                    f"output path '{given}' is a {'socket' if stat.S_ISSOCK(mode) else 'disk'}, which is not written "
                    "to; give the name of a file"
                )
            result = cls(given, None)
        if result._is_terminal() and not text:
            raise OutputError(f"output '{given}' is a terminal, which cannot show it; send it into a file or a pipe")
        return result

    @property
    def takes_data(self) -> bool:
        """Whether a data file beside the output is found by everybody who finds the output itself."""
        return self.file is not None and self.file.parent.samefile(self.path.parent)

    @property
    def is_fifo(self) -> bool:
        """Whether it is a pipe with a name, which somebody has to read."""
        return self.file is None and self.descriptor is None and self.path.is_fifo()

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path leads to the same file or pipe; False for a device, which can serve several purposes."""
        try:
            mine = os.stat(self.path if self.descriptor is None else self.descriptor)
            theirs = os.stat(path)
        except OSError:
            return self.file is not None and os.path.realpath(self.file) == os.path.realpath(path)
        return os.path.samestat(mine, theirs) and (stat.S_ISREG(mine.st_mode) or stat.S_ISFIFO(mine.st_mode))

    def write(self, content: bytes) -> None:
        """Write everything: a file is replaced whole or stays as it was.

        Raises:
            OutputError: When it cannot be written.
        """
        try:
            if self.file is None:
                self._stream(content)
            else:
                _replace(self.file, content)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _stream(self, content: bytes) -> None:
        descriptor = self._opened() if self.descriptor is None else self.descriptor
        try:
            rest = memoryview(content)
            while rest:
                try:
                    rest = rest[os.write(descriptor, rest) :]
                except BlockingIOError:  # whoever made the pipe may have set it so
                    select.select([], [descriptor], [])
        finally:
            if self.descriptor is None:
                os.close(descriptor)

    def _opened(self) -> int:
        """Open a device, or a FIFO as soon as somebody reads it.

        Raises:
            OutputError: When nobody does.
        """
        deadline = time.monotonic() + READER_PATIENCE
        while True:
            try:
                descriptor = os.open(self.path, os.O_WRONLY | _NOT_OURS | (os.O_NONBLOCK if self.is_fifo else 0))
                os.set_blocking(descriptor, True)
                return descriptor
            except OSError as error:
                if error.errno != errno.ENXIO or not self.is_fifo:
                    raise
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"cannot write '{self.path}': it is a pipe that nothing read for {READER_PATIENCE} seconds; "
                        "start a reader first, or give the name of a file"
                    ) from error
            time.sleep(0.1)

    def _is_terminal(self) -> bool:
        """Whether a stream is one; a device is opened to tell, a FIFO is not, as whoever reads it would notice.

        Raises:
            OutputError: When it cannot be written into.
        """
        try:
            if self.descriptor is not None:
                os.write(self.descriptor, b"")
                return os.isatty(self.descriptor)
            if self.is_fifo:
                if not os.access(self.path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return False
            descriptor = os.open(self.path, os.O_WRONLY | _NOT_OURS)
            try:
                return os.isatty(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise cannot_write(self.path, error) from error


_NOT_OURS = getattr(os, "O_NOCTTY", 0)  # a terminal that is opened does not become the one that controls this process


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text in UTF-8, a file whole or not at all; undecodable bytes of file names are escaped.

    Raises:
        OutputError: When it cannot be written.
    """
    destination = Destination.of(path, text=True)
    destination.write(text.encode(errors="backslashreplace"))
    return destination.path


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> Path:
    """Write bytes, a file whole or not at all.

    Raises:
        OutputError: When they cannot be written.
    """
    destination = Destination.of(path)
    destination.write(content)
    return destination.path


def beside(file: Path, suffix: str) -> Path:
    """A temporary path beside a file, hidden and of this process alone."""
    return file.with_name(f".{file.name}.{os.getpid()}.{suffix}")


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


def printable(text: str) -> str:
    """A text with its control characters, and what is no character at all, escaped."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path names; None for any other path.

    Raises:
        OutputError: The path is a link to such a name, so that it depends on who follows it.
    """
    given = path
    for _ in range(_MOST_LINKS):
        if path in _STREAMS:
            number = _STREAMS[path]
        elif path.name.isdecimal() and os.path.realpath(path.parent) == os.path.realpath("/dev/fd"):
            number = int(path.name)
        elif path.is_symlink():
            path = path.parent / path.readlink()
            continue
        else:
            break
        if path == given:
            return number
        raise OutputError(f"output path '{given}' is a link to the stream '{path}'; give '{path}' itself, or a file")
    return None


def _check_folder(file: Path) -> None:
    """Make sure that a file can be made in its folder.

    Raises:
        OutputError: When the folder is missing, is none, or is not writable.
    """
    folder = file.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise OutputError(f"output folder '{folder}' {what}")
    probe = beside(file, "tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to '{folder}': {error.strerror}; choose another output path") from error
    except BaseException:
        probe.unlink(missing_ok=True)
        raise


def _replace(file: Path, content: bytes) -> None:
    temporary = beside(file, "tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
