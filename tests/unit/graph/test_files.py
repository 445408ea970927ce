"""Files are checked before work begins and are never written incompletely."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_asr.errors import OutputError
from onnx_asr.graph.files import check_writable, permissions, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_places_where_no_file_can_be_are_refused_before_work_is_done(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        check_writable(tmp_path / "nowhere" / "m.onnx")
    assert check_writable(tmp_path / "m.onnx") == tmp_path / "m.onnx"
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            check_writable(tmp_path / "m.onnx")
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
