"""The checkpoint process, as users of the contract know it: its start, its requests, its end."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import background
import pytest
import torch
from background import ONE, PATIENCE, error_of, is_running, recording_writer, result, state_of, wait_until
from scenarios import in_child
from states import assert_same, load

from milepost.checkpoint_process import (
    CheckpointProcess,
    LeanWriter,
    RequestType,
    WorkerRequest,
    WorkerResponse,
)
from milepost.config import CheckpointProcessConfig
from milepost.errors import ClosedError, ConfigError, LostWriterError, StateError
from milepost.state.encode import StateEncoder
from milepost.types import RankInfo


def end(process):
    try:
        process.close()
    except Exception:
        process.close()


@pytest.fixture
def start():
    """Starts checkpoint processes, and ends them."""
    made = []

    def start(init=None, arguments=(), writer=recording_writer, config=None, **options):
        if options.get("lean"):
            process = CheckpointProcess(ONE, config or CheckpointProcessConfig(), **options)
        else:
            process = CheckpointProcess(
                ONE, config or CheckpointProcessConfig(), init, arguments, writer, **options
            )
        made.append(process)
        return process

    yield start
    for process in made:
        end(process)


@pytest.fixture
def lean(start):
    process = start(lean=LeanWriter())
    process.process_creation_future.result(PATIENCE)
    return process


def test_the_lean_process_loads_no_torch_and_no_numpy(lean):
    """Nothing of torch or numpy is mapped in a lean checkpoint process, and its private memory is small."""
    maps = Path(f"/proc/{lean.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "numpy" not in maps
    rollup = Path(f"/proc/{lean.process.pid}/smaps_rollup").read_text()
    private = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous"))
    assert private < 48 * 1024


def test_it_is_a_direct_child_in_a_session_of_its_own(lean):
    """The process is the trainer's own child, leads its own session, and holds on to no terminal or pipe."""
    pid = lean.process.processes[0].pid
    assert int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert "milepost-writer-log" in os.readlink(f"/proc/{pid}/fd/1")
    assert "milepost-writer-log" in os.readlink(f"/proc/{pid}/fd/2")


def test_signals_to_the_whole_job_do_not_end_it(start, tmp_path):
    """SIGINT, SIGTERM and SIGHUP are ignored, from the first moment of its life on."""
    process = start(lean=LeanWriter())
    for _ in range(20):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.process.pid, number)
    process.process_creation_future.result(PATIENCE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.process.pid, number)
    result(process.write(state_of(1), str(tmp_path / "c")))
    blocked = Path(f"/proc/{process.process.pid}/status").read_text()
    assert "SigBlk:\t0000000000000000" in blocked


def test_the_trainers_signals_are_as_before(start):
    """Starting a process leaves the trainer's signal mask and handlers alone."""
    mask, handler = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGTERM)
    start(lean=LeanWriter())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_trainers_environment_is_left_alone(start, monkeypatch):
    """The variables that the child is started with are set for the child alone."""
    before = dict(os.environ)
    start(lean=LeanWriter()).process_creation_future.result(PATIENCE)
    assert dict(os.environ) == before


def test_it_gives_way_when_told_to(start):
    """`nice` and `idle_io` lower its priority, not the trainer's."""
    process = start(lean=LeanWriter(), config=CheckpointProcessConfig(nice=7, idle_io=True))
    process.process_creation_future.result(PATIENCE)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process.process.pid) == min(own + 7, 19)


def test_what_stays_reachable(lean):
    """`process.processes[0].is_alive()`, `process.join(timeout)` and `_parent_end` are there."""
    handle = lean.process
    assert handle.processes[0].is_alive()
    assert handle.exitcode is None
    assert handle.join(0.01) is False
    assert lean._parent_end.fileno() > 2
    lean.close()
    assert not handle.is_alive()
    assert handle.join(0) is True
    assert handle.exitcode == 0


def test_the_messages_of_the_original_have_their_names():
    """RequestType, WorkerRequest and WorkerResponse are as users import them."""
    assert {item.value for item in RequestType} == {"ping", "write_checkpoint", "exit"}
    assert WorkerRequest(RequestType.PING, {}).payload == {}
    response = WorkerResponse(RequestType.PING, success=True)
    assert (response.error_msg, response.payload) == (None, None)


# -- a bad start -----------------------------------------------------------------------------------


def test_an_init_function_that_raises(start, tmp_path):
    """The constructor does not raise; the creation future and a write do, with the traceback."""
    process = start(background.fail_to_start, ("gpu", 3))
    with pytest.raises(RuntimeError, match=r"LookupError: no such device: \('gpu', 3\)") as caught:
        process.process_creation_future.result(PATIENCE)
    assert "background.py" in str(caught.value)
    error = error_of(process.write(state_of(1), str(tmp_path / "c")))
    assert isinstance(error, LostWriterError)
    assert "no such device" in "".join(error.__notes__)


def test_a_writer_function_that_raises(start):
    """The function that makes the writer may fail as well."""
    process = start(writer=background.fail_to_start, checkpoint_writer_init_args={})
    with pytest.raises(RuntimeError, match="TypeError"):
        process.process_creation_future.result(PATIENCE)


def test_a_start_that_takes_too_long(start):
    """After the time for the start, the creation future is a TimeoutError, and the child is gone."""
    process = start(background.hang, config=CheckpointProcessConfig(subprocess_init_timeout_secs=1))
    with pytest.raises(TimeoutError, match="Timed out"):
        process.process_creation_future.result(PATIENCE)
    wait_until(lambda: not process.process.is_alive(), "the end of the child")


def test_a_child_that_ends_at_once_is_quoted(start):
    """What a child wrote before it ended is in the error."""
    with pytest.raises(RuntimeError, match="some library says: giving up"):
        start(background.noisy_exit).process_creation_future.result(PATIENCE)


def test_an_interpreter_that_cannot_be_started(start, monkeypatch, tmp_path):
    """If the process cannot be started at all, the creation future says so, and writes fail."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    process = start(lean=LeanWriter())
    with pytest.raises(RuntimeError, match="could not be started"):
        process.process_creation_future.result(PATIENCE)
    assert not process.process.is_alive()
    assert process.process.pid is None
    assert isinstance(error_of(process.write(state_of(1), str(tmp_path / "c"))), LostWriterError)


@pytest.mark.parametrize("what", [lambda: None, functools.partial(lambda: None)])
def test_functions_that_cannot_be_handed_over(what):
    """A lambda is a ConfigError at construction that says what to do."""
    with pytest.raises(ConfigError, match="top level of a module"):
        CheckpointProcess(ONE, CheckpointProcessConfig(), what, (), recording_writer, {})


# -- writing ---------------------------------------------------------------------------------------


def test_a_dict_and_a_future_of_one_are_written(lean, tmp_path):
    """`write` takes a plain state dict, which is copied before it returns, or a future of one."""
    state = state_of(1)
    first = lean.write(state, str(tmp_path / "a"), step=1)
    state["w"].fill_(9)
    later = Future()
    second = lean.write(later, str(tmp_path / "b"))
    assert isinstance(first, Future)
    assert result(first) is None
    assert not second.done()
    later.set_result(state_of(2))
    assert result(second) is None
    assert_same(load(tmp_path / "a"), state_of(1))
    assert_same(load(tmp_path / "b"), state_of(2))


def test_a_future_that_fails_fails_the_write_alone(lean, tmp_path):
    """The write carries the error of the future that was to bring its state; the next write works."""
    later = Future()
    written = lean.write(later, str(tmp_path / "c"))
    later.set_exception(LookupError("no state"))
    assert isinstance(error_of(written), LookupError)
    result(lean.write(state_of(3), str(tmp_path / "c")))


def test_accepted_writes_cannot_be_cancelled(lean, tmp_path):
    """`cancel` on the future of a write says no: what was accepted is carried out."""
    later = Future()
    written = lean.write(later, str(tmp_path / "c"))
    assert not written.cancel()
    assert not lean.process_creation_future.cancel()
    later.set_result(state_of(1))
    result(written)


def test_a_relative_path_means_the_folder_at_the_time_of_the_call(lean, tmp_path, monkeypatch):
    """Changing the working directory after `write` changes nothing."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    written = lean.write(state_of(4), "here")
    monkeypatch.chdir(tmp_path / "elsewhere")
    result(written)
    assert_same(load(tmp_path / "here"), state_of(4))


def test_names_that_are_no_text(lean, tmp_path):
    """A path with bytes that are no UTF-8 is saved to and loaded from as any other."""
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/st\xffp")
    result(lean.write(state_of(4), path))
    assert_same(load(path), state_of(4))


def test_a_writer_of_the_users_gets_real_tensors_by_keyword(start, tmp_path):
    """A CheckpointWriter subclass made by the user's function gets path, state and keywords in the child."""
    process = start(checkpoint_writer_init_args={"more": 1})
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3).T}, "n": 5, "tags": ["a", {"b"}]}
    result(process.write(state, str(tmp_path / "c"), step=7, note={"x": 1}))
    found = torch.load(tmp_path / "c" / "own.pt", weights_only=False)
    assert_same(found["state"], state)
    assert found["kwargs"] == {"step": 7, "note": {"x": 1}}
    assert found["pid"] == process.process.pid


def test_a_writer_of_the_users_gets_any_path(start, tmp_path, monkeypatch):
    """What Milepost's own writer refuses as a path is handed to a writer of the user's as it is."""
    monkeypatch.chdir(tmp_path)
    process = start()
    for path in ("s3://bucket/c", "~/c"):
        result(process.write({"w": torch.ones(3)}, path))
        assert (tmp_path / path / "own.pt").exists()


def test_a_writer_of_the_users_gets_no_part_for_a_whole(tmp_path):
    """A replica of which this rank saves a part is refused by key: the writer would take it for all of it."""
    process = CheckpointProcess(
        RankInfo(0, 2),
        *(CheckpointProcessConfig(), None, (), recording_writer, {}),
        encoder=lambda: StateEncoder(RankInfo(0, 2), ["m.*"]),
    )
    state = {"n": torch.ones(3), "m": {"w": torch.ones(300, 300)}}
    with pytest.raises(StateError, match=r"a writer of your own .*m\.w") as caught:
        process.write(state, str(tmp_path / "c"))
    assert "checkpoint_writer_init_fn" in caught.value.hint
    result(process.write({"n": torch.ones(3)}, str(tmp_path / "d")))
    end(process)


def test_a_writer_that_returns_a_future_is_waited_for(start, tmp_path):
    """If a writer's `write` returns a future, its failure is the write's."""
    process = start(writer=background.future_writer)
    error = error_of(process.write(state_of(1), str(tmp_path / "c")))
    assert isinstance(error, OSError)
    assert error.errno == 28


def test_the_writer_gets_the_rank(tmp_path):
    """`rank_info` is added to the writer's arguments when it is not among them."""
    process = CheckpointProcess(
        RankInfo(3, 5), CheckpointProcessConfig(), None, (), background.fail_to_start_with_rank, {}
    )
    with pytest.raises(RuntimeError, match="rank 3 of 5"):
        process.process_creation_future.result(PATIENCE)
    end(process)


SHARED = ["file_descriptor", "file_system"]


@pytest.fixture
def strategy(request):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield request.param
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.parametrize("strategy", SHARED, indirect=True)
def test_shared_tensors_stay_the_same_memory(start, tmp_path, strategy):
    """A writer changes tensors in shared memory for the trainer too, and others for itself alone.

    All are shared memory there. A part of a storage is still the same part of the same storage.
    """
    if strategy == "file_system":  # torch keeps a process and its line for it
        assert in_child(lambda: share(start, tmp_path)) == 0
    else:
        share(start, tmp_path)


def share(start, tmp_path):
    base = torch.arange(100.0).share_memory_()
    state = {
        "whole": torch.zeros(5).share_memory_(), "plain": torch.zeros(5),
        "part": base[10:20], "other part": base[50:90:2], "empty": torch.zeros(0).share_memory_(),
    }  # fmt: skip
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    process = start(writer=background.adding_writer)
    result(process.write(state, str(tmp_path / "facts")))
    facts = torch.load(tmp_path / "facts", weights_only=False)
    assert state["whole"].tolist() == [1.0] * 5
    assert state["plain"].tolist() == [0.0] * 5
    expected = torch.arange(100.0)
    expected[10:20] += 1
    expected[50:90:2] += 1
    assert torch.equal(base, expected)
    assert torch.equal(facts["part"][0], torch.arange(10.0, 20.0))
    assert torch.equal(facts["other part"][0], torch.arange(50.0, 90.0, 2))
    for name, tensor in state.items():
        _, is_shared, (_, size, offset) = facts[name]
        storage = tensor.untyped_storage()
        assert (is_shared, size, offset) == (True, storage.nbytes(), tensor.storage_offset()), name
    assert facts["part"][2][0] == facts["other part"][2][0]
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses
    assert not state["plain"].is_shared()
    assert state["whole"].is_shared()


def test_hundreds_of_shared_tensors(start, tmp_path):
    """More shared tensors than a message can carry descriptors are passed all the same."""
    state = {str(number): torch.zeros(2).share_memory_() for number in range(200)}
    result(start(writer=background.adding_writer).write(state, str(tmp_path / "facts")))
    assert all(tensor.tolist() == [1.0, 1.0] for tensor in state.values())


def test_every_tensor_of_a_writer_is_in_shared_memory(start, tmp_path):
    """Whatever a tensor was, `is_shared()` is true in the writer; the trainer's own stays as it was."""
    state = {
        "plain": torch.ones(3), "empty": torch.zeros(0), "large": torch.ones(1 << 20),
        "view": torch.arange(12.0)[2:4], "turned": torch.ones(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }  # fmt: skip
    result(start(writer=background.adding_writer).write(state, str(tmp_path / "facts")))
    facts = torch.load(tmp_path / "facts", weights_only=False)
    assert [name for name, (_, is_shared, _) in facts.items() if not is_shared] == []
    assert [name for name, tensor in state.items() if tensor.is_shared()] == []
    assert all(torch.equal(value, state[name]) for name, (value, _, _) in facts.items())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # as what torch.load makes of storages
def test_the_memory_of_tensors_can_be_passed_on(start, tmp_path):
    """What reaches a writer can be pickled as a storage, copied, and sent through a queue, as any tensor."""
    process = start(writer=background.passing_writer)
    base = torch.arange(10.0).share_memory_()
    result(process.write({"plain": torch.arange(5.0), "part": base[2:4]}, str(tmp_path)))
    copied, sent, copy_is_shared = torch.load(tmp_path / "tensors")
    plain, part = torch.load(tmp_path / "storages")
    assert torch.equal(torch.frombuffer(bytearray(plain.tolist()), dtype=torch.float32), torch.arange(5.0))
    assert part.nbytes() == 40
    assert copied.tolist() == sent.tolist() == [0, 1, 2, 3, 4]
    assert not copy_is_shared


ARGUMENTS = """
import sys
name = sys.argv[1]  # a script that cannot be imported without its arguments

def begin(folder):
    open(f"{folder}/seen", "w").write(repr((name, sys.argv)))
"""


def test_the_users_functions_see_the_trainers_arguments(start, tmp_path, monkeypatch):
    """The child of a user's own init function sees the trainer's sys.argv, also while it imports."""
    (tmp_path / "reads_arguments.py").write_text(ARGUMENTS)
    monkeypatch.setattr(sys, "argv", ["train.py", "run-7", "--lr=\udcff"])
    monkeypatch.syspath_prepend(str(tmp_path))
    import reads_arguments

    process = start(init=reads_arguments.begin, arguments=(str(tmp_path),))
    process.process_creation_future.result(PATIENCE)
    assert (tmp_path / "seen").read_text() == repr(("run-7", sys.argv))


def test_our_own_writer_copies_shared_tensors(lean, tmp_path):
    """What our writer writes is of the time of the call, for tensors in shared memory too."""
    state = {"w": torch.zeros(5).share_memory_()}
    later = lean.write(state, str(tmp_path / "c"))
    state["w"].fill_(9)
    result(later)
    assert load(tmp_path / "c")["w"].sum() == 0


# -- failures and ends -----------------------------------------------------------------------------


def test_a_failed_write_does_not_end_the_service(lean, tmp_path):
    """After a write that failed the same child carries out the next one."""
    pid = lean.process.pid
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    with pytest.raises(OSError, match="taken"):
        lean.write(state_of(1), str(tmp_path / "taken"))
    result(lean.write(state_of(1), str(tmp_path / "c")))
    assert lean.process.pid == pid


def test_a_failure_that_nobody_looked_at_is_raised_once(start, tmp_path):
    """A failed write is raised by the next write, which does nothing; calling again writes."""
    process = start(writer=background.future_writer)
    written = process.write(state_of(1), str(tmp_path / "c"))
    wait_until(written.done)
    with pytest.raises(OSError, match="No space left"):
        process.write(state_of(2), str(tmp_path / "c"))
    seen = process.write(state_of(2), str(tmp_path / "c"))
    assert error_of(seen) is not None
    unseen = process.write(state_of(2), str(tmp_path / "c"))
    wait_until(unseen.done)
    with pytest.raises(OSError, match="No space left"):
        process.close()
    process.close()


def test_a_lost_child_fails_its_writes_and_is_replaced(lean, tmp_path):
    """A killed child is a RuntimeError "Child process terminated unexpectedly"; the next write works."""
    os.kill(lean.process.pid, signal.SIGSTOP)
    pid, written = lean.process.pid, lean.write(state_of(1), str(tmp_path / "c"))
    os.kill(pid, signal.SIGKILL)
    error = error_of(written)
    assert isinstance(error, RuntimeError)
    assert "Child process terminated unexpectedly" in str(error)
    assert "-9" in str(error)
    result(lean.write(state_of(2), str(tmp_path / "c")))
    assert lean.process.pid != pid


def test_a_lost_child_is_seen_though_its_own_child_holds_the_line(start, tmp_path):
    """The end of the child is not hidden by a process that it has forked and that holds its socket."""
    file = tmp_path / "pid"
    process = start(background.leave_a_process_behind, (str(file),))
    process.process_creation_future.result(PATIENCE)
    os.kill(process.process.pid, signal.SIGSTOP)
    written = process.write(state_of(1), str(tmp_path / "c"))
    os.kill(process.process.pid, signal.SIGKILL)
    assert isinstance(error_of(written), LostWriterError)
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_the_log_of_a_lost_child_is_in_the_error(start, tmp_path):
    """What the child wrote last is a note of the error."""
    process = start(writer=background.shouting_writer)
    error = error_of(process.write(state_of(1), str(tmp_path / "c")))
    assert isinstance(error, LostWriterError)
    assert "the writer shouts" in "".join(error.__notes__)


def test_close_finishes_what_was_accepted(lean, tmp_path):
    """`close` returns when every accepted write is done and the child is gone; later calls are refused."""
    pid = lean.process.pid
    futures = [lean.write(state_of(n), str(tmp_path / f"c{n}")) for n in range(5)]
    lean.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not is_running(pid)
    with pytest.raises(ClosedError):
        lean.write(state_of(1), str(tmp_path / "c"))
    lean.close()


def test_close_waits_for_a_state_that_is_still_to_come(lean, tmp_path):
    """A write whose state is a future is accepted: `close` waits for it, and it is written."""
    later = Future()
    written = lean.write(later, str(tmp_path / "c"))
    threading.Timer(0.1, later.set_result, (state_of(5),)).start()
    lean.close()
    assert written.exception(0) is None
    assert_same(load(tmp_path / "c"), state_of(5))


def test_close_does_not_wait_for_a_child_that_stands_still(start, tmp_path):
    """A child without a sign of life for the shutdown timeout is ended; its failed write is raised."""
    config = CheckpointProcessConfig(subprocess_shutdown_timeout_secs=1)
    process = start(lean=LeanWriter(), config=config)
    process.process_creation_future.result(PATIENCE)
    pid = process.process.pid
    os.kill(pid, signal.SIGSTOP)
    process.write(state_of(1), str(tmp_path / "c"))
    began = time.monotonic()
    with pytest.raises(LostWriterError):
        process.close()
    assert time.monotonic() - began < 20
    assert not is_running(pid)


def test_a_state_that_never_comes_does_not_hold_up_close(start, tmp_path):
    """`close` gives up a future that is not done within the shutdown timeout."""
    process = start(lean=LeanWriter(), config=CheckpointProcessConfig(subprocess_shutdown_timeout_secs=1))
    later = Future()
    written = process.write(later, str(tmp_path / "c"))
    process.close()
    assert not written.done()
    later.set_result(state_of(1))
    assert isinstance(error_of(written), ClosedError)
    assert not process.process.is_alive()


def test_a_child_that_shows_no_sign_of_life_is_given_up(start, tmp_path, monkeypatch):
    """A lean writer that stands still for longer than it may wait for other ranks is ended and lost."""
    monkeypatch.setattr("milepost.checkpoint_process._STALL_SECONDS", -1.0)
    config = background.CheckpointWriterConfig(write_barrier_timeout_secs=1)
    process = start(lean=LeanWriter(config))
    process.process_creation_future.result(PATIENCE)
    os.kill(process.process.pid, signal.SIGSTOP)
    assert isinstance(error_of(process.write(state_of(1), str(tmp_path / "c"))), LostWriterError)


def test_a_forked_process_leaves_it_alone(lean, tmp_path):
    """In a forked child `close` does nothing and `write` is refused; the parent's process goes on."""

    def use_it():
        lean.close()
        with pytest.raises(ClosedError, match="forked"):
            lean.write(state_of(1), str(tmp_path / "c"))

    assert in_child(use_it) == 0
    result(lean.write(state_of(2), str(tmp_path / "c")))


def test_it_starts_about_as_fast_as_an_interpreter():
    """A lean process needs for its start a small multiple of what a bare interpreter needs."""
    bare, ours = [], []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        process = CheckpointProcess(ONE, CheckpointProcessConfig(), lean=LeanWriter())
        process.process_creation_future.result(PATIENCE)
        ours.append(time.perf_counter() - began)
        process.close()
    assert min(ours) < 10 * min(bare) + 0.5  # the benchmark holds it to 4


@pytest.mark.parametrize("executable", ["", None])
def test_a_python_without_an_interpreter_is_told_at_construction(executable, monkeypatch):
    """Where sys.executable is empty, as in programs that embed Python, the ConfigError names the ways out."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(ConfigError, match=r"sys\.executable does not name a Python interpreter") as caught:
        CheckpointProcess(ONE, CheckpointProcessConfig(), lean=LeanWriter())
    assert "make_sync_checkpointer" in caught.value.hint
