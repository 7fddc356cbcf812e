# Shared by all scripts.
log() { echo "$1"; }
