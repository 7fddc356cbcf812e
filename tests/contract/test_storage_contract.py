"""Every storage, and every wrapper round one, keeps the storage contract."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.disks import MemoryStorage
from support.power import RecordingStorage

from milepost.storage.local import LocalStorage
from milepost.testing import FaultyStorage, StorageContract


class _OnDisk(StorageContract):
    def raw_put(self, storage, path, data):
        Path(path).write_bytes(data)

    def raw_get(self, storage, path):
        return Path(path).read_bytes()


class TestLocalStorage(_OnDisk):
    @pytest.fixture
    def storage(self):
        return LocalStorage()

    @pytest.fixture
    def folder(self, tmp_path):
        return str(tmp_path)


class TestLocalStorageInSharedMemory(TestLocalStorage):
    """On tmpfs, which caches everything and may refuse direct I/O."""

    @pytest.fixture
    def folder(self, shm_path):
        return str(shm_path)


class TestLocalStorageWithoutDirectOpen(TestLocalStorage):
    """Where O_DIRECT is refused when the file is opened."""

    @pytest.fixture(autouse=True)
    def _refuse(self, refuse_direct_open):
        pass


class TestLocalStorageWithoutDirectCalls(TestLocalStorage):
    """Where O_DIRECT is taken when the file is opened, and refused at the first read or write."""

    @pytest.fixture(autouse=True)
    def _refuse(self, refuse_direct_calls):
        pass


class TestLocalStorageWithoutRenameFlags(TestLocalStorage):
    """Where the file system can rename, but not exchange or refuse a taken name."""

    @pytest.fixture(autouse=True)
    def _refuse(self, monkeypatch):
        def refuse(*_):
            raise OSError(22, os.strerror(22))

        monkeypatch.setattr("milepost.syscalls.rename_exchange", refuse)
        monkeypatch.setattr("milepost.syscalls.rename_noreplace", refuse)


class TestFaultyStorage(_OnDisk):
    picklable = False

    @pytest.fixture
    def storage(self):
        return FaultyStorage(LocalStorage())

    @pytest.fixture
    def folder(self, tmp_path):
        return str(tmp_path)


class TestMemoryStorage(StorageContract):
    picklable = False

    @pytest.fixture
    def storage(self):
        return MemoryStorage()

    @pytest.fixture
    def folder(self, storage):
        storage.make_folder("/folder")
        return "/folder"

    def raw_put(self, storage, path, data):
        file = storage.create(path)
        file.write(0, memoryview(data))
        file.finish(len(data))

    def raw_get(self, storage, path):
        folder, _, name = path.rpartition("/")
        return storage.open_folder(folder).read(name, 1 << 40)


class TestRecordingStorage(TestMemoryStorage):
    @pytest.fixture
    def storage(self):
        return RecordingStorage(MemoryStorage())
