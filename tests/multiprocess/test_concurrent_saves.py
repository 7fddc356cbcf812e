"""Several processes at one path at once, and the places where a save may find itself."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.disks import tree
from support.processes import KILLED, descriptors, ended, fork, in_child, is_running
from support.saves import SCENARIOS, load, save, which
from support.states import make_state, same

from milepost.errors import MilepostError, StorageError, TargetError
from milepost.health.verify import verify
from milepost.storage import default_storage
from milepost.storage.writing import Ring
from milepost.testing import FaultyStorage

BLOCK_BYTES = Ring().block_bytes


def tidy(path):
    """Nothing but the checkpoint is in its folder and the one above."""
    parent, name = os.path.split(path)
    assert os.listdir(parent) == [name]
    assert sorted(tree(default_storage(), path)) == ["checkpoint_0.pt", "index_0.json", "manifest.json"]


@pytest.mark.parametrize("before", [True, False], ids=["replacing", "fresh"])
def test_two_processes_that_save_to_one_path_both_succeed(tmp_path, before):
    """In many rounds at once: both succeed, and what loads then is one of the two, whole."""
    winners = set()
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = str(folder / "step")
        if before:
            save(path, 1)
        pids = [fork(lambda path=path, state=state: save(path, state)) for state in (2, 3)]
        assert [ended(pid) for pid in pids] == [0, 0]
        winners.add(which(path))
        save(path, 4)
        assert which(path) == 4
        tidy(path)
    assert winners <= {2, 3}


def test_the_later_publish_stands(tmp_path):
    """A save that publishes while another is half-way is replaced by that one, which publishes later."""
    path = f"{tmp_path}/step"
    save(path, 1)

    def meanwhile(operation, target):
        if operation == "create" and target.endswith("checkpoint_0.pt"):
            assert in_child(lambda: save(path, 2)) == 0
            assert which(path) == 2

    save(path, 3, FaultyStorage(default_storage(), before=meanwhile))
    assert which(path) == 3
    tidy(path)


@pytest.mark.parametrize("plain", [False, True], ids=["ours", "plain"])
def test_readers_always_find_a_whole_state_while_it_is_replaced(tmp_path, plain):
    """Loads in a loop, anew and into a template, beside saves in a loop: each finds one state, whole."""
    scenario = SCENARIOS[3 if plain else 2]
    path = scenario.prepare(str(tmp_path))

    def saves():
        for number in range(2, 40):
            save(path, number)

    pid = fork(saves)
    seen = set()
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        seen.add(scenario.found(path))
        if not plain:
            template = make_state(0)
            load(path, template)
            assert same(template, make_state(template["numbers"][0]))
    assert ended(pid) == 0
    assert None not in seen
    assert which(path) == 39


def replacing(path, at):
    """A storage before whose operation of this number the checkpoint at a path is replaced."""

    def before(operation, target):
        if len(storage.operations) == at - 1:
            storage.before = None
            save(path, 2)

    storage = FaultyStorage(default_storage(), before=before)
    return storage


def test_a_reader_meets_a_replace_at_every_operation(tmp_path):
    """Before any operation of a load the checkpoint is replaced: the old or the new one loads."""
    for into in (False, True):
        for at in range(1, 60):
            folder = tmp_path / f"{into}-{at}"
            folder.mkdir()
            for scenario in (SCENARIOS[2], SCENARIOS[3]):
                root = folder / scenario.name
                root.mkdir()
                path = scenario.prepare(str(root))
                storage = replacing(path, at)
                if scenario.plain:
                    found = load(path, storage=storage)
                    assert found.get("epoch") == 3 or same(found, make_state(2))
                else:
                    found = load(path, make_state(0) if into else None, storage=storage)
                    assert same(found, make_state(found["numbers"][0]))
            if len(storage.operations) < at:
                break


def test_verify_meets_a_replace_at_every_operation(tmp_path):
    """Before any operation of `verify` the checkpoint is replaced: what is there then is found whole."""
    for at in range(1, 60):
        folder = tmp_path / str(at)
        folder.mkdir()
        path = SCENARIOS[2].prepare(str(folder))
        storage = replacing(path, at)
        assert not verify(storage, path).problems
        if len(storage.operations) < at:
            break


# ---------------------------------------------------------------------------- kills at random moments

SAVER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from support.processes import ended, fork
from support.saves import save
torch.set_num_threads(1)
big = {"big": torch.full((%d,), 2.0)}
for _ in sys.stdin:
    pid = fork(lambda: save(sys.argv[1], big, step=2))
    print(pid, flush=True)
    print(ended(pid), flush=True)
"""


def test_a_save_of_many_blocks_that_is_killed_at_any_moment_loses_nothing(tmp_path):
    """SIGKILL when the growing file has reached a random size: the old state loads; a save tidies up."""
    choose = random.Random(7)
    blocks = 6
    count = blocks * BLOCK_BYTES // 4
    path = f"{tmp_path}/step"
    save(path, {"big": torch.full((count,), 1.0)}, step=1)
    killed = 0
    command = [sys.executable, "-c", SAVER % count, path, str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        for round_ in range(4):
            goal = choose.randint(1, blocks - 1) * BLOCK_BYTES
            saver.stdin.write("go\n")
            saver.stdin.flush()
            pid = int(saver.stdout.readline())
            while is_running(pid):
                sizes = []
                for file in tmp_path.glob(".step.*.partial/checkpoint_0.pt"):
                    with suppress(FileNotFoundError):  # it is published meanwhile
                        sizes.append(file.stat().st_size)
                if sizes and max(sizes) >= goal:
                    os.kill(pid, signal.SIGKILL)
                    break
            assert int(saver.stdout.readline()) in (0, KILLED)
            killed += bool(list(tmp_path.glob(".step.*.partial")))
            found = load(path)["big"]
            assert found.eq(found[0]).all()
            assert found[0] == (1.0 if round_ == 0 else found[0])
            assert not verify(default_storage(), path).problems
    assert killed >= 2
    save(path, 3)
    assert which(path) == 3
    tidy(path)


def test_ctrl_c_in_the_middle_of_a_save_leaves_nothing(tmp_path, interruptible):
    """SIGINT while blocks are written: nothing is left, no thread, no descriptor; then it saves."""
    path = f"{tmp_path}/step"
    save(path, 1)
    state = {"big": torch.zeros(6 * BLOCK_BYTES // 4)}
    for number in (1, 2, 4):
        writes = []

        def interrupt(operation, target, writes=writes, number=number):
            if operation == "write" and target.endswith("checkpoint_0.pt"):
                writes.append(target)
                if len(writes) == number:
                    os.kill(os.getpid(), signal.SIGINT)

        before, threads = descriptors(), threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            save(path, state, FaultyStorage(default_storage(), before=interrupt), step=2)
        assert threading.active_count() == threads
        assert descriptors() == before
        assert which(path) == 1
        tidy(path)
    save(path, 3)
    assert which(path) == 3


# ---------------------------------------------------------------------------- places


def test_a_full_disk_is_an_error_and_loses_nothing():
    """On a disk of 1 MiB: a save that does not fit says so and leaves nothing; the one of before loads."""
    folder = tempfile.mkdtemp(prefix="milepost-full-")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        os.rmdir(folder)
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        path = f"{folder}/step"
        save(path, 1)
        for count in (300_000, 3_000_000, 258_000):
            with pytest.raises(StorageError, match="No space left") as caught:
                save(path, {"big": torch.zeros(count)}, step=2)
            assert folder in str(caught.value)
            assert "free space" in str(caught.value)
            assert which(path) == 1
            tidy(path)
        save(path, 3)
        assert which(path) == 3
        with pytest.raises(TargetError, match="mount point"):
            save(folder, 4)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        os.rmdir(folder)


def as_nobody(work):
    """Run in a child that has given up root's rights, if it had them."""

    def dropped():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return in_child(dropped)


@pytest.fixture
def open_path():
    """A folder that everybody may enter."""
    folder = tempfile.mkdtemp(prefix="milepost-open-")
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_to_is_refused_at_once(open_path):
    """A parent or a checkpoint without the right to write: a TargetError, nothing touched; it still loads."""
    path = f"{open_path}/step"
    save(path, 1)

    def work():
        for target in (f"{open_path}/new", path):
            with pytest.raises(TargetError) as caught:
                save(target, 2)
            assert target in str(caught.value)
            assert "hint" in str(caught.value)
        assert which(path) == 1

    assert as_nobody(work) == 0
    assert which(path) == 1
    tidy(path)


def test_a_checkpoint_that_may_not_be_read_is_an_error(open_path):
    """Files or a folder without the right to read: the error names the path and the reason."""
    path = f"{open_path}/step"
    save(path, 1)
    for name in ("checkpoint_0.pt", "index_0.json", "manifest.json", ""):
        os.chmod(f"{path}/{name}", 0)

        def work():
            with pytest.raises(MilepostError, match="Permission denied") as caught:
                load(path)
            assert path in str(caught.value)

        assert as_nobody(work) == 0
        os.chmod(f"{path}/{name}", 0o755)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    """A file, a link, a pipe, a broken link and "" are refused, and stay as they are."""
    real = f"{tmp_path}/real"
    save(real, 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    for name in ("file", "link", "broken", "pipe", "file/below", "pipe/below", "broken/below"):
        with pytest.raises(TargetError) as caught:
            save(f"{tmp_path}/{name}", 2)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(TargetError):
        save("", 2)
    with pytest.raises(TargetError):
        save("a\0b", 2)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == "mine"
    assert which(real) == 1
    assert which(f"{tmp_path}/link") == 1  # reading through a link is fine


NAMES = {
    "unicode": "Modell é 模型 🚀",
    "composed": "e\u0301",
    "blank": " ",
    "newline": "a\nb",
    "hidden": ".hidden",
    "quotes": "a'b\"c\\d*?[x]",
    "long": "x" * 255,
    "long-unicode": "é" * 127,
    "bytes": os.fsdecode(b"\xff\xfe name"),
    "partial": ".a.b.partial",
    "percent": "%s%n{0}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_that_the_file_system_takes_will_do(tmp_path, name):
    """Unicode, blanks, odd characters, 255 bytes, bytes that are no text: saved, replaced and loaded."""
    path = f"{tmp_path}/{name}"
    for number in (1, 2):
        save(path, number)
        assert which(path) == number
        tidy(path)


@pytest.mark.parametrize(
    "name", ["x" * 256, "é" * 128, "a/" * 3000 + "b"], ids=["long", "long-unicode", "deep"]
)
def test_a_name_that_is_too_long_is_refused(tmp_path, name):
    """A name or path beyond the system's limit is an error that says so, and nothing is made."""
    with pytest.raises((TargetError, StorageError), match="too long"):
        save(f"{tmp_path}/{name}", 1)
    assert not os.listdir(tmp_path)


def test_a_working_directory_that_has_gone_is_an_error(tmp_path):
    """A relative path in a removed working directory is refused with words; an absolute one works."""
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    save(f"{tmp_path}/step", 1)
    assert which(f"{tmp_path}/step") == 1
    with pytest.raises(MilepostError):
        save("step", 1)
    with pytest.raises(MilepostError):
        load("step")


def test_a_relative_path_means_the_folder_at_the_time_of_the_save(tmp_path):
    """A change of the working directory during a save does not move the checkpoint."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    os.chdir(tmp_path / "a")
    save("step", 1, FaultyStorage(default_storage(), before=lambda *_: os.chdir(tmp_path / "b")))
    assert which(f"{tmp_path}/a/step") == 1
    assert os.listdir(tmp_path / "b") == []


def test_the_users_folder_is_never_taken(tmp_path):
    """A folder that holds anything but a checkpoint is refused, and stays as it was."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "mine" / "checkpoint_0.pt").write_text("not torch's")
    with pytest.raises(TargetError, match=r"thesis\.txt"):
        save(f"{tmp_path}/mine", 1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


@pytest.mark.slow
def test_many_processes_save_and_load_for_a_while(tmp_path):
    """Four savers and two readers at one path for half a minute: every load finds one state, whole."""
    path = f"{tmp_path}/step"
    save(path, 1)
    end = time.monotonic() + 30

    def saves(number):
        while time.monotonic() < end:
            save(path, number)

    def loads():
        while time.monotonic() < end:
            assert which(path, verified=False) is not None

    pids = [fork(lambda n=n: saves(n)) for n in range(2, 6)] + [fork(loads) for _ in range(2)]
    assert [ended(pid) for pid in pids] == [0] * 6
    save(path, 7)
    tidy(path)
