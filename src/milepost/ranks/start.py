"""A start: one life of a group of ranks, with an id that they agree on at a store that all of them reach.

A store may outlive the ranks, as the one of torchrun's agent does. Its keys may then be those of dead ranks.
A rank therefore trusts an answer only under a key as new as its question. Rank 0 answers in a thread of its
own.

    milepost/<ranks>/hello/<r>          rank r asks for the start's id: a random token
    milepost/answer/<token>             rank 0 answers: the id
    milepost/<id>/joined/<token>        the rank with this token has read the answer
    milepost/<id>/absent                rank 0 lists the ranks that have not
    milepost/<id>/go                    all ranks have: the id is the same on all of them
    milepost/<id>/barrier/<n>           rank 0 gives the address of the store of a barrier

All other keys are below a start's id: those of saves (`save_meeting`) and those of loads (`load_meeting`).

No thread of Milepost waits inside the store. It looks at a key again and again, so that it holds up neither
another thread nor the training, which may use the same store.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist

from milepost.errors import CommitTimeoutError

__all__ = ["Line", "Start", "StoreGoneError", "background", "ending", "start_at"]

logger = logging.getLogger(__name__)

_KEPT_SAVES = 64
"""How many saves that have ended keep their keys in the store."""


class StoreGoneError(RuntimeError):
    """The store does not answer; never leaves Milepost."""


class Line:
    """A connection to a store that no other part of the process uses, for calls that do not wait.

    To make one is to connect. If the server of a TCP store is dead, that takes the store's whole timeout.

    Args:
        store: A ``torch.distributed`` store.

    Raises:
        StoreGoneError: There is no connection to the server.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        try:
            if hasattr(store, "clone"):
                self._store = store.clone()
            elif isinstance(store, dist.TCPStore):  # type: ignore[attr-defined] # torch before 2.8
                self._store = dist.TCPStore(store.host, store.port, is_master=False)  # type: ignore[attr-defined]
        except dist.DistError as error:
            raise StoreGoneError(str(error).partition("\n")[0]) from error
        except (AttributeError, RuntimeError):
            pass  # a store written in Python may have no clone: it is used itself

    def has(self, *keys: str) -> bool:
        """Whether all of these keys are there."""
        return bool(self._call("check", [*keys]))

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None."""
        value: bytes | None = self._call("get", key) if self.has(key) else None
        return value

    def set(self, key: str, value: str) -> None:
        """Give a key a value."""
        self._call("set", key, value)

    def first(self, key: str, value: str) -> bytes:
        """Give a key a value unless it has one; returns the one that it has."""
        found: bytes = self._call("compare_set", key, "", value)
        return found

    def delete(self, key: str) -> None:
        """Delete a key, where the store can."""
        with suppress(StoreGoneError):
            self._call("delete_key", key)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, name)(*arguments)
        except Exception as error:
            raise StoreGoneError(str(error).splitlines()[0] if str(error) else repr(error)) from error


class Start:
    """One life of a group of ranks, with an id that they agree on in the background.

    Args:
        store: Where they meet. It is not kept alive.
        rank: This rank.
        world_size: How many there are.

    Attributes:
        id: The id; "" until rank 0 has answered. It may still change until `wait` has returned True.
        loads: The number of the last load that this rank took part in; 0 before the first.
        token: Random text by which rank 0 knows this rank until it has the id.
        absent: The ranks that have not asked for the id yet, as far as this rank knows.
        line: To the store. There is none before the store has answered.
        trouble: Why the store cannot be used; "" once it has answered.
        lost: The store was gone before all ranks knew the id.
        shared: Folders that were found to be shared.
        barriers: How many barriers this rank has made at an address from rank 0.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.line: Line
        self.rank, self.world_size = rank, world_size
        self.id = "" if rank else secrets.token_hex(8)
        self.loads = 0
        self.absent: list[int] = []
        self.shared: set[str] = set()
        self.barriers = 0
        self._ended: deque[list[str]] = deque()
        self._store = weakref.ref(store)
        self.token = secrets.token_hex(8)
        self.trouble, self.lost = "it has not answered yet", False
        self._answered, self._over = threading.Event(), threading.Event()
        background(partial(self._run, [store], self._join if rank else self._serve), "milepost-start")

    def store(self) -> Any:
        """The store; None if nobody uses it any more."""
        return self._store()

    def is_at(self, store: Any, rank: int, world_size: int) -> bool:
        """Whether this is the start of that rank there."""
        return store is self._store() and (rank, world_size) == (self.rank, self.world_size)

    def key(self, *parts: object) -> str:
        """A key below the start's id."""
        return "/".join(["milepost", self.id, *map(str, parts)])

    def wait_for_answer(self, timeout_seconds: float) -> bool:
        """Wait until rank 0 has answered (on rank 0: until the store has); False after the timeout.

        Raises:
            StoreGoneError: The store is gone, or has not answered either.
        """
        if self._answered.wait(timeout_seconds) and self.id and not self.trouble:
            return True
        if self.trouble:
            raise StoreGoneError(self.trouble)
        return False

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until all ranks know the id (on rank 0: until the store has answered).

        Returns False after the timeout, and if the store is gone before.
        """
        event = self._over if self.rank else self._answered
        return event.wait(timeout_seconds) and not self.lost

    def tell_address(self, timeout_seconds: float) -> tuple[str, int]:
        """An address at which rank 0 may host a store: each rank's n-th call returns rank 0's n-th.

        Raises:
            CommitTimeoutError: Rank 0 has not called this within the time, or the store is gone.
        """
        self.barriers += 1
        deadline, word = time.monotonic() + timeout_seconds, None
        reason = f"rank 0 has not put one there within {timeout_seconds:g} s"
        try:
            if self.wait(timeout_seconds):
                key = self.key("barrier", self.barriers)
                if self.rank == 0:
                    with socket.create_server(("", 0)) as probe:
                        port = probe.getsockname()[1]
                    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
                    self.line.set(key, json.dumps([host, port]))
                while (word := self.line.get(key)) is None and time.monotonic() < deadline:
                    time.sleep(0.01)
        except StoreGoneError as error:
            reason = str(error)
        if word is None:
            raise CommitTimeoutError(
                f"the process group's store has no address for the barrier: {self.trouble or reason}",
                rank=self.rank,
                phase="barrier",
                hint="make the checkpointer on every rank, or give barrier_args",
            )
        host, port = json.loads(word)
        return host, port

    def retire(self, keys: list[str]) -> None:
        """Delete the keys of a save long over. The others have read them: ranks save one after the other."""
        self._ended.append(keys)
        if len(self._ended) > _KEPT_SAVES:
            for key in self._ended.popleft():
                self.line.delete(key)

    def _hello(self, rank: int) -> str:
        return f"milepost/{self.world_size}/hello/{rank}"

    def _run(self, stores: list[Any], work: Callable[[], bool]) -> None:
        """Connect, then call `work` until it returns True, or nobody uses the store any more."""
        pause = 0.001
        try:
            self.line = Line(stores.pop())  # no reference to the store is left here
            self.line.has("milepost")
            self.trouble = ""
            if self.rank == 0:
                self._answered.set()
            while not work():
                if ending.wait(pause) or self._store() is None:
                    raise StoreGoneError("nobody uses it any more")
                pause = min(pause * 1.5, 0.25)
        except StoreGoneError as error:
            logger.debug("the store at which ranks agree on a start is gone: %s", error)
            self.trouble, self.lost = str(error), True
        self._over.set()
        self._answered.set()

    def _serve(self) -> bool:
        """As rank 0: answer the ranks that have asked, until each has read its answer.

        A token may be a dead rank's, so rank 0 looks at it again until it is read.
        """
        absent = []
        for rank in range(1, self.world_size):
            token = self.line.get(self._hello(rank))
            name = (token or b"").decode()
            if not token or not self.line.has(self.key("joined", name)):
                absent.append(rank)
                if token:
                    self.line.set(f"milepost/answer/{name}", self.id)
        if absent != self.absent:
            self.absent = absent
            self.line.set(self.key("absent"), json.dumps(absent))
        if not absent:
            self.line.set(self.key("go"), "")
        return not absent

    def _join(self) -> bool:
        """As another rank: ask, and read the answer again until all ranks have one.

        The first answer may be that of a rank 0 that is dead by now.
        """
        if self.line.get(self._hello(self.rank)) != self.token.encode():
            self.line.set(self._hello(self.rank), self.token)
        answer = self.line.get(f"milepost/answer/{self.token}")
        if answer is None:
            self.absent = [0]
            return False
        if answer.decode() != self.id:
            self.id, self.loads = answer.decode(), 0
            self._answered.set()
        self.line.set(self.key("joined", self.token), "")
        self.absent = json.loads(self.line.get(self.key("absent")) or b"[]")
        return self.line.has(self.key("go"))


_starts: list[Start] = []
_starts_lock = threading.Lock()
ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _end() -> None:
    """End the threads: none may be inside a store when the interpreter goes."""
    ending.set()
    for thread in [*_threads]:
        thread.join(5)


def background(work: Callable[[], None], name: str) -> threading.Thread:
    """Do some work that uses a store in a thread. The work has to end when `ending` is set."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def _forget_starts() -> None:
    global _starts_lock  # noqa: PLW0603 - locks belong to a process
    _starts_lock = threading.Lock()
    _starts.clear()


# After the checkpointers', which are younger: an interpreter that ends finishes their saves first.
weakref.finalize(ending, _end)
os.register_at_fork(after_in_child=_forget_starts)


def start_at(store: Any, rank: int, world_size: int) -> Start | None:
    """This process's start at a store (None: that of the default process group). Makes one if there is none.

    Returns None if there is no store, or it does not work. A TCP store is not asked, as its server may be
    dead. The start finds that out in the background (see `Start.lost`), so that nobody waits here.
    """
    store = _group_store(rank, world_size) if store is None else store
    if store is None:
        return None
    with _starts_lock:
        _starts[:] = [start for start in _starts if start.store() is not None]
        for start in _starts:
            if start.is_at(store, rank, world_size):
                return start
        if not _is_tcp(store):
            try:
                Line(store).has("milepost")
            except StoreGoneError:
                return None
        _starts.append(Start(store, rank, world_size))
        return _starts[-1]


def _is_tcp(store: Any) -> bool:
    while isinstance(store, dist.PrefixStore):  # type: ignore[attr-defined]
        store = store.underlying_store
    return isinstance(store, dist.TCPStore)  # type: ignore[attr-defined]


def _group_store(rank: int, world_size: int) -> Any:
    """The store of the default process group, if this is that rank of it and its ranks are processes."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size) or "fake" in str(dist.get_backend()):
        return None
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
