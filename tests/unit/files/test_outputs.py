"""Outputs are checked before work begins; a file is never written incompletely, anything else never replaced."""

from __future__ import annotations

import os
import pty
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onnx_asr.errors import OutputError
from onnx_asr.files import outputs
from onnx_asr.files.outputs import Destination, permissions, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_places_where_no_file_can_be_are_refused_before_work_is_done(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        Destination.of(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        Destination.of(tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OutputError, match="is a link to itself"):
        Destination.of(tmp_path / "circle")
    (tmp_path / "circle").unlink()
    assert Destination.of(tmp_path / "m.onnx").file == tmp_path / "m.onnx"
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            Destination.of(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o755)


def test_text_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text("äöü", target)
    assert target.read_text(encoding="utf-8") == "äöü"
    assert names(tmp_path) == ["report.json"]
    with pytest.raises(OutputError, match="nowhere' does not exist"):
        write_text("x", tmp_path / "nowhere" / "r.json")


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    target.write_bytes(b"precious")

    def refuse(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError, match=r"No space left on device; make room or choose another output path"):
        write_bytes(b"new", target)
    assert target.read_bytes() == b"precious"
    assert names(tmp_path) == ["report.json"]


def test_permissions_are_those_of_the_file_or_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "old").touch(mode=0o600)
    (tmp_path / "new").touch()
    assert permissions(tmp_path / "old") == 0o600
    assert permissions(tmp_path / "nothing") == (tmp_path / "new").stat().st_mode & 0o777


def received(path: Path, write: Callable[[], object]) -> bytes:
    """What arrives in a FIFO while something writes into it."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write()
    reader.join()
    return found[0]


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_link_to_a_file_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "old").write_bytes(b"old")
    (store / "old").chmod(0o640)
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("store/old")
    (tmp_path / "dangling").symlink_to("store/new")
    (tmp_path / "lost").symlink_to("nowhere/new")
    for name, behind in (("first", "old"), ("dangling", "new")):
        assert write_bytes(name.encode(), tmp_path / name) == tmp_path / name
        assert (tmp_path / name).is_symlink()
        assert (store / behind).read_bytes() == name.encode()
        assert not (store / behind).is_symlink()
    with pytest.raises(OutputError, match="nowhere' does not exist"):
        Destination.of(tmp_path / "lost")
    assert names(store) == ["new", "old"]
    assert not Destination.of(tmp_path / "first").takes_data
    (store / "link").symlink_to("old")
    assert Destination.of(store / "link").takes_data


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    content = bytes(range(256)) * 4096  # more than a pipe holds
    for path in (fifo, link):
        assert received(fifo, lambda path=path: write_bytes(content, path)) == content
        assert Destination.of(path).is_fifo
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert names(tmp_path) == ["fifo", "link"]


def test_a_pipe_waits_for_its_reader_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=write_bytes, args=(b"bytes", fifo))
    writer.start()
    time.sleep(0.3)
    assert fifo.read_bytes() == b"bytes"
    writer.join()
    monkeypatch.setattr(outputs, "READER_PATIENCE", 0.2)
    with pytest.raises(OutputError, match=r"it is a pipe that nothing read for 0\.2 seconds"):
        write_bytes(b"bytes", fifo)
    assert fifo.is_fifo()


def test_a_device_is_written_into(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    write_bytes(b"gone", null)
    write_text("gone", null)
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert names(tmp_path) == ["null"]
    assert not Destination.of(null).is_at(null)  # two outputs may both be dropped


def test_what_can_not_be_written_into_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OutputError, match="is a socket"):
            Destination.of(tmp_path / "socket")
    (tmp_path / "stdout").symlink_to("/dev/stdout")
    with pytest.raises(OutputError, match=r"stdout' is a link to the stream '.*'; give '.*' itself, or a file"):
        Destination.of(tmp_path / "stdout")
    with pytest.raises(OutputError, match="Bad file descriptor"):
        Destination.of("/dev/fd/987")
    with pipe() as (read, _), pytest.raises(OutputError, match="Bad file descriptor"):
        Destination.of(f"/dev/fd/{read}")
    assert names(tmp_path) == ["socket", "stdout"]


def test_streams_of_the_process_are_written_into() -> None:
    with pipe() as (read, write):
        for folder in ("/dev/fd", "/proc/self/fd"):
            write_bytes(b"some bytes", f"{folder}/{write}")
            assert os.read(read, 99) == b"some bytes"
        os.set_blocking(write, False)
        content, found = bytes(1 << 20), bytearray()
        writer = threading.Thread(target=write_bytes, args=(content, f"/dev/fd/{write}"))
        writer.start()
        while len(found) < len(content):
            found += os.read(read, 1 << 16)
        writer.join()
        assert found == content


def test_an_open_file_goes_on_where_it_is(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.write(b"before ")
        file.flush()
        write_bytes(b"after", f"/dev/fd/{file.fileno()}")
    assert (tmp_path / "log").read_bytes() == b"before after"


def test_a_terminal_gets_text_alone() -> None:
    master, terminal = pty.openpty()
    try:
        for path in (f"/dev/fd/{terminal}", os.ttyname(terminal)):
            with pytest.raises(OutputError, match="is a terminal"):
                write_bytes(b"\x08", path)
            write_text("words", path)
            assert os.read(master, 99) == b"words"
    finally:
        os.close(master)
        os.close(terminal)


def test_a_reader_that_left_is_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(OutputError, match="Broken pipe"):
            write_bytes(b"bytes", f"/dev/fd/{write}")
    finally:
        os.close(write)


def test_the_same_file_is_known_by_all_its_names(tmp_path: Path) -> None:
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.touch()
    os.mkfifo(fifo)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "soft").symlink_to("file")
    (tmp_path / "around").symlink_to(tmp_path)
    for name in ("file", "hard", "soft", "around/file"):
        assert Destination.of(file).is_at(tmp_path / name)
        assert Destination.of(tmp_path / name).is_at(file)
        assert not Destination.of(tmp_path / name).is_at(fifo)
    assert Destination.of(fifo).is_at(tmp_path / "around" / "fifo")
    assert Destination.of(tmp_path / "new").is_at(tmp_path / "around" / "new")
    assert not Destination.of(tmp_path / "new").is_at(file)
    with file.open("ab") as stream:
        assert Destination.of(f"/dev/fd/{stream.fileno()}").is_at(tmp_path / "hard")
