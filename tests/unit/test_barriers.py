"""Barriers: the registry, the default group's, and exactly the calls that the store's makes."""

from __future__ import annotations

import multiprocessing
import socket
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from milepost import barriers
from milepost.barriers import (
    BARRIER_REGISTRY,
    Barrier,
    BarrierConfig,
    DistBarrier,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)
from milepost.errors import ClosedError, CommitTimeoutError, ConfigError, MilepostError, UnavailableError

ARGUMENTS = {
    "global_rank": 1,
    "global_world_size": 3,
    "barrier_prefix": "ckpt",
    "timeout_barrier_init_secs": 7,
    "use_checkpoint_barrier_tcpstore_libuv": True,
    "tcpstore_port": 2345,
    "master_address": "host",
    "timeout_secs": 11,
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(barriers, "BARRIER_REGISTRY", dict(BARRIER_REGISTRY))
    return barriers.BARRIER_REGISTRY


def test_the_built_in_barriers_are_registered():
    """`dist_barrier` and `tcp_store` are known by their types."""
    assert BARRIER_REGISTRY["dist_barrier"] is DistBarrier
    assert BARRIER_REGISTRY["tcp_store"] is TCPStoreBarrier


def test_a_barrier_of_ones_own_is_made_from_its_type_and_arguments(registry):
    """A registered class is made by create_barrier_from_config with the arguments of the config."""

    @register_barrier
    class Mine(Barrier):
        barrier_type = "mine"

        def __init__(self, **kwargs):
            self.arguments = kwargs

        def execute_barrier(self):
            pass

    assert registry["mine"] is Mine
    made = create_barrier_from_config(BarrierConfig("mine", {"a": 1}))
    assert type(made) is Mine
    assert made.arguments == {"a": 1}


def test_a_class_without_a_type_is_left_alone(registry):
    """register_barrier returns a class that has no barrier_type unchanged, and does not register it."""
    before = dict(registry)

    class Nameless:
        pass

    assert register_barrier(Nameless) is Nameless
    assert registry == before


def test_no_type_is_no_barrier():
    """A config without a type makes no barrier."""
    assert create_barrier_from_config(BarrierConfig()) is None


def refused(kind, arguments):
    """The ConfigError for a barrier that cannot be made; it is a ValueError and names a way out."""
    with pytest.raises(ConfigError) as caught:
        create_barrier_from_config(BarrierConfig(kind, arguments))
    assert isinstance(caught.value, ValueError)
    assert caught.value.hint
    return caught.value


def test_an_unknown_type_lists_the_known_ones():
    """An unknown type is a ConfigError that names it and lists those there are."""
    error = refused("nope", {})
    assert str(error).startswith("Unknown barrier type: nope")
    assert "dist_barrier, tcp_store" in str(error)


def test_missing_arguments_are_named():
    """A barrier without its arguments is a ConfigError that names them and the way out."""
    error = refused("tcp_store", {"global_rank": 0})
    assert "'master_address'" in str(error)
    assert "barrier_args" in error.hint
    assert isinstance(error.__cause__, TypeError)


def test_whatever_the_class_of_a_barrier_raises_is_the_cause(registry):
    """What a barrier's class raises is the cause of a ConfigError; Milepost's errors come out as they are."""
    for raised in (KeyError("MASTER_PORT"), ClosedError("closed")):

        @register_barrier
        class Broken(Barrier):
            barrier_type = "broken"

            def __init__(self, raised=raised):
                raise raised

            def execute_barrier(self):
                pass

        with pytest.raises(MilepostError) as caught:
            create_barrier_from_config(BarrierConfig("broken"))
        assert raised in (caught.value, caught.value.__cause__)


def test_a_port_that_is_taken_is_named():
    """Where another program listens at the port, rank 0 gets a ConfigError that names it and the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"global_rank": 0, "master_address": "127.0.0.1", "tcpstore_port": port}
        with multiprocessing.get_context("fork").Pool(1) as another:  # torch leaks descriptors in this case
            error = another.apply(refused, ("tcp_store", {**ARGUMENTS, **place}))
    assert f"127.0.0.1:{port} cannot be served" in str(error)
    assert "tcpstore_port" in error.hint


def test_a_store_that_nobody_serves_is_named(calls):
    """Where no rank 0 serves the store, another rank gets a ConfigError that names the store and rank 0."""
    calls.TCPStore.side_effect = dist.DistNetworkError("timed out\nat frame 0")
    error = refused("tcp_store", ARGUMENTS)
    assert "host:2345 cannot be reached: timed out (rank 1" in str(error)
    assert "rank 0" in error.hint


def test_barrier_is_abstract():
    """A barrier must define both its construction and its execution."""
    with pytest.raises(TypeError, match="abstract"):
        Barrier()


def test_the_groups_barrier_needs_a_group():
    """DistBarrier without a default process group is an AssertionError that says what to do."""
    with pytest.raises(UnavailableError, match="init_process_group") as caught:
        create_barrier_from_config(BarrierConfig("dist_barrier"))
    assert isinstance(caught.value, AssertionError)


def test_the_groups_barrier_is_the_default_groups(monkeypatch):
    """DistBarrier calls dist.barrier of the default group, once each time."""
    called = mock.Mock()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", called)
    barrier = DistBarrier()
    barrier.execute_barrier()
    barrier.execute_barrier()
    assert called.mock_calls == [mock.call(), mock.call()]


@pytest.fixture
def calls(monkeypatch):
    """Both of the functions that the store's barrier looks up when called, recorded in order."""
    recorder = mock.Mock()
    monkeypatch.setattr(dist, "TCPStore", recorder.TCPStore)
    monkeypatch.setattr("torch.distributed.elastic.utils.store.barrier", recorder.barrier)
    return recorder


def test_the_stores_barrier_makes_exactly_its_calls(calls):
    """TCPStoreBarrier makes one store; it sets its number, waits for all, then calls torch's barrier."""
    barrier = TCPStoreBarrier(**ARGUMENTS)
    store = calls.TCPStore.return_value
    barrier.execute_barrier()
    barrier.execute_barrier()
    expected = [mock.call.TCPStore("host", 2345, world_size=3, timeout=timedelta(seconds=7), is_master=False)]
    for sequence in (0, 1):
        prefix = f"ckpt{sequence}"
        keys = [f"{prefix}/rank{rank}" for rank in range(3)]
        expected += [
            mock.call.TCPStore().set("rank1", str(sequence)),
            mock.call.TCPStore().add(keys[1], 1),
            mock.call.TCPStore().wait(keys, timedelta(seconds=11)),
            mock.call.barrier(store=store, world_size=3, key_prefix=prefix),
        ]
    assert calls.mock_calls == expected


def test_rank_0_serves_the_store_and_ports_may_be_text(calls):
    """Rank 0 is the store's master; a port given as text is taken."""
    TCPStoreBarrier(**{**ARGUMENTS, "global_rank": 0, "tcpstore_port": "99"})
    assert calls.TCPStore.call_args == mock.call(
        "host", 99, world_size=3, timeout=timedelta(seconds=7), is_master=True
    )


def test_a_timeout_names_the_missing_ranks(calls):
    """When the time is over, the error names the ranks that are missing; torch's barrier is not called."""
    barrier = TCPStoreBarrier(**ARGUMENTS)
    store = calls.TCPStore.return_value
    store.wait.side_effect = dist.DistStoreError("timeout")
    store.check.side_effect = lambda keys: keys[0].endswith("rank1")
    with pytest.raises(
        CommitTimeoutError, match=r"ranks \[0, 2\] did not reach the barrier within 11"
    ) as caught:
        barrier.execute_barrier()
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.rank, caught.value.phase) == (1, "barrier")
    calls.barrier.assert_not_called()


def test_ranks_that_arrive_at_the_last_moment_count(calls):
    """When the wait fails but all ranks turn out to be there, the barrier goes on."""
    barrier = TCPStoreBarrier(**ARGUMENTS)
    calls.TCPStore.return_value.wait.side_effect = RuntimeError("timeout")
    calls.TCPStore.return_value.check.return_value = True
    barrier.execute_barrier()
    calls.barrier.assert_called_once()
