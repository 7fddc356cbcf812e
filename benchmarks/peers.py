"""Milepost and its peers behind one interface, each in its best honest configuration.

A peer that does not sync its files is made durable by this benchmark, inside the time that is measured;
`lacks` says so. None but Milepost and moonclip compare what they load with checksums.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from limits import sync
from workloads import tensors_of, unique

Wait = Callable[[], object]
UNVERIFIED = "loads are not verified"
NO_FSYNC = "no fsync of its own: the benchmark syncs its files, within the time"
PLAIN_STAGING = {
    "use_pinned_memory": False,
    "use_shared_memory": True,
    "use_async_staging": False,
    "use_non_blocking_copy": False,
}


def copy_into(target: Any, loaded: Any) -> None:
    """As `load_state_dict` does it: a copy for each tensor."""
    with torch.no_grad():
        for value, found in zip(tensors_of(target), tensors_of(loaded), strict=True):
            value.copy_(found)


def process_group() -> None:
    """A group of this process alone, for what needs one."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


class Peer:
    """One library in one configuration.

    Attributes:
        name: As the tables show it.
        module: What has to be importable.
        config: How it was configured.
        lacks: What it does not do that Milepost does.
        background: It saves beside the training.
        loads_as: The name of the peer whose loads are the same, so that they are not measured twice.
        objects: It needs a module and an optimizer, not a state dict.
        prepares: It can get ready for the first save.
        keeps: It keeps memory, threads or a process between saves; so later saves differ from the first.
        slow: It takes fewer turns.
    """

    name = ""
    module = "torch"
    config = ""
    lacks = ""
    background = False
    loads_as = ""
    objects = False
    prepares = False
    keeps = True
    slow = False

    def __init__(self, folder: str) -> None:
        self.folder, self.number = folder, 0
        os.makedirs(folder, exist_ok=True)

    def open(self) -> None:
        """Get ready to save, and wait until that is done; start-up has figures of its own."""

    def open_to_load(self) -> None:
        """Get ready to load."""
        self.open()

    def step(self) -> None:
        """A step of training has been done."""

    def path(self) -> str:
        """The newest checkpoint."""
        return os.path.join(self.folder, f"step-{self.number}")

    def save(self, state: Any) -> Wait:
        """Save; the training goes on when this returns, and what it returns ends when all is durable."""
        self.old = self.path()
        self.number += 1
        return self.write(self.path(), state)

    def retire(self) -> None:
        """Remove the checkpoint before the newest, as retention does; this is not measured."""
        if os.path.isdir(self.old):
            shutil.rmtree(self.old)
        elif os.path.exists(self.old):
            os.remove(self.old)

    def write(self, path: str, state: Any) -> Wait:
        raise NotImplementedError

    def prepare(self, state: Any) -> Wait:
        """Get ready for the first save of this state; what it returns ends when that is done."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Fill the tensors of `state` with what was saved last."""
        raise NotImplementedError

    def more_loads(self, state: Any) -> dict[str, Callable[[], object]]:
        """Other ways to load that are worth a figure."""
        return {}

    def find(self) -> None:
        """In a new process: find the newest checkpoint."""
        names = [name for name in os.listdir(self.folder) if name.startswith("step-")]
        self.number = max((int(name.partition("-")[2].partition(".")[0]) for name in names), default=0)


class Milepost(Peer):
    name, background, prepares = "milepost", True, True
    config = "make_async_checkpointer(), defaults"

    def open(self) -> None:
        import milepost

        self.checkpointer = milepost.make_async_checkpointer()
        self.checkpointer._process.process_creation_future.result()

    def open_to_load(self) -> None:
        import milepost

        self.checkpointer = milepost.make_sync_checkpointer()

    def prepare(self, state: Any) -> Wait:
        self.checkpointer.prepare(state)
        return self.checkpointer._stager.wait_prepared

    def write(self, path: str, state: Any) -> Wait:
        staged, written = self.checkpointer.save(path, state)
        staged.result()
        return written.result

    def load(self, state: Any) -> None:
        self.checkpointer.load(self.path(), state)

    def verify(self) -> None:
        from milepost.health.verify import verify
        from milepost.storage import default_storage

        assert not verify(default_storage(), self.path()).problems

    def more_loads(self, state: Any) -> dict[str, Callable[[], object]]:
        load = self.checkpointer.load
        return {
            "unverified": lambda: load(self.path(), state, verify=False),
            "no template": lambda: load(self.path()),
            "no template, unverified": lambda: load(self.path(), verify=False),
        }


class MilepostSync(Milepost):
    name, background, prepares, loads_as = "milepost sync", False, False, "milepost"
    config = "make_sync_checkpointer(), defaults"

    def open(self) -> None:
        self.open_to_load()

    def write(self, path: str, state: Any) -> Wait:
        self.checkpointer.save(path, state)
        return lambda: None


class TorchSave(Peer):
    name, keeps = "torch.save + fsync", False
    config = "torch.save into a file, fsync; torch.load(mmap=True) and a copy for each tensor"
    lacks = f"not atomic; {UNVERIFIED}"

    def path(self) -> str:
        return super().path() + ".pt"

    def write(self, path: str, state: Any) -> Wait:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def load(self, state: Any) -> None:
        copy_into(state, torch.load(self.path(), mmap=True))


class Safetensors(Peer):
    name, module, keeps = "safetensors + fsync", "safetensors", False
    config = "save_file of a flat dict, fsync; load_file and a copy for each tensor"
    lacks = f"not atomic, tensors only, no tied tensors; {UNVERIFIED}"

    def path(self) -> str:
        return super().path() + ".safetensors"

    def write(self, path: str, state: Any) -> Wait:
        from safetensors.torch import save_file

        save_file(self._flat(state), path)
        sync(path)
        return lambda: None

    def load(self, state: Any) -> None:
        from safetensors.torch import load_file

        loaded = load_file(self.path())
        with torch.no_grad():
            for name, value in self._flat(state).items():
                value.copy_(loaded[name])

    @staticmethod
    def _flat(state: Any) -> dict[str, torch.Tensor]:
        """Each memory once: tied tensors are refused."""
        return {str(number): value for number, value in enumerate(unique(state))}


class DCP(Peer):
    name = "DCP"
    config = "torch.distributed.checkpoint.save, FileSystemWriter, its files synced (default)"
    lacks = f"its folder is not synced, not atomic; {UNVERIFIED}"

    def open(self) -> None:
        process_group()

    def write(self, path: str, state: Any) -> Wait:
        import torch.distributed.checkpoint as dcp

        dcp.save(state, checkpoint_id=path)
        return lambda: None

    def load(self, state: Any) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(state, checkpoint_id=self.path())


class DCPAsync(DCP):
    background, loads_as, kind = True, "DCP", "thread"
    name = "DCP async, thread"
    config = "async_save, a thread, one stager kept between saves"

    def open(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().open()
        shared = {"use_shared_memory": self.kind == "process"}
        self.stager = DefaultStager(StagingOptions(**PLAIN_STAGING | shared))

    def write(self, path: str, state: Any) -> Wait:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType[self.kind.upper()]
        found = checkpoint.async_save(
            state, checkpoint_id=path, async_checkpointer_type=kind, async_stager=self.stager
        )
        if hasattr(found, "staging_completion"):
            found.staging_completion.result()
            found = found.upload_completion
        return found.result


class DCPProcess(DCPAsync):
    name, kind, slow = "DCP async, process", "process", True
    config = "async_save, a process, one stager with shared memory kept between saves"


class Experimental(Peer):
    name, background, slow = "torch _experimental", True, True
    config = "make_async_checkpointer, shared memory, no pinning"
    lacks = f"{NO_FSYNC}; not atomic; {UNVERIFIED}"

    def open_to_load(self) -> None:
        from torch.distributed.checkpoint._experimental.builder import make_sync_checkpointer
        from torch.distributed.checkpoint._experimental.types import RankInfo

        self.checkpointer = make_sync_checkpointer(rank_info=RankInfo(0, 1))

    def open(self) -> None:
        from torch.distributed.checkpoint._experimental.builder import make_async_checkpointer
        from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
        from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
        from torch.distributed.checkpoint._experimental.types import RankInfo

        config = CheckpointerConfig(staging_config=CheckpointStagerConfig(**PLAIN_STAGING))
        self.checkpointer = make_async_checkpointer(config=config, rank_info=RankInfo(0, 1))
        self.checkpointer._checkpoint_process.process_creation_future.result()

    def write(self, path: str, state: Any) -> Wait:
        staged, written = self.checkpointer.save(path, state)
        staged.result()

        def durable() -> None:
            written.result()
            sync(path)

        return durable

    def load(self, state: Any) -> None:
        self.checkpointer.load(self.path(), state)


class TorchCheckpointing(Peer):
    name, module = "torch_checkpointing", "torch_checkpointing"
    background = prepares = slow = True
    config = "CheckpointManager, shared memory, no pinning, no direct I/O (ext4 refuses its writes)"
    lacks = f"{NO_FSYNC}; {UNVERIFIED}"

    def open(self) -> None:
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig

        self._open(AsyncCheckpointSaverConfig(staging_config=CheckpointStagerConfig(**PLAIN_STAGING)))
        self.manager._saver._checkpoint_process._creation_future.result()

    def open_to_load(self) -> None:
        from torch_checkpointing.config import SyncCheckpointSaverConfig

        self._open(SyncCheckpointSaverConfig())

    def _open(self, save: Any) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(CheckpointManager.Config(save=save, storage_config=storage))

    def prepare(self, state: Any) -> Wait:
        self.manager.prewarm_staging({"state": state})
        return self.manager._prewarm_staging_future.result

    def write(self, path: str, state: Any) -> Wait:
        written = self.manager.save(path, {"state": state})

        def durable() -> None:
            written.result()
            sync(path)

        return durable

    def load(self, state: Any) -> None:
        self.manager.load(self.path(), into={"state": state})


class Moonclip(Peer):
    name, module, level = "moonclip", "moonclip", 3
    background = slow = True
    config = "CheckpointManager, defaults: zstd level 3, deltas; loads copied into the tensors"
    lacks = "a format of its own; checksums of each tensor, verified"

    def open(self) -> None:
        import moonclip

        self.manager = moonclip.CheckpointManager(self.folder, compression_level=self.level)

    def path(self) -> str:
        return self.folder

    def save(self, state: Any) -> Wait:
        self.number += 1
        self.manager.save(self.number, extra={"state": state})
        return self.manager.flush

    def retire(self) -> None:
        """It keeps what later deltas need."""

    def load(self, state: Any) -> None:
        loaded = self.manager.load_latest()[1]
        copy_into(state, loaded["extra/state"])

    def find(self) -> None:
        self.number = 1


class MoonclipPlain(Moonclip):
    name, level = "moonclip, no compression", 0
    config = "CheckpointManager(compression_level=0), deltas; loads copied into the tensors"


class Ravex(Moonclip):
    name, module, objects = "ravex", "ravex", True
    config = "train_loop, moonclip below it, ravex.checkpoint() and ravex.flush(), no saves between"
    lacks = "a format of its own (moonclip's); a save that fails is a line in the log by default"

    def open(self) -> None:
        import ravex

        options = {"storage": {"type": "local", "path": self.folder}, "delta": False, "handle_sigterm": False}
        # What the decorator calls first; the function it decorates would be the whole worker.
        ravex._activate(checkpoint_every=10**9, fallback_on_error=False, **options)

    def track(self, model: Any, optimizer: Any) -> None:
        import ravex

        self.optimizer = optimizer
        ravex.track(model, optimizer)

    def step(self) -> None:
        """It saves once a step, which it counts by the optimizer; without gradients that changes nothing."""
        self.optimizer.step()

    def save(self, state: Any) -> Wait:
        import ravex

        self.number += 1
        if not ravex.checkpoint():
            raise RuntimeError("ravex made no checkpoint")
        return ravex.flush

    def load(self, state: Any) -> None:
        """It loads by itself as soon as it is asked for the step."""
        import ravex

        if not ravex.step():
            raise RuntimeError("ravex found no checkpoint")


ALL: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Milepost, MilepostSync, TorchSave, Safetensors, DCP, DCPAsync, DCPProcess, Experimental,
        TorchCheckpointing, Moonclip, MoonclipPlain, Ravex,
    )
}  # fmt: skip


def missing(peer: type[Peer]) -> str:
    """Why this peer cannot be measured here; "" if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(peer.module)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        told = os.path.join(sys.prefix, "bench-errors", peer.module)  # by tools/install.sh
        if os.path.exists(told):
            with open(told, encoding="utf-8") as file:
                return f"cannot be installed: {file.read().strip()[-160:]}"
        return f"{type(error).__name__}: {error}"
    return ""
