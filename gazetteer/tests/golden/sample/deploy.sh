#!/bin/bash
# Puts a release in place.
# function not_a_function() { :; }
set -eu
source ./common.sh

RELEASE_DIR=/srv/app
export LOG_LEVEL=info

# Copies the files.
copy_files() {
    for f in *; do
        cat "$f" > /dev/null
    done
    echo "bad() { :; }"
}

function clean {
    rm -rf "$RELEASE_DIR"
    eval "$1"
}
