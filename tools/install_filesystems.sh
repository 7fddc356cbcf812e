#!/usr/bin/env bash
# Install the programs that tests/filesystems mounts file systems with, where that is possible: as root, with apt.
#
# Without them the tests that need them are skipped, and say so.
set -euo pipefail

programs=(bindfs fusermount3 mkfs.btrfs mkfs.ext4 mkfs.xfs setquota)
packages=(bindfs fuse3 btrfs-progs e2fsprogs xfsprogs quota)
if grep -qw nfsd /proc/filesystems 2>/dev/null; then
    programs+=(exportfs)
    packages+=(nfs-kernel-server)
fi
if command -v "${programs[@]}" >/dev/null && [ "$(command -v "${programs[@]}" | wc -l)" = "${#programs[@]}" ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests of file systems need these packages, which only root can install: ${packages[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "${packages[@]}"; }; then
    echo "these packages could not be installed, so some tests of file systems will be skipped: ${packages[*]}"
fi
