#!/bin/sh
# Check the whole project in a virtual environment of its own (.venv-test): style, types, tests.
# Two tests run at a time; -n 0 runs them one by one. Arguments go to pytest; PYTHON=... names the interpreter to use.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/tools/environment.sh"
prepare "$root/.venv-test" "" -e "$root[dev]"
cd "$root"
PATH="$root/.venv-test/bin:$PATH"
OPENBLAS_NUM_THREADS=1
export PATH OPENBLAS_NUM_THREADS
ruff check .
ruff format --check .
# Python 3.10 has an older numpy, whose types are less precise.
if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then mypy; fi
exec pytest -n 2 --dist worksteal "$@"
