"""Arenas: shared memory for staging, and how much memory there is for them."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import threading

import pytest
from support.processes import in_child

from milepost import syscalls
from milepost.background.arena import Arena, available_bytes

PAGE = mmap.PAGESIZE


def test_an_arena_holds_at_least_what_was_asked_for_in_whole_pages():
    """An arena's size is rounded up to pages, and its memory begins as zeros at a page boundary."""
    arena = Arena(PAGE + 1)
    assert arena.size == len(arena.view) == 2 * PAGE
    assert bytes(arena.view) == bytes(2 * PAGE)
    assert syscalls.address_of(arena.view) % PAGE == 0
    arena.close()


def test_an_arena_is_the_same_memory_wherever_its_descriptor_is_mapped():
    """What is written through one mapping of an arena's descriptor is seen through another."""
    arena = Arena(PAGE)
    other = Arena(0, os.dup(arena.descriptor))
    other.view[5:8] = b"abc"
    assert bytes(arena.view[5:8]) == b"abc"
    assert other.size == arena.size
    other.close()
    arena.close()


def test_an_arena_grows_and_keeps_what_it_holds():
    """Growing keeps the content and the views made before; a smaller size changes nothing."""
    arena = Arena(PAGE)
    arena.view[:3] = b"old"
    before = arena.view
    arena.grow(10 * PAGE)
    assert arena.size == 10 * PAGE
    assert bytes(arena.view[:3]) == b"old"
    arena.view[:3] = b"new"
    assert bytes(before[:3]) == b"new"
    arena.grow(1)
    assert arena.size == 10 * PAGE
    arena.close()


def test_nobody_can_shrink_an_arena():
    """Whoever holds the descriptor can make the file larger but not smaller: reading never faults."""
    arena = Arena(4 * PAGE)
    assert fcntl.fcntl(arena.descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    other = os.dup(arena.descriptor)
    with pytest.raises(PermissionError):
        os.ftruncate(other, 0)
    code = in_child(lambda: os.ftruncate(other, PAGE))
    assert code == 1, "not in another process either"
    os.ftruncate(other, 8 * PAGE)
    os.close(other)
    arena.close()


def test_closing_gives_up_the_descriptor_and_keeps_the_memory_of_views():
    """After close the descriptor is gone, views stay readable, and a second close does nothing."""
    arena = Arena(PAGE)
    arena.view[:4] = b"kept"
    view, descriptor = arena.view, arena.descriptor
    arena.close()
    arena.close()
    assert arena.descriptor == -1
    assert bytes(view[:4]) == b"kept"
    del view
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_forked_process_does_not_close_its_parents_arena():
    """Finalizers of an arena do nothing in a forked child; the parent's goes on working."""
    arena = Arena(PAGE)
    assert in_child(arena._finalizer) == 0
    os.fstat(arena.descriptor)
    arena.close()


def resident_pages(arena):
    return os.fstat(arena.descriptor).st_blocks * 512 // PAGE


def test_populating_touches_every_page_and_changes_nothing():
    """After `populate` all pages are there, with the content that they had."""
    arena = Arena(20 << 20)
    arena.view[PAGE : PAGE + 4] = b"data"
    arena.populate()
    assert resident_pages(arena) == arena.size // PAGE
    assert bytes(arena.view[PAGE : PAGE + 4]) == b"data"
    arena.close()


def test_populating_without_the_kernels_help(monkeypatch):
    """Where the kernel cannot populate, pages are touched one by one, with their content kept."""
    monkeypatch.setattr(syscalls, "_LINUX", False)
    arena = Arena(8 * PAGE)
    arena.view[PAGE : PAGE + 4] = b"data"
    arena.populate()
    assert resident_pages(arena) == 8
    assert bytes(arena.view[PAGE : PAGE + 4]) == b"data"
    arena.close()


def test_populating_can_be_stopped(monkeypatch):
    """`stop_populating` ends a `populate` that is under way after its present step."""
    arena, steps, go = Arena(64 << 20), [], threading.Event()

    def step(address, length):
        steps.append(length)
        arena.stop_populating()
        go.set()

    monkeypatch.setattr(syscalls, "populate", step)
    arena.populate()
    assert go.is_set()
    assert len(steps) == 1
    arena.close()


# -- how much memory there is ----------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path):
    """Makes the kernel's files of these contents; returns `available_bytes` on them."""

    def files(**contents):
        (tmp_path / "groups").write_text(contents.pop("groups", ""))
        (tmp_path / "meminfo").write_text(contents.pop("meminfo", ""))
        for name, text in contents.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_of_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return available_bytes(*(str(tmp_path / name) for name in ("meminfo", "cgroup", "groups")))

    return files


MEMINFO = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    500 kB\n"


def test_memory_that_the_machine_has_left(kernel):
    """Without control groups it is the kernel's MemAvailable."""
    assert kernel(meminfo=MEMINFO) == 500 * 1024


def test_memory_that_cannot_be_known(kernel):
    """Without any of the kernel's files, or with strange ones, the answer is None."""
    assert kernel() is None
    assert kernel(meminfo="MemAvailable: lots\n", memory_of_max="?", memory_of_current="0") is None


def test_a_control_group_may_leave_less_than_the_machine(kernel):
    """A limit of control groups version 2 counts, less what is used."""
    assert kernel(meminfo=MEMINFO, memory_of_max="100000\n", memory_of_current="30000\n") == 70_000


def test_a_control_group_of_version_1(kernel):
    """Version 1 limits count as well."""
    found = kernel(
        meminfo=MEMINFO,
        memory__memory_of_limit_in_bytes="100000\n",
        memory__memory_of_usage_in_bytes="40000\n",
        memory__memory_of_stat="total_inactive_file 500\ntotal_cache 9999\n",
    )
    assert found == 60_500


def test_no_limit_and_overdrawn_limits(kernel):
    """The word max is no limit; a group that uses more than its limit has nothing left."""
    assert kernel(meminfo=MEMINFO, memory_of_max="max\n", memory_of_current="30000\n") == 500 * 1024
    assert kernel(meminfo=MEMINFO, memory_of_max="1000\n", memory_of_current="3000\n") == 0


def test_cached_files_count_as_free(kernel):
    """File content that the group has cached is not in the way of an arena; shared memory is."""
    stat = "anon 1\nfile 60000\nshmem 10000\ninactive_file 20000\nactive_file 30000\n"
    assert kernel(memory_of_max="100000", memory_of_current="95000", memory_of_stat=stat) == 55_000


def test_the_limits_of_a_job_count(kernel):
    """The group that a process is in, and each one around it, limits it: as batch systems do it."""
    found = kernel(
        meminfo=MEMINFO,
        groups="0::/jobs/job_7/step_0\n",
        jobs__memory_of_max="max",
        jobs__memory_of_current="5",
        jobs__job_7__memory_of_max="60000",
        jobs__job_7__memory_of_current="20000",
        jobs__job_7__step_0__memory_of_max="90000",
        jobs__job_7__step_0__memory_of_current="20000",
    )
    assert found == 40_000


def test_this_machine_can_tell():
    """On Linux the answer is a number of bytes."""
    assert available_bytes() > 0
