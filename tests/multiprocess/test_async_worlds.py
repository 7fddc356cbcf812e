"""Background saves in the places where programs run: -c, scripts, a REPL, torchrun, fork, spawn, ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.background import error_of, make, result, state_of, step_at
from support.processes import free_port, in_child
from support.saves import load

from milepost.config import BarrierConfig
from milepost.types import RankInfo

SAVE = """
import torch, milepost
checkpointer = milepost.make_async_checkpointer()
staged, written = checkpointer.save("c", {"w": torch.full((10,), 3.0), "step": 3}, step=3)
written.result(60)
checkpointer.close()
"""

HOOKED = """
import os, sys
import torch, milepost
from milepost.checkpoint_writer import WriterHook

class Hook(WriterHook):
    def pre_commit(self, path, **kwargs):
        open("pre", "w").write(str(os.getpid()))
    def post_commit(self, path, **kwargs):
        open("post", "w").write(kwargs["info"].text)

class Info:
    text = "from main"

def train():
    checkpointer = milepost.make_async_checkpointer(commit_hook=Hook())
    checkpointer.save("c", {"w": torch.ones(10), "step": 1}, info=Info())[1].result(60)
    checkpointer.close()
    assert open("pre").read() != str(os.getpid())
"""


def run(tmp_path, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False, **options,
    )  # fmt: skip


def test_from_the_command_line(tmp_path):
    """`python -c` saves in the background."""
    done = run(tmp_path, "-c", SAVE)
    assert (done.returncode, done.stderr) == (0, "")
    assert step_at(tmp_path / "c") == 3


def test_a_script_without_a_main_guard(tmp_path):
    """A script saves without `if __name__ == "__main__"`: it is not run again by the writer process."""
    (tmp_path / "train.py").write_text(SAVE + 'open("runs", "a").write("x")\n')
    done = run(tmp_path, "train.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert step_at(tmp_path / "c") == 3
    assert (tmp_path / "runs").read_text() == "x"


def test_a_script_beside_a_module_named_types(tmp_path):
    """A folder of the library or of the user's that holds a module `types` shadows nothing."""
    package = Path(__file__).resolve().parents[2] / "src" / "milepost"
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "types.py").write_text((package / "types.py").read_text())
    done = run(tmp_path / "inner", "-P", "-c", SAVE)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_repl(tmp_path):
    """An interactive interpreter, fed through a pipe, saves in the background."""
    done = run(tmp_path, "-i", "-", input=SAVE + "print('the end')\n")
    assert "Error" not in done.stderr
    assert "the end" in done.stdout
    assert step_at(tmp_path / "c") == 3


def test_functions_of_a_script_with_a_guard(tmp_path):
    """A hook and arguments of classes defined in the script itself are found in the writer process."""
    (tmp_path / "train.py").write_text(HOOKED + '\nif __name__ == "__main__":\n    train()\n')
    done = run(tmp_path, "train.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "post").read_text() == "from main"


def test_functions_of_no_file(tmp_path):
    """Where there is no main file, a hook of __main__ is a ConfigError at construction."""
    code = HOOKED + textwrap.dedent("""
        try:
            milepost.make_async_checkpointer(commit_hook=Hook())
        except milepost.ConfigError as error:
            print(error)
    """)
    done = run(tmp_path, "-c", code)
    assert "put it into a module" in done.stdout
    assert done.stderr == ""


def test_users_of_multiprocessing(tmp_path):
    """Workers forked and spawned while a save is under way work, and the save commits."""
    (tmp_path / "work.py").write_text("def double(x):\n    return 2 * x\n")
    script = textwrap.dedent("""
        import multiprocessing, torch, milepost, work

        if __name__ == "__main__":
            checkpointer = milepost.make_async_checkpointer()
            for method in ("fork", "spawn"):
                state = {"w": torch.full((3_000_000,), 1.0), "step": 1}
                written = checkpointer.save(method, state)[1]
                with multiprocessing.get_context(method).Pool(1) as pool:
                    assert pool.map(work.double, [1, 2]) == [2, 4]
                written.result(60)
            checkpointer.close()
    """)
    (tmp_path / "train.py").write_text(script)
    done = run(tmp_path, "train.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert [step_at(tmp_path / method) for method in ("fork", "spawn")] == [1, 1]


WORKER = """
import os, signal, sys
import torch, torch.distributed as dist, milepost

dist.init_process_group("gloo")
rank = dist.get_rank()
checkpointer = milepost.make_async_checkpointer()
checkpointer.save("first", {"w": torch.full((10,), 1.0), "step": 1}, step=1)[1].result(60)
dist.barrier()
checkpointer.save("second", {"w": torch.full((1_000_000,), 2.0), "step": 2}, step=2)
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
import time
time.sleep(1000)
"""


def test_under_torchrun_with_a_worker_that_fails(tmp_path):
    """One worker is killed, torchrun ends the other: what both had staged commits all the same."""
    from support.processes import wait_until

    (tmp_path / "train.py").write_text(WORKER)
    launcher = [
        os.path.join(os.path.dirname(sys.executable), "torchrun"),
        "--standalone",
        "--nproc-per-node=2",
    ]
    done = subprocess.run(
        [*launcher, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"exitcode  : {-signal.SIGKILL}" in done.stderr, done.stderr[-2000:]
    manifest = tmp_path / "second" / "manifest.json"
    wait_until(manifest.exists, "the commit of the second")
    wait_until(lambda: sorted(os.listdir(tmp_path)) == ["first", "second", "train.py"], "the end")
    assert [step_at(tmp_path / name) for name in ("first", "second")] == [1, 2]


@pytest.mark.parametrize("rounds", [3])
def test_two_ranks_with_a_barrier(tmp_path, rounds):
    """Ranks that meet at a tcp_store barrier commit together: each rank's future is done after the commit."""
    port = free_port()

    def rank_of(rank):
        arguments = {
            "global_rank": rank, "global_world_size": 2, "barrier_prefix": "b", "timeout_secs": 60,
            "timeout_barrier_init_secs": 60, "use_checkpoint_barrier_tcpstore_libuv": False,
            "tcpstore_port": port, "master_address": "localhost",
        }  # fmt: skip
        checkpointer = make(rank_info=RankInfo(rank, 2), barrier=BarrierConfig("tcp_store", arguments))
        for step in range(rounds):
            written = checkpointer.save(str(tmp_path / "c"), state_of(step), step=step)[1]
            assert error_of(written) is None
            assert (tmp_path / "c" / "manifest.json").exists()
        checkpointer.close()

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda rank: in_child(lambda: rank_of(rank)), range(2))] == [0, 0]
    assert step_at(tmp_path / "c") == rounds - 1


def test_two_ranks_without_a_barrier(tmp_path):
    """Without a barrier each rank does its part; the last one commits."""
    checkpointers = [make(rank_info=RankInfo(rank, 2)) for rank in range(2)]
    for checkpointer in checkpointers:
        assert not (tmp_path / "c").exists()
        result(checkpointer.save(str(tmp_path / "c"), state_of(4))[1])
    assert load(tmp_path / "c")["step"] == 4
    for checkpointer in checkpointers:
        checkpointer.close()
