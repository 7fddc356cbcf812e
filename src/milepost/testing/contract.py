"""The contract of a storage, as a test class to inherit from."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from milepost import syscalls
from milepost.errors import CorruptCheckpointError, EntryExistsError, EntryNotFoundError, StorageError
from milepost.storage import ALIGNMENT, OpenFile, Storage
from milepost.storage.reading import Part, read_parts, scan_file
from milepost.storage.writing import Ring, publish_bytes, write_bytes, write_stream

__all__ = ["StorageContract"]

E = TypeVar("E", bound=BaseException)

_SIZES = (0, 1, 4095, 4096, 4097, 65536 - 1, 65536, 65536 + 1, 300_000)


@contextmanager
def _raises(kind: type[E]) -> Iterator[list[E]]:
    """Fail unless `kind` is raised inside; the list then holds the error."""
    caught: list[E] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
        return
    raise AssertionError(f"{kind.__name__} expected, nothing was raised")


def _content(size: int) -> bytes:
    """Bytes of which no two blocks are alike."""
    return b"".join(number.to_bytes(8, "little") for number in range(-(-size // 8)))[:size]


def _aligned(data: bytes) -> memoryview:
    view = syscalls.private_memory(max(len(data), 1))[: len(data)]
    view[:] = data
    return view


class StorageContract:
    """Inherit from it, call it ``Test…``, and give it the two fixtures and the two raw accesses.

    The fixture ``storage`` is a storage, the fixture ``folder`` the absolute path of an empty folder in it.
    `raw_put` and `raw_get` write and read a file without the code under test.
    """

    picklable = True
    """Whether instances can be pickled and compared; only storages of a single process may do without."""

    def raw_put(self, storage: Any, path: str, data: bytes) -> None:
        """Create the file."""
        raise NotImplementedError

    def raw_get(self, storage: Any, path: str) -> bytes:
        """The content of the file."""
        raise NotImplementedError

    # -- writing

    def test_written_files_hold_exactly_their_bytes(self, storage: Storage, folder: str) -> None:
        """Files of any size hold exactly what was written, direct or not, from memory aligned or not."""
        for size in _SIZES:
            data = _content(size)
            for direct in (False, True):
                for view in (_aligned(data), memoryview(data), memoryview(bytearray(b"x" + data))[1:]):
                    path = f"{folder}/file"
                    file = storage.create(path, direct=direct)
                    whole = size // ALIGNMENT * ALIGNMENT
                    if size > whole:  # the end first: order does not matter
                        file.write(whole, view[whole:])
                    if whole:
                        file.write(0, view[:whole])
                    file.finish(size)
                    assert self.raw_get(storage, path) == data
                    storage.remove(path)

    def test_finish_sets_the_length(self, storage: Storage, folder: str) -> None:
        """finish() cuts the file to its length, or fills it up with zeros."""
        for size in (0, 5, 10, 5000):
            file = storage.create(f"{folder}/f{size}")
            file.write(0, memoryview(b"0123456789"))
            file.finish(size, sync=size != 5)
            expected = b"0123456789".ljust(size, b"\0")[:size]
            assert self.raw_get(storage, f"{folder}/f{size}") == expected

    def test_discard_leaves_nothing(self, storage: Storage, folder: str) -> None:
        """A discarded file is gone, at once and for good; after finish() discard does nothing."""
        file = storage.create(f"{folder}/gone", direct=True)
        file.write(0, _aligned(_content(4096)))
        file.discard()
        file.discard()
        assert storage.stat(f"{folder}/gone") is None
        kept = storage.create(f"{folder}/kept")
        kept.finish(0)
        kept.discard()
        assert self.raw_get(storage, f"{folder}/kept") == b""

    def test_create_never_takes_a_name(self, storage: Storage, folder: str) -> None:
        """create() refuses a name that is taken and leaves what has it alone."""
        self.raw_put(storage, f"{folder}/file", b"old")
        for direct in (False, True):
            with _raises(EntryExistsError):
                storage.create(f"{folder}/file", direct=direct)
        assert self.raw_get(storage, f"{folder}/file") == b"old"
        with _raises(EntryNotFoundError):
            storage.create(f"{folder}/none/file")

    def test_streams_of_any_length_arrive(self, storage: Storage, folder: str) -> None:
        """write_stream() writes what the caller fills in, and tells how much of it."""
        ring = Ring(65536, 3)
        for size in (*_SIZES, 65536 * 7 + 13):
            data = _content(size)
            told: list[int] = []

            def fill(view: memoryview, offset: int, data: bytes = data) -> None:
                view[:] = data[offset : offset + len(view)]

            file = storage.create(f"{folder}/stream", direct=True)
            write_stream(file, size, fill, ring, told.append)
            file.finish(size)
            assert self.raw_get(storage, f"{folder}/stream") == data
            assert sum(told) == size
            storage.remove(f"{folder}/stream")

    def test_small_files_are_published_in_one_step(self, storage: Storage, folder: str) -> None:
        """publish_bytes() creates or replaces, as it is told, and leaves nothing else."""
        publish_bytes(storage, f"{folder}/a", b"1", "create")
        with _raises(EntryExistsError):
            publish_bytes(storage, f"{folder}/a", b"2", "create")
        assert self.raw_get(storage, f"{folder}/a") == b"1"
        publish_bytes(storage, f"{folder}/a", b"3", "replace", sync=False)
        assert self.raw_get(storage, f"{folder}/a") == b"3"
        with _raises(EntryExistsError):
            write_bytes(storage, f"{folder}/a", b"4")
        assert storage.open_folder(folder).names() == ["a"]

    # -- reading

    def _open(self, storage: Storage, folder: str, data: bytes) -> OpenFile:
        self.raw_put(storage, f"{folder}/data", data)
        return storage.open_folder(folder).open("data")

    def test_reads_give_any_range(self, storage: Storage, folder: str) -> None:
        """read_into() fills any number of buffers from any offset."""
        data = _content(100_000)
        file = self._open(storage, folder, data)
        buffers = [memoryview(bytearray(number % 90)) for number in range(2100)]
        file.read_into(77, buffers)
        assert b"".join(buffers) == data[77 : 77 + sum(map(len, buffers))]
        file.read_into(len(data), [])
        file.close()
        file.close()

    def test_direct_reads_may_reach_past_the_end(self, storage: Storage, folder: str) -> None:
        """read_direct() fills what the file has, and the rest of the buffer holds anything."""
        data = _content(10_000)
        file = self._open(storage, folder, data)
        buffer = _aligned(b"\xff" * 16384)
        file.read_direct(0, buffer)
        assert buffer[: len(data)] == data
        file.read_direct(8192, buffer[:4096])
        assert bytes(buffer[:1808]) == data[8192:]
        file.close()

    def test_reading_past_the_end_is_damage(self, storage: Storage, folder: str) -> None:
        """Wanting more bytes than there are is a CorruptCheckpointError that names the file."""
        file = self._open(storage, folder, b"short")
        for offset, length in ((0, 6), (5, 1), (100, 1)):
            with _raises(CorruptCheckpointError) as caught:
                file.read_into(offset, [memoryview(bytearray(length))])
            assert caught[0].path == f"{folder}/data"
        file.close()

    def test_maps_are_private(self, storage: Storage, folder: str) -> None:
        """A mapping holds the file's bytes, outlives close() and the name, and takes writes for itself."""
        file = self._open(storage, folder, b"original")
        view = file.map()
        file.close()
        if view is not None:
            storage.remove(f"{folder}/data")
            assert bytes(view) == b"original"
            view[0:1] = b"X"
            assert bytes(view) == b"Xriginal"
        assert self._open(storage, folder, b"").map() is None

    def test_open_files_outlive_their_names(self, storage: Storage, folder: str) -> None:
        """An open file stays what it was when its name is removed, renamed or given to another."""
        file = self._open(storage, folder, b"first")
        write_bytes(storage, f"{folder}/other", b"second")
        storage.rename(f"{folder}/other", f"{folder}/data", "replace")
        storage.remove(f"{folder}/data")
        buffer = bytearray(5)
        file.read_into(0, [memoryview(buffer)])
        assert buffer == b"first"
        file.close()

    def test_parts_and_scans_find_every_byte(self, storage: Storage, folder: str) -> None:
        """read_parts() puts each part in its place, and scan_file() gives the CRC of each piece."""
        data = _content(200_000)
        file = self._open(storage, folder, data)
        pieces = [(0, 100), (100, 65536), (65636, 0), (65636, 134_364)]
        crcs = scan_file(file, pieces)
        target = syscalls.private_memory(len(data))
        base = syscalls.address_of(target)
        assert base is not None
        parts = [
            Part(offset, base + offset, length, [crc] if length else [], offset)
            for (offset, length), crc in zip(pieces, crcs, strict=True)
        ]
        assert read_parts(file, parts, chunk_bytes=1 << 20).damaged == []
        assert bytes(target) == data
        file.close()

    # -- folders

    def test_folders_list_and_describe_their_entries(self, storage: Storage, folder: str) -> None:
        """An open folder lists, describes and reads its entries, also when it has been renamed."""
        storage.make_folder(f"{folder}/a")
        storage.make_folder(f"{folder}/a/sub", private=True)
        self.raw_put(storage, f"{folder}/a/sub/file", b"content")
        opened = storage.open_folder(f"{folder}/a")
        storage.rename(f"{folder}/a", f"{folder}/b", "create")
        storage.make_folder(f"{folder}/a")
        assert opened.names() == ["sub"]
        assert opened.read("sub/file", 7) == b"content"
        found = opened.stat("sub/file")
        assert found is not None
        assert (found.kind, found.size_bytes, found.writable) == ("file", 7, True)
        inner = opened.stat("sub")
        assert inner is not None
        assert (inner.kind, inner.mount_point, inner.writable) == ("folder", False, True)
        assert opened.stat("none") is None
        assert opened.stat("none/none") is None
        storage.make_folder(f"{folder}/b/later")
        assert opened.names() == ["later", "sub"]
        opened.close()
        opened.close()
        with _raises(StorageError):
            opened.names()

    def test_names_stay_in_their_folder(self, storage: Storage, folder: str) -> None:
        """A name that is absolute, empty, or could lead out of its folder is damage."""
        self.raw_put(storage, f"{folder}/file", b"x")
        storage.make_folder(f"{folder}/sub")
        opened = storage.open_folder(f"{folder}/sub")
        for name in ("../file", "..", ".", "", "/etc/passwd", "a//b", "a/", "./a", "a\0b", "sub/../../file"):
            for use in (opened.open, opened.stat):
                with _raises(CorruptCheckpointError):
                    use(name)
        opened.close()

    def test_only_regular_files_are_read(self, storage: Storage, folder: str) -> None:
        """A missing file is EntryNotFoundError, a folder or a file that is too long is damage."""
        self.raw_put(storage, f"{folder}/file", b"12345")
        storage.make_folder(f"{folder}/sub")
        opened = storage.open_folder(folder)
        with _raises(EntryNotFoundError):
            opened.open("none")
        for name in ("sub", "file/below"):
            with _raises(CorruptCheckpointError):
                opened.open(name)
        with _raises(CorruptCheckpointError):
            opened.read("file", 4)
        opened.close()

    def test_opening_what_is_no_folder_fails(self, storage: Storage, folder: str) -> None:
        """open_folder() tells a missing folder from a file."""
        with _raises(EntryNotFoundError):
            storage.open_folder(f"{folder}/none")
        self.raw_put(storage, f"{folder}/file", b"")
        with _raises(StorageError):
            storage.open_folder(f"{folder}/file")

    # -- names

    def test_stat_tells_what_is_there(self, storage: Storage, folder: str) -> None:
        """stat() describes files and folders, and gives None for nothing."""
        self.raw_put(storage, f"{folder}/file", b"123")
        file = storage.stat(f"{folder}/file")
        assert file is not None
        assert (file.kind, file.size_bytes) == ("file", 3)
        there = storage.stat(folder)
        assert there is not None
        assert there.kind == "folder"
        assert storage.stat(f"{folder}/none") is None
        assert storage.stat(f"{folder}/none/none") is None

    def test_rename_create_refuses_a_taken_name(self, storage: Storage, folder: str) -> None:
        """Mode "create" moves files and folders to free names only."""
        self.raw_put(storage, f"{folder}/a", b"a")
        self.raw_put(storage, f"{folder}/b", b"b")
        storage.make_folder(f"{folder}/f")
        storage.make_folder(f"{folder}/g")
        for source, target in (("a", "b"), ("f", "g"), ("f", "b"), ("a", "g")):
            with _raises(EntryExistsError):
                storage.rename(f"{folder}/{source}", f"{folder}/{target}", "create")
        storage.rename(f"{folder}/a", f"{folder}/f/c", "create")
        storage.rename(f"{folder}/f", f"{folder}/h", "create")
        assert self.raw_get(storage, f"{folder}/h/c") == b"a"
        assert self.raw_get(storage, f"{folder}/b") == b"b"
        with _raises(EntryNotFoundError):
            storage.rename(f"{folder}/a", f"{folder}/z", "create")

    def test_rename_replace_takes_a_files_name(self, storage: Storage, folder: str) -> None:
        """Mode "replace" replaces a file, or takes a free name, and never a folder that holds something."""
        self.raw_put(storage, f"{folder}/a", b"a")
        self.raw_put(storage, f"{folder}/b", b"b")
        storage.rename(f"{folder}/a", f"{folder}/b", "replace")
        assert self.raw_get(storage, f"{folder}/b") == b"a"
        assert storage.stat(f"{folder}/a") is None
        storage.rename(f"{folder}/b", f"{folder}/c", "replace")
        storage.make_folder(f"{folder}/full")
        storage.make_folder(f"{folder}/other")
        self.raw_put(storage, f"{folder}/full/x", b"x")
        for source in ("c", "other"):
            with _raises(StorageError):
                storage.rename(f"{folder}/{source}", f"{folder}/full", "replace")
        assert self.raw_get(storage, f"{folder}/full/x") == b"x"

    def test_exchange_swaps_two_entries(self, storage: Storage, folder: str) -> None:
        """Mode "exchange" swaps two folders in one step, or is refused with EOPNOTSUPP; both must exist."""
        storage.make_folder(f"{folder}/a")
        storage.make_folder(f"{folder}/b")
        self.raw_put(storage, f"{folder}/a/x", b"1")
        try:
            storage.rename(f"{folder}/a", f"{folder}/b", "exchange")
        except StorageError as error:
            if error.errno == errno.EOPNOTSUPP:
                return
            raise
        assert self.raw_get(storage, f"{folder}/b/x") == b"1"
        assert storage.open_folder(f"{folder}/a").names() == []
        with _raises(EntryNotFoundError):
            storage.rename(f"{folder}/a", f"{folder}/none", "exchange")

    def test_remove_takes_files_and_empty_folders(self, storage: Storage, folder: str) -> None:
        """remove() takes a file or an empty folder, never a full one."""
        storage.make_folder(f"{folder}/sub")
        self.raw_put(storage, f"{folder}/sub/file", b"x")
        with _raises(StorageError):
            storage.remove(f"{folder}/sub")
        storage.remove(f"{folder}/sub/file")
        storage.remove(f"{folder}/sub")
        with _raises(EntryNotFoundError):
            storage.remove(f"{folder}/sub")
        with _raises(EntryExistsError):
            storage.make_folder(folder)

    def test_folders_are_made_public_and_synced(self, storage: Storage, folder: str) -> None:
        """Private folders can be made public, folders be synced, and both must exist."""
        storage.make_folder(f"{folder}/private", private=True)
        storage.make_public(f"{folder}/private")
        storage.sync_folder(f"{folder}/private")
        self.raw_put(storage, f"{folder}/file", b"abc")
        storage.sync_file(f"{folder}/file")
        assert self.raw_get(storage, f"{folder}/file") == b"abc"
        for use in (storage.make_public, storage.sync_folder, storage.sync_file, storage.is_network):
            with _raises(EntryNotFoundError):
                use(f"{folder}/none")

    def test_errors_name_operation_and_path(self, storage: Storage, folder: str) -> None:
        """Every error carries the operation, the path and the errno."""
        with _raises(StorageError) as caught:
            storage.remove(f"{folder}/none")
        error = caught[0]
        assert (error.operation, error.path, error.errno) == ("remove", f"{folder}/none", errno.ENOENT)

    # -- locks

    def test_locks_stand_against_each_other(self, storage: Storage, folder: str) -> None:
        """Shared locks go together, an exclusive one goes with none; release() is idempotent."""
        path = f"{folder}/file"
        with _raises(EntryNotFoundError):
            storage.lock(path)
        self.raw_put(storage, path, b"")
        first, second = storage.lock(path), storage.lock(path)
        assert first is not None
        assert second is not None
        assert storage.lock(path, exclusive=True) is None
        first.release()
        first.release()
        assert storage.lock(path, exclusive=True) is None
        second.release()
        alone = storage.lock(path, exclusive=True)
        assert alone is not None
        assert storage.lock(path) is None
        alone.release()

    def test_storages_are_values(self, storage: Storage) -> None:
        """A pickled storage equals the one it was made from."""
        if self.picklable:
            assert pickle.loads(pickle.dumps(storage)) == storage  # noqa: S301 - our own bytes
