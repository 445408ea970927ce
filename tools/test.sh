#!/bin/sh
# Check the whole project in a virtual environment of its own (.venv-test): style, types, tests.
# Arguments go to pytest; PYTHON=... names the interpreter to use.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/environment.sh"
prepare "$root/.venv-test" "" -e "$root[dev]"
cd "$root"
PATH="$root/.venv-test/bin:$PATH"
export PATH
ruff check .
ruff format --check .
mypy
exec pytest "$@"
