#!/usr/bin/env bash
# Create the virtual environment $1 unless it exists, and install Milepost with its tools into it.
#
# Versions come from constraints.txt. A torch that is installed there already is kept as it is.
set -euo pipefail

venv=$1
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
fi
if "$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    grep -v '^torch==' constraints.txt > "$constraints"
else
    cp constraints.txt "$constraints"
fi
pip=("$venv/bin/python" -m pip install --quiet -c "$constraints")
"${pip[@]}" setuptools
"${pip[@]}" --no-build-isolation -e '.[dev]'
