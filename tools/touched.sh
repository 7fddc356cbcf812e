#!/usr/bin/env bash
# touched.sh STEP PATH…: exit 0 if STEP must run, else say why it is skipped, and exit 1.
#
# STEP must run if a commit of the last day, or a change that is not committed, touches a PATH. With
# $CI_BASE set, every difference from that commit counts, however old. STEP also runs if git cannot
# tell: no repository, an unknown $CI_BASE, or a PATH that is not there.
set -uo pipefail
step=$1
shift

for path; do
    if [ ! -e "$path" ]; then
        echo "$step runs: its list of paths names $path, which is not there"
        exit 0
    fi
done
if [ -n "${CI_BASE:-}" ]; then
    since="since $CI_BASE"
    git diff --quiet "$CI_BASE" -- "$@" || exit 0
else
    since="in the last day"
    commit=$(git log -1 --format=%h --since='1 day ago' -- "$@") && [ -z "$commit" ] || exit 0
fi
changes=$(git status --porcelain -- "$@") && [ -z "$changes" ] || exit 0
echo "$step is skipped: nothing in $* changed $since (to run it: make $step)"
exit 1
