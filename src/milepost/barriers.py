"""Barriers: where the ranks of a save meet before the checkpoint is committed.

To use a barrier of yours, derive a class from `Barrier`, give it a class attribute ``barrier_type`` and
decorate it with `register_barrier`. A `BarrierConfig` then names it:

    >>> from milepost.barriers import Barrier, BarrierConfig, create_barrier_from_config, register_barrier
    >>> @register_barrier
    ... class Alone(Barrier):
    ...     barrier_type = "alone"
    ...     def __init__(self):
    ...         self.calls = 0
    ...     def execute_barrier(self):
    ...         self.calls += 1
    >>> barrier = create_barrier_from_config(BarrierConfig("alone"))
    >>> barrier.execute_barrier()
    >>> barrier.calls
    1
"""

from __future__ import annotations

import abc
import logging
import threading
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.elastic.utils.store as store_util

from milepost.config import BarrierConfig
from milepost.errors import CommitError, CommitTimeoutError, ConfigError, MilepostError, UnavailableError
from milepost.ranks.start import start_at

__all__ = [
    "BARRIER_REGISTRY",
    "Barrier",
    "BarrierConfig",
    "DistBarrier",
    "TCPStoreBarrier",
    "barrier_store",
    "create_barrier_from_config",
    "register_barrier",
]

logger = logging.getLogger(__name__)


class Barrier(abc.ABC):
    """Holds every rank until all ranks have arrived."""

    @abc.abstractmethod
    def __init__(self, **kwargs: Any) -> None:
        """Make a barrier from the ``barrier_args`` of a `BarrierConfig`."""

    @abc.abstractmethod
    def execute_barrier(self) -> None:
        """Return when every rank has called this; raise if one has not within the barrier's timeout."""


BARRIER_REGISTRY: dict[str, type] = {}
"""Barrier classes by their ``barrier_type``."""

_INIT_SECONDS = 600

_Class = TypeVar("_Class", bound=type)


def register_barrier(barrier_class: _Class) -> _Class:
    """Class decorator: register a barrier by its ``barrier_type``. A class without one stays unregistered."""
    name = getattr(barrier_class, "barrier_type", None)
    if name is not None:
        BARRIER_REGISTRY[name] = barrier_class
    return barrier_class


def create_barrier_from_config(barrier_config: BarrierConfig) -> Barrier | None:
    """Make the barrier that a config names; None if it names none.

    Raises:
        ConfigError: No barrier of this type is registered (the message lists the known types), or the
            barrier could not be made. The cause is what its class raised.
    """
    name = barrier_config.barrier_type
    if name is None:
        return None
    if name not in BARRIER_REGISTRY:
        raise ConfigError(
            f"Unknown barrier type: {name}. Known types: {', '.join(sorted(BARRIER_REGISTRY))}",
            hint="correct barrier_type, or import the module that registers the barrier before this",
        )
    try:
        arguments = barrier_config.barrier_args
        if BARRIER_REGISTRY[name] is TCPStoreBarrier and not arguments:
            arguments = _group_arguments()
        barrier: Barrier = BARRIER_REGISTRY[name](**arguments)
    except MilepostError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the barrier {name!r} could not be made: {type(error).__name__}: {error}",
            hint="check barrier_args: they are the keyword arguments of the barrier's class",
        ) from error
    return barrier


def _group_arguments() -> dict[str, Any]:
    """Arguments of a `TCPStoreBarrier` of all ranks of the default process group. Rank 0 picks a port.

    Raises:
        ConfigError: There is no such group, or it has no store.
        CommitTimeoutError: Rank 0 does not make a barrier, or the store is gone.
    """
    found = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if found else (0, 1)
    start = start_at(None, rank, world_size) if found else None
    if start is None:
        raise ConfigError(
            "a tcp_store barrier takes its arguments from the default process group, and there is none "
            "with a store",
            hint="call torch.distributed.init_process_group before, or give barrier_args",
        )
    host, port = start.tell_address(_INIT_SECONDS)
    return {
        "global_rank": rank,
        "global_world_size": world_size,
        "barrier_prefix": "milepost",
        "timeout_barrier_init_secs": _INIT_SECONDS,
        "use_checkpoint_barrier_tcpstore_libuv": True,
        "tcpstore_port": port,
        "master_address": host,
        "timeout_secs": _INIT_SECONDS,
    }


def barrier_store(barrier: object) -> Any:
    """The store of a barrier, if it has one like torch's. A barrier's ``store`` may be something else."""
    store = getattr(barrier, "store", None)
    return store if callable(getattr(store, "compare_set", None)) else None


@register_barrier
class DistBarrier(Barrier):
    """The barrier of the default process group. Its timeout is the group's."""

    barrier_type = "dist_barrier"

    def __init__(self) -> None:
        """Use the default process group.

        Raises:
            UnavailableError: There is none.
        """
        if not dist.is_initialized():
            raise UnavailableError(
                "DistBarrier needs the default process group, and there is none",
                hint="call torch.distributed.init_process_group first",
            )

    def execute_barrier(self) -> None:
        """Return when every rank of the default group has called this."""
        dist.barrier()


@register_barrier
class TCPStoreBarrier(Barrier):
    """A barrier at a TCP store that rank 0 serves. It needs no process group."""

    barrier_type = "tcp_store"

    def __init__(
        self,
        global_rank: int,
        global_world_size: int,
        barrier_prefix: str,
        timeout_barrier_init_secs: int,
        use_checkpoint_barrier_tcpstore_libuv: bool,  # noqa: ARG002, FBT001 - as above
        tcpstore_port: int,
        master_address: str,
        timeout_secs: int,
    ) -> None:
        """Connect to the store; on rank 0, start it.

        Args:
            global_rank: This rank.
            global_world_size: How many ranks meet.
            barrier_prefix: Begins the keys of this barrier, so that they differ from those of others.
            timeout_barrier_init_secs: How long to wait for the store, in seconds.
            use_checkpoint_barrier_tcpstore_libuv: Accepted for compatibility; torch chooses.
            tcpstore_port: Port of the store on rank 0's host.
            master_address: Rank 0's host.
            timeout_secs: How long `execute_barrier` waits for the other ranks, in seconds.

        Raises:
            ConfigError: There is no connection to the store, or rank 0 cannot serve it at this port.
        """
        self._rank = global_rank
        self._world_size = global_world_size
        self._prefix = barrier_prefix
        self._timeout_secs = timeout_secs
        self._sequence = 0
        self._left: list[Any] = []
        self._stuck: threading.Thread | None = None
        is_master = global_rank == 0
        try:
            self.store = dist.TCPStore(  # type: ignore[attr-defined]
                master_address,
                int(tcpstore_port),
                world_size=global_world_size,
                timeout=timedelta(seconds=timeout_barrier_init_secs),
                is_master=is_master,
            )
        except (dist.DistError, RuntimeError) as error:
            failed, _, _ = f"{'served' if is_master else 'reached'}: {error}".partition("\n")
            raise ConfigError(
                f"the barrier's store at {master_address}:{tcpstore_port} cannot be {failed}",
                rank=global_rank,
                phase="barrier",
                hint="another program may use this tcpstore_port: choose another one, the same on all ranks"
                if is_master
                else "rank 0 must make its checkpointer as well, with this master_address and tcpstore_port",
            ) from error

    def execute_barrier(self) -> None:
        """Return when every rank has called this.

        After a failure the next call tries the same barrier again, so that a rank that did not come to it is
        still in step.

        Raises:
            CommitTimeoutError: After ``timeout_secs`` seconds. It names the ranks that did not arrive.
            CommitError: The store is gone: rank 0, which serves it, has ended.
        """
        key_prefix = f"{self._prefix}{self._sequence}"
        try:
            if self._stuck is not None and self._stuck.is_alive():
                # The thread still uses this store, and on rank 0 it serves the other ranks.
                self._left.append(self.store)
                self.store = getattr(self.store, "clone", lambda: self.store)()
            self._stuck = None
            self.store.set(f"rank{self._rank}", str(self._sequence))
            self._await_all(key_prefix)
            self._meet(key_prefix)
            self._sequence += 1
        except CommitTimeoutError:
            raise
        except (dist.DistError, RuntimeError) as error:
            raise CommitError(
                f"the barrier's store on rank 0 is gone: {str(error).splitlines()[0]}",
                rank=self._rank,
                phase="barrier",
                hint="look at the log of rank 0, which serves the store",
            ) from error

    def _meet(self, key_prefix: str) -> None:
        """Call the store's barrier with our timeout. The store's is 300 seconds if a rank dies in it."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                store_util.barrier(store=self.store, world_size=self._world_size, key_prefix=key_prefix)
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                errors.append(error)

        thread = threading.Thread(target=run, name="milepost-barrier", daemon=True)
        thread.start()
        thread.join(self._timeout_secs)
        if thread.is_alive():
            self._stuck = thread
            raise CommitTimeoutError(
                f"all ranks reached the barrier, but one has not left it within {self._timeout_secs} seconds",
                rank=self._rank,
                phase="barrier",
                hint="a rank has ended in the barrier: look at the ranks' logs",
            )
        if errors:
            raise errors[0]

    def _await_all(self, key_prefix: str) -> None:
        """Wait with our timeout, and name the missing ranks. The store's barrier does neither."""
        keys = [f"{key_prefix}/rank{rank}" for rank in range(self._world_size)]
        self.store.add(keys[self._rank], 1)
        try:
            self.store.wait(keys, timedelta(seconds=self._timeout_secs))
        except (dist.DistStoreError, RuntimeError) as error:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            if not missing:
                return
            raise CommitTimeoutError(
                f"ranks {missing} did not reach the barrier within {self._timeout_secs} seconds",
                rank=self._rank,
                phase="barrier",
                hint="look at those ranks' logs; a slow storage may need a longer timeout_secs",
            ) from error
