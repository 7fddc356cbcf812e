#!/usr/bin/env bash
# Create the virtual environment $1 unless it exists, and install Milepost with its tools into it;
# with a second argument `bench` only the peers that the benchmarks measure.
#
# Versions come from constraints.txt. A torch that is installed there already is kept as it is.
set -euo pipefail

venv=$1
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3.11}" -m venv "$venv"
fi
python=("$venv/bin/python")
if torch=$("${python[@]}" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null); then
    sed "s/^torch==.*/torch==$torch/" constraints.txt > "$constraints"
else
    cp constraints.txt "$constraints"
fi
pip=("${python[@]}" -m pip install --quiet -c "$constraints")
if [ "${2:-}" = bench ]; then
    errors=$venv/bench-errors
    rm -rf "$errors"
    list='import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])'
    for peer in $("${python[@]}" -c "$list"); do # one by one: a peer that cannot be had does not stop the others
        if ! error=$("${pip[@]}" "$peer" 2>&1); then
            mkdir -p "$errors"
            { grep -m 1 ERROR <<< "$error" || tail -n 1 <<< "$error"; } | tee "$errors/$peer"
        fi
    done
    exit
fi
"${pip[@]}" setuptools
"${pip[@]}" --no-build-isolation -e '.[dev]'
