"""Outputs of every kind: streams are written into, links stay, inputs are never replaced."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from onnx_asr.engine.loading import load
from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, FOLDER, PRESET, cli, command, environment

HALF = ("--sparsity", 0.5)
DATA = ("--data", CALIBRATION, *PRESET)
SMALL = ("--sparsities", 0.5, "--methods", "none", *FEW)


def piped(line: str, *, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which ``tool`` is the command."""
    script = f'tool() {{ {" ".join(command())} "$@"; }}\n{line}'
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment(), input=stdin, capture_output=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("outputs") / "pruned.onnx"
    assert cli("prune", DENSE, "-o", path, *HALF, "-q").code == 0
    return path.read_bytes()


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/proc/self/fd/1"])
def test_a_model_on_stdout_is_all_that_is_there(tmp_path: Path, pruned: bytes, name: str) -> None:
    done = piped(f"tool prune {DENSE} -o {name} --sparsity 0.5 | cat", cwd=tmp_path)
    assert done.stdout == pruned
    assert b"written into /dev/stdout" in done.stderr or b"written into /proc/self/fd/1" in done.stderr
    quiet = piped(f"tool prune {DENSE} -o {name} --sparsity 0.5 -q > out.onnx", cwd=tmp_path)
    assert (tmp_path / "out.onnx").read_bytes() == pruned
    assert quiet.stderr == b""
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_commands_form_a_pipeline(tmp_path: Path) -> None:
    line = (
        f"tool prune {DENSE} -o - --sparsity 0.9 -q | tool repair - --dense <(cat {DENSE}) -o >(cat > repaired.onnx)"
        f" --data {CALIBRATION} --preset digits --samples 64 --verify-samples 64 -q; wait; sleep 0.2"
    )
    done = piped(line, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    arguments = ("--dense", DENSE, *DATA, *FEW[:4], "-q")
    assert cli("prune", DENSE, "-o", "p.onnx", "--sparsity", 0.9, cwd=tmp_path).code == 0
    assert cli("repair", "p.onnx", "-o", "r.onnx", *arguments, cwd=tmp_path).code == 0
    assert (tmp_path / "repaired.onnx").read_bytes() == (tmp_path / "r.onnx").read_bytes()


def test_every_command_reads_models_from_a_pipe(tmp_path: Path, pruned: bytes) -> None:
    data = f"--data {CALIBRATION} --preset digits"
    few = "--samples 64 --verify-samples 64 --threads 1"
    for line in (
        "prune /dev/stdin -o o.onnx --sparsity 0.7 --measure-latency --report r.html --input-shapes input:1,1,8,8",
        f"repair /dev/stdin -o o.onnx --dense {DENSE} {data} {few} --method paired --report r.html",
        f"compress /dev/stdin -o o.onnx --sparsity 0.5 --rounds 1 {data} {few} --force --report r.html",
        "shrink /dev/stdin -o o.onnx",
        f"sensitivity /dev/stdin --sparsities 0.5 {data} {few}",
        f"evaluate /dev/stdin --dense {DENSE} {data}",
        f"inspect /dev/stdin --dense {DENSE} {data} --samples 64 --report r.html",
        f"sweep /dev/stdin -o s.json --sparsities 0.5 --methods none {data} {few} --report t.html",
    ):
        model = Path(DENSE).read_bytes() if line.startswith("compress") else pruned
        done = piped(f"cat | tool {line}", cwd=tmp_path, stdin=model)
        assert done.returncode == 0, (line, done.stderr)
    assert b"is a pipe, which Netron cannot open" in piped("cat | tool view /dev/stdin", cwd=tmp_path).stderr


def test_texts_go_into_pipes_too(tmp_path: Path) -> None:
    base = f"tool sweep {DENSE} --data {FOLDER} --preset digits {' '.join(map(str, SMALL))}"
    for option, begin in (("--report=-", b"<!DOCTYPE html>"), ("--plot /dev/stdout", b"<?xml")):
        done = piped(f"{base} -o results.json {option}", cwd=tmp_path)
        assert done.returncode == 0
        assert done.stdout.startswith(begin)
        assert b"cells: results.json" in done.stderr
    done = piped(f"{base} -o >(cat > piped.json); sleep 0.2", cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "piped.json").read_bytes().startswith(b'{\n "kind": "onnx-resuscitate sweep"')
    assert piped(f"{base} -o -", cwd=tmp_path).stdout.count(b"onnx-resuscitate sweep") == 1


def test_two_results_do_not_share_stdout(tmp_path: Path) -> None:
    for arguments, words in (
        (("-o", "-", "--json"), "--json prints on standard output, and --output writes there"),
        (("-o", "o.onnx", "--report", "-", "--json"), "--json prints on standard output, and --report writes there"),
        (("-o", "-", "--report", "/dev/stdout"), "--report and --output both name '/dev/stdout'"),
    ):
        assert words in cli("prune", DENSE, *HALF, *arguments, cwd=tmp_path).error
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_no_model() -> None:
    master, terminal = pty.openpty()
    line = [*command(), "prune", DENSE, "-o", "-", "--sparsity", "0.5"]
    done = subprocess.run(line, env=environment(), stdout=terminal, stderr=subprocess.PIPE, check=False)
    os.close(terminal)
    os.close(master)
    assert done.returncode == 2
    assert b"is a terminal" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(tmp_path: Path, pruned: bytes, closed: str) -> None:
    done = piped(f"tool prune {DENSE} -o o.onnx --sparsity 0.5 {closed}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "o.onnx").read_bytes() == pruned
    done = piped(f"tool prune {DENSE} -o /dev/stdout --sparsity 0.5 {closed} | cat", cwd=tmp_path)
    assert done.stdout == (b"" if ">&-" in closed.split() else pruned)
    assert os.listdir(tmp_path) == ["o.onnx"]


def test_a_reader_that_leaves_is_an_error(tmp_path: Path) -> None:
    done = piped(f"tool prune {DENSE} -o - --sparsity 0.5 -q | true; exit ${{PIPESTATUS[0]}}", cwd=tmp_path)
    assert done.returncode == 2
    assert b"error: cannot write '/dev/stdout': Broken pipe" in done.stderr


def test_a_named_pipe_is_announced(tmp_path: Path, pruned: bytes) -> None:
    done = piped(f"mkfifo f; cat f > o.onnx & tool prune {DENSE} -o f --sparsity 0.5 -q; wait", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith(b"warning: --output 'f' is a pipe: when the work is done, something has to read it")
    assert (tmp_path / "o.onnx").read_bytes() == pruned
    assert (tmp_path / "f").is_fifo()


def test_links_stay(tmp_path: Path, pruned: bytes) -> None:
    (tmp_path / "m.onnx").symlink_to("store.onnx")
    (tmp_path / "r.html").symlink_to("store.html")
    done = cli("prune", DENSE, "-o", "m.onnx", "--report", "r.html", *HALF, cwd=tmp_path)
    assert done.code == 0
    assert "written: m.onnx (" in done.out
    assert (tmp_path / "m.onnx").is_symlink()
    assert (tmp_path / "r.html").is_symlink()
    assert (tmp_path / "store.onnx").read_bytes() == pruned
    assert (tmp_path / "store.html").read_text().startswith("<!DOCTYPE html>")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with one input of every kind, and other names for some of them."""
    shutil.copy(DENSE, tmp_path / "m.onnx")
    shutil.copy(DENSE, tmp_path / "dense.onnx")
    onnx.save(onnx.load(DENSE), tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    shutil.copy(CALIBRATION, tmp_path / "data.npz")
    (tmp_path / "images").mkdir()
    for source in sorted(Path(FOLDER).glob("**/*.png"))[:4]:
        shutil.copy(source, tmp_path / "images")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    (tmp_path / "list.txt").write_text("".join(f"images/{name}\n" for name in names))
    (tmp_path / "labels.csv").write_text("name,label\n")
    (tmp_path / "p.toml").write_text("scale = 1\n")
    (tmp_path / "hard").hardlink_to(tmp_path / "dense.onnx")
    (tmp_path / "soft.svg").symlink_to("dense.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("repair m.onnx --dense dense.onnx --data data.npz -o dense.onnx", "'dense.onnx', which is read (--dense)"),
        ("repair m.onnx --dense dense.onnx --data data.npz -o hard", "'dense.onnx', which is read (--dense)"),
        ("repair m.onnx --dense m.onnx --data data.npz -o m.onnx", "'m.onnx', which is read (--dense)"),
        ("repair m.onnx --dense e.onnx --data data.npz -o e.bin", "'e.bin', which holds weights of 'e.onnx'"),
        ("repair m.onnx --data data.npz -o ./data.npz", "'data.npz', which is read (--data)"),
        ("repair m.onnx --data images -o IMAGE", "is an image in the data of --data"),
        ("repair m.onnx --data images --data data.npz -o data.npz", "'data.npz', which is read (--data)"),
        ("repair m.onnx --data list.txt -o IMAGE", "is an image in the data of --data"),
        ("repair m.onnx --data data.npz -o o.onnx --report m.onnx", "'m.onnx', which is read (the given model)"),
        ("repair m.onnx --data data.npz -o o.onnx --report o.onnx", "--report and --output both name"),
        ("repair m.onnx --data images -o o.onnx --preprocess p.toml --report p.toml", "which is read (--preprocess)"),
        ("compress m.onnx --sparsity 0.5 --data data.npz -o data.npz", "which is read (--data)"),
        ("prune m.onnx --sparsity 0.5 --data data.npz --score activation -o data.npz", "which is read (--data)"),
        ("prune e.onnx --sparsity 0.5 -o e.bin", "'e.bin', which holds weights of 'e.onnx'"),
        ("shrink e.onnx -o e.bin", "'e.bin', which holds weights of 'e.onnx'"),
        ("inspect m.onnx --dense dense.onnx --report m.onnx", "which is read (MODEL)"),
        ("inspect m.onnx --dense dense.onnx --data data.npz --report hard", "which is read (--dense)"),
        ("sensitivity m.onnx --data images --plot images/plot.png", "is an image in the data of --data"),
        ("sensitivity dense.onnx --data images --plot soft.svg", "which is read (DENSE)"),
        ("sweep m.onnx --data images --labels labels.csv -o labels.csv", "which is read (--labels)"),
        ("sweep m.onnx --data images --test data.npz -o data.npz", "which is read (--test)"),
        ("sweep m.onnx --data data.npz -o m.onnx", "which is read (DENSE)"),
    ],
)
def test_an_input_is_not_replaced(files: Path, line: str, words: str) -> None:
    before = {path: path.read_bytes() for path in files.glob("**/*") if path.is_file()}
    image = sorted((files / "images").iterdir())[0]
    assert words in cli(*line.replace("IMAGE", str(image)).split(), cwd=files).error
    assert {path: path.read_bytes() for path in files.glob("**/*") if path.is_file()} == before


def test_a_model_may_be_replaced_by_its_new_version(files: Path) -> None:
    done = cli("prune", "m.onnx", "-o", "m.onnx", *HALF, "--report", "r.html", "--json", cwd=files)
    assert done.json["sparsity"] == pytest.approx(0.5, abs=0.01)
    other = cli("prune", "dense.onnx", "-o", "other.onnx", *HALF, "--report", "other.html", cwd=files)
    assert other.code == 0
    assert (files / "m.onnx").read_bytes() == (files / "other.onnx").read_bytes()
    numbers = [line for line in (files / "r.html").read_text().splitlines() if "%" in line]
    assert numbers == [line for line in (files / "other.html").read_text().splitlines() if "%" in line]


def test_data_files_that_nothing_reads_any_more_are_removed_or_named(files: Path) -> None:
    found = set(os.listdir(files))
    first = cli("prune", "e.onnx", "-o", "e.onnx", *HALF, "-q", cwd=files)
    assert first.err.startswith("warning: 'e.bin' (")
    assert "is no longer read by 'e.onnx'" in first.err
    for sparsity in (0.6, 0.7):
        assert cli("prune", "e.onnx", "-o", "e.onnx", "--sparsity", sparsity, "-q", cwd=files).err == ""
        (data,) = set(os.listdir(files)) - found
        assert data.startswith("e.onnx.")
        assert data.endswith(".data")
        load(files / "e.onnx")


def test_weights_behind_links_need_an_option(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "4f2c"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = onnx.load(DENSE)
    onnx.save(model, blobs / "ab", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "cd")
    for name, blob in (("model.onnx", "ab"), ("model.onnx_data", "cd")):
        (snapshot / name).symlink_to(Path("../../blobs", blob))
    path = snapshot / "model.onnx"
    assert "allow them with --external-links" in cli("prune", path, "-o", tmp_path / "o.onnx", *HALF).error
    for line in (
        ("prune", path, "-o", tmp_path / "o.onnx", *HALF),
        ("repair", tmp_path / "o.onnx", "-o", tmp_path / "r.onnx", "--dense", path, *DATA, *FEW, "--method", "paired"),
        ("evaluate", path, "--dense", DENSE, *DATA),
        ("inspect", path),
        ("shrink", path, "-o", tmp_path / "s.onnx"),
    ):
        assert cli(*line, "--external-links").code == 0
    done = piped(f"tool prune {path} -o - --sparsity 0.5 -q --external-links | cat", cwd=tmp_path)
    assert (done.stderr, onnx.load_model_from_string(done.stdout).graph.name) == (b"", model.graph.name)
    assert sorted(os.listdir(blobs)) == ["ab", "cd"]
    replaced = cli("prune", path, "-o", path, *HALF, "-q", "--external-links")
    assert replaced.err.startswith(f"warning: '{snapshot / 'model.onnx_data'}' (")
    assert path.is_symlink()
