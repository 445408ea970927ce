"""`view`: the real command, Netron's page in a headless browser, and the exit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.conftest import CALIBRATION, DENSE, FEW, PRESET, cli, command, environment

needs_netron = pytest.mark.skipif(importlib.util.find_spec("netron") is None, reason="netron is not installed")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"


@pytest.fixture(scope="module")
def repaired(pruned: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("view") / "repaired net.onnx"
    options = ("--dense", DENSE, "--data", CALIBRATION, *PRESET, *FEW, "--method", "paired", "-q")
    assert cli("repair", pruned, "-o", path, *options).code == 0
    return str(path)


@contextmanager
def viewing(*arguments: str) -> Iterator[list[str]]:
    """The addresses of a running command, which is interrupted afterwards and must exit cleanly."""
    process = subprocess.Popen(
        [*command(), "view", *arguments, "--no-browser", "--json"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line == "}\n":
                break
        values = json.loads(text)
        assert values["command"] == "view"
        yield [item["address"] for item in values["models"]]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def served(address: str) -> str:
    with urllib.request.urlopen(address) as page:
        return str(page.read().decode())


@contextmanager
def with_consent(address: str) -> Iterator[str]:
    """An address that leads to another one on this machine, with Netron's question about cookies answered."""

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Set-Cookie", "consent=1; path=/")
            self.send_header("Location", address)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("localhost", 0), Redirect) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@needs_netron
def test_the_page_shows_the_graph(repaired: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium to look at the page with")
    with viewing(repaired) as (address,), with_consent(address) as start:
        options = [*FLAGS.split(), OFFLINE, f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([browser, *options, start], capture_output=True, text=True, timeout=120, check=True)
    operators = [node.op_type for node in onnx.load(repaired).graph.node]
    for name in ("Conv", "BatchNormalization", "Gemm"):
        assert done.stdout.count(f">{name}</text>") == operators.count(name) > 0


def test_what_netron_shows_of_the_repair_is_in_the_file(repaired: str) -> None:
    model = onnx.load(repaired)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["onnx_asr.method"] == "paired"
    assert json.loads(metadata["onnx_asr.options"])["samples"] == 64
    notes = [node.doc_string for node in model.graph.node if node.doc_string]
    assert len(notes) >= sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert all("onnx-resuscitate" in text and "gain" in text for text in notes)


@needs_netron
def test_two_files_side_by_side(repaired: str, pruned: str) -> None:
    with viewing(pruned, repaired) as addresses:
        assert len(set(addresses)) == 2
        assert all(address.startswith("http://localhost:") for address in addresses)
        for path, address in zip((pruned, repaired), addresses, strict=True):
            name = os.path.basename(path)
            assert f'content="/data/{name}"' in served(address)
            with urllib.request.urlopen(f"{address}/data/{name.replace(' ', '%20')}") as file:
                assert file.read() == Path(path).read_bytes()
    with pytest.raises(OSError, match="refused"):
        served(addresses[0])


@needs_netron
def test_the_port_may_be_chosen(pruned: str) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert f"port {port}" in cli("view", pruned, "--port", port, "--no-browser").error
    with viewing(pruned, "--port", str(port)) as (address,):
        assert address == f"http://localhost:{port}"
    assert "give 1 to 65534" in cli("view", pruned, pruned, "--port", 65535, "--no-browser").error


@needs_netron
def test_only_models_are_shown(pruned: str, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("this is no model\n" * 9)
    assert "does not exist" in cli("view", pruned, tmp_path / "missing.onnx", "--no-browser").error
    assert "is not an ONNX model" in cli("view", pruned, text, "--no-browser").error


def test_without_netron_the_extra_is_named(pruned: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from onnx_asr.cli.app import run

    monkeypatch.setattr("onnx_asr.cli.viewing.find_spec", lambda name: None)
    assert run(["view", pruned, "--no-browser"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'onnx-resuscitate[view]'\n")
