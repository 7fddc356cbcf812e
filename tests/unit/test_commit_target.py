"""Which paths a save may create or replace, and what names it uses beside them."""

from __future__ import annotations

import os

import pytest
from support.commits import assert_clean, content, loaded_step, save
from support.disks import MemoryStorage, Wrapper, hidden, make_folders, put, tree

from milepost.commit import check_target
from milepost.commit.by_rename.folders import siblings
from milepost.errors import StorageError, TargetError
from milepost.format.names import data_name, join_hidden
from milepost.storage import Stat
from milepost.storage.local import LocalStorage

LOCAL = LocalStorage()


def test_what_is_replaced_is_told(tmp_path):
    """Nothing, an empty folder, a checkpoint and a folder of plain files may be replaced."""
    path = str(tmp_path / "step")
    assert check_target(LOCAL, path).replaces == "nothing"
    os.mkdir(path)
    assert check_target(LOCAL, path).replaces == "empty"
    put(LOCAL, f"{path}/{data_name(3)}", b"")
    assert check_target(LOCAL, path).replaces == "plain"
    save(LOCAL, path, 1)
    put(LOCAL, f"{path}/notes.txt", b"mine")
    assert check_target(LOCAL, path).replaces == "checkpoint"


def test_our_passing_files_do_not_count_as_the_users(tmp_path):
    """A folder that holds nothing but attempt.json and beacons counts as empty."""
    for name in ("attempt.json", "state_0.json", "abort_12.json", ".attempt.json.0123456789abcdef.tmp"):
        put(LOCAL, str(tmp_path / name), b"{}")
    assert check_target(LOCAL, str(tmp_path)).replaces == "empty"


def test_a_relative_path_means_the_folder_of_now(tmp_path):
    """The target's path is absolute, from the working directory at the time of the call."""
    os.chdir(tmp_path)
    assert check_target(LOCAL, "a/../step").path == str(tmp_path / "step")
    assert check_target(LOCAL, tmp_path / "other").path == str(tmp_path / "other")


def make_file(folder):
    (folder / "step").write_text("a file")


def make_link(folder):
    (folder / "real").mkdir()
    (folder / "step").symlink_to(folder / "real")


def make_strangers(folder):
    (folder / "step").mkdir()
    for name in ("checkpoint_0.pt", "thesis.tex", "a", "b", "c", "d", "e"):
        (folder / "step" / name).write_text("")


def make_odd_number(folder):
    (folder / "step").mkdir()
    (folder / "step" / "checkpoint_007.pt").write_text("")


def make_data_folder(folder):
    (folder / "step" / "checkpoint_0.pt").mkdir(parents=True)


def make_damaged(folder):
    (folder / "step").mkdir()
    (folder / "step" / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "this is a file"),
        (make_link, "this is a symbolic link"),
        (make_strangers, r"holds files that belong to no checkpoint \(a, b, c, d, e and 1 more\)"),
        (make_odd_number, "checkpoint_007.pt"),
        (make_data_folder, "checkpoint_0.pt"),
        (make_damaged, "a manifest that cannot be read"),
    ],
)
def test_what_may_not_be_replaced_is_refused_with_a_way_out(tmp_path, make, message):
    """Anything but a checkpoint is refused before anything is touched, with the path and what to do."""
    make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    path = str(tmp_path / "step")
    with pytest.raises(TargetError, match=message) as caught:
        check_target(LOCAL, path)
    assert caught.value.path == path
    assert caught.value.hint
    assert "save to save" not in caught.value.hint
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none_is_refused(path):
    """An empty path, or one with a zero byte, is no target."""
    with pytest.raises(TargetError, match="not the path"):
        check_target(LOCAL, path)


def test_a_mount_point_is_refused():
    """The root of a file system cannot be renamed away."""
    with pytest.raises(TargetError, match="mount point"):
        check_target(LOCAL, "/proc")


def test_a_file_above_the_path_is_refused(tmp_path):
    """A path below a file cannot become a checkpoint."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError):
        check_target(LOCAL, str(tmp_path / "file" / "step"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TargetError, match="not a folder"):
        check_target(LOCAL, str(tmp_path / "dangling" / "step"))


def test_a_link_to_a_folder_above_the_path_is_fine(tmp_path):
    """A run folder may be a symbolic link to where the space is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    path = str(tmp_path / "run" / "step")
    save(LOCAL, path, 1)
    assert loaded_step(LOCAL, path) == 1
    assert os.path.isdir(tmp_path / "real" / "step")


class ReadOnly(Wrapper):
    """A storage in which one folder is not writable."""

    def __init__(self, inner, path):
        super().__init__(inner)
        self.path = path

    def stat(self, path):
        found = self.inner.stat(path)
        return Stat("folder", 0, 0.0, mount_point=False, writable=False) if path == self.path else found


@pytest.mark.parametrize(("read_only", "message"), [("/run", "folder above"), ("/run/step", "read-only")])
def test_a_read_only_folder_is_refused(read_only, message):
    """A folder without write permission is refused, whether it is the checkpoint or the one above."""
    storage = MemoryStorage()
    make_folders(storage, "/run/step")
    with pytest.raises(TargetError, match=message):
        check_target(ReadOnly(storage, read_only), "/run/step")


def test_a_name_that_the_file_system_refuses_is_an_error_with_the_path(tmp_path):
    """A name that is too long for the file system is refused at once."""
    with pytest.raises(TargetError, match="too long"):
        check_target(LOCAL, str(tmp_path / ("x" * 300)))


def test_missing_parents_are_made(tmp_path):
    """A save creates the folders above its path."""
    path = str(tmp_path / "a" / "b" / "step")
    save(LOCAL, path, 1)
    assert loaded_step(LOCAL, path) == 1
    assert_clean(LOCAL, path)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 255,
        "ä" * 127,
        "日本" * 42,
        "with space",
        "a.b",
        ".hidden",
        "-rf",
        "new\nline",
        "\udcff\udc80raw",
        "🜁",
    ],
)
def test_any_name_that_the_file_system_takes_can_be_saved_replaced_and_cleared(tmp_path, name):
    """Long, Unicode and undecodable names work for all that happens to a checkpoint."""
    path = str(tmp_path / name)
    save(LOCAL, path, 1)
    partial = join_hidden(path, "job-1")
    os.mkdir(partial)
    assert [found.path for found in siblings(LOCAL, path)] == [partial]
    save(LOCAL, path, 2)
    assert loaded_step(LOCAL, path) == 2
    assert sorted(os.listdir(tmp_path)) == [name]


def test_the_hidden_folders_of_one_name_are_not_those_of_another(tmp_path):
    """Names that begin alike, and long names that are cut alike, have different hidden folders."""
    for one, other in [("a", "a.b"), ("a.b", "a"), ("x" * 200, "x" * 201), ("step", "step.1")]:
        os.makedirs(join_hidden(str(tmp_path / one), "job-1"))
        assert siblings(LOCAL, str(tmp_path / other)) == []
        os.rmdir(join_hidden(str(tmp_path / one), "job-1"))


def test_something_that_appears_at_the_path_meanwhile_is_never_replaced():
    """A stranger's folder that appears during a save stays; the checkpoint waits, loads, and comes later."""
    storage = MemoryStorage()
    make_folders(storage, "/run")

    def appear(_):
        make_folders(storage, "/run/step")
        put(storage, "/run/step/thesis.tex", b"mine")

    with pytest.raises(TargetError, match=r"thesis\.tex"):
        save(storage, "/run/step", 1, hook=appear)
    assert tree(storage, "/run/step") == {"thesis.tex": b"mine"}
    assert len(hidden(storage, "/run/step")) == 1
    assert loaded_step(storage, "/run/step") == 1
    storage.rename("/run/step", "/run/thesis", "create")
    save(storage, "/run/step", 2)
    assert loaded_step(storage, "/run/step") == 2
    assert_clean(storage, "/run/step")


def test_a_plain_folder_is_replaced_whole():
    """Of plain files, those of all ranks go, and nothing else was there."""
    storage = MemoryStorage()
    make_folders(storage, "/run/step")
    for rank in range(3):
        put(storage, f"/run/step/{data_name(rank)}", content(0))
    save(storage, "/run/step", 1)
    assert tree(storage, "/run/step").keys() == {"checkpoint_0.pt", "index_0.json", "manifest.json"}


def test_an_entry_of_the_user_never_overwrites_nor_is_overwritten():
    """A file of the user whose name the new checkpoint uses too gets a name beside it."""
    storage = MemoryStorage()
    make_folders(storage, "/run")
    save(storage, "/run/step", 1)
    put(storage, "/run/step/notes", b"first")
    for step in (2, 3):
        save(storage, "/run/step", step, hook=lambda folder: put(storage, f"{folder}/notes", b"hook"))
        put(storage, f"/run/step/mine{step}", b"mine")
    assert (
        tree(storage, "/run/step").items()
        >= {
            "notes": b"hook",
            "notes.1": b"first",
            "mine2": b"mine",
            "mine3": b"mine",
        }.items()
    )


def test_links_of_the_user_move_along_and_are_not_followed(tmp_path):
    """A link in the folder, also in the place of a listed folder, leads to no deletion outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "words.txt").write_text("mine")
    path = str(tmp_path / "step")

    def hook(folder):
        os.mkdir(f"{folder}/vocab")
        put(LOCAL, f"{folder}/vocab/words.txt", b"ours")

    save(LOCAL, path, 1, hook=hook)
    os.rename(f"{path}/vocab", tmp_path / "away")
    os.symlink(outside, f"{path}/vocab")
    os.symlink(outside, f"{path}/link")
    save(LOCAL, path, 2)
    assert (outside / "words.txt").read_text() == "mine"
    assert os.readlink(f"{path}/vocab") == str(outside)
    assert os.readlink(f"{path}/link") == str(outside)
    assert_clean(LOCAL, path)


def test_a_save_whose_clearing_fails_has_succeeded():
    """When what was replaced cannot be cleared there is a warning, and the next save clears it."""

    class Stubborn(Wrapper):
        def remove(self, path):
            if ".replaced" in path:
                raise StorageError("no", path=path)
            self.inner.remove(path)

    storage = MemoryStorage()
    make_folders(storage, "/run")
    save(storage, "/run/step", 1)
    assert save(Stubborn(storage), "/run/step", 2)
    assert loaded_step(storage, "/run/step") == 2
    assert len(hidden(storage, "/run/step")) == 1
    save(storage, "/run/step", 3)
    assert_clean(storage, "/run/step")
