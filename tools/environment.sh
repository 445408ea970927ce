# Sourced by demo.sh and test.sh, which set $root.

# The first Python >= 3.10 that can make a virtual environment; only $PYTHON where that is set. Inside an environment,
# which may be the one to be replaced, the Python that it was made with.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python3.10 python
    fi
    for candidate in "$@"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys._base_executable)'
            return
        fi
    done
    echo "error: none of $* is a Python >= 3.10 with the modules venv and ensurepip (Debian, Ubuntu:" \
        "apt install python3-venv); install one, or name it with PYTHON=/path/to/python3" >&2
    return 2
}

# prepare FOLDER SOURCES REQUIREMENT...: a virtual environment with the requirements installed. It is kept while the
# interpreter is the same, and not touched at all while pyproject.toml and SOURCES (a checksum, or "") are the same, too.
prepare() {
    folder=$1
    sources=$2
    shift 2
    interpreter=$(find_python)
    version=$("$interpreter" -c 'import sys; print(sys.executable, sys.version)'; echo "$folder")
    if [ "$(cat "$folder/made-with" 2>/dev/null)" != "$version" ]; then
        echo "making $folder" >&2
        rm -rf "$folder"
        "$interpreter" -m venv "$folder"
        printf '%s\n' "$version" >"$folder/made-with"
    fi
    wanted=$(echo "$sources $*"; cat "$root/pyproject.toml")
    if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $*" >&2
        rm -f "$folder/installed"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
        printf '%s\n' "$wanted" >"$folder/installed"
    fi
}
