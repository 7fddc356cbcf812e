#!/usr/bin/env bash
# Create the virtual environment $1 unless it exists, and install Milepost with its tools into it.
# With a second argument, install only the packages of this group of pyproject.toml (bench, dist, docs).
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
group=${2:-}
if [ -z "$group" ]; then
    "${pip[@]}" setuptools
    "${pip[@]}" --no-build-isolation -e '.[dev]'
    exit
fi
list='import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])'
read -ra packages < <("${python[@]}" -c "$list" "$group")
if [ "$group" != bench ]; then
    "${pip[@]}" "${packages[@]}"
    exit
fi
errors=$venv/bench-errors
rm -rf "$errors"
for peer in "${packages[@]}"; do # one by one: if one peer is not available, the others are installed
    if ! error=$("${pip[@]}" "$peer" 2>&1); then
        mkdir -p "$errors"
        { grep -m 1 ERROR <<< "$error" || tail -n 1 <<< "$error"; } | tee "$errors/$peer"
    fi
done
