# Sourced by the scripts beside it: makes .venv with this package in it, when there is none or setup.cfg changed.
#   source launch/venv.sh [EXTRAS]     EXTRAS such as [dev]; PYTHON=... chooses the Python

extras=${1:-}

find_python() {
    local python
    for python in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "No Python 3.11 or newer found (tried ${PYTHON:-python3, python3.12, python3.11, python3.13})." \
        "Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 1
}

if [ ! -x .venv/bin/pip ]; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version) ..."
    "$python" -m venv --clear .venv
fi
if ! cmp -s setup.cfg ".venv/installed$extras"; then
    echo "Installing vita_jax$extras and what it needs (about 1.4 GB, a minute or two) ..."
    .venv/bin/pip install -qq --disable-pip-version-check --editable ".$extras"
    cp setup.cfg ".venv/installed$extras"
fi
