"""What README.md shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parents[2]


def test_python_example(tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    method, before, _, after = done.stdout.split()
    assert method == "refit"
    assert float(after) < 0.2 * float(before)
    onnx.checker.check_model(onnx.load(tmp_path / "repaired.onnx"), full_check=True)


def test_commands_are_those_of_the_command_line():
    shown = set(re.findall(r"^onnx-resuscitate (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    helped = subprocess.run(
        [sys.executable, "-m", "onnx_asr", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert shown
    assert all(re.search(rf"\b{name}\b", helped) for name in shown)
