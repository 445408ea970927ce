#!/bin/sh
# Install the package into a virtual environment of its own (.venv-demo) and run the demonstration.
# Arguments go to `onnx-resuscitate demo`; PYTHON=... names the interpreter to use.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/environment.sh"
sources=$(cd "$root" && find onnx_asr models -type f ! -name "*.pyc" -exec cksum {} + | sort | cksum)
prepare "$root/.venv-demo" "$sources" "$root[cpu]"
exec "$root/.venv-demo/bin/onnx-resuscitate" demo "$@"
