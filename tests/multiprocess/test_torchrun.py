"""Real torchrun: ranks that their agents start again go on saving, with nothing configured."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import pytest
from support.processes import free_port
from support.saves import manifest_of

PROGRAM = textwrap.dedent(
    """
    import logging, os, signal, sys, time
    import torch, torch.distributed as dist
    from milepost import CheckpointerConfig, make_async_checkpointer, make_sync_checkpointer
    from milepost.ranks.start import Start

    logging.basicConfig(level=logging.INFO)
    kind, run, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    # torch's gloo takes the addresses that a former life has left in the agent's store for those of this one,
    # and mostly fails. Here all ranks remove them first, so that each life gets as far as saving.
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True"
    store = dist.TCPStore(*address, is_master=hosts, multi_tenant=True)
    store.delete_key(f"default_pg/0//cpu//0/{rank}")
    assert Start(store, rank, world)._over.wait(60)  # rank 0 too waits until all have removed them
    dist.init_process_group("gloo")
    make = make_sync_checkpointer if kind == "sync" else make_async_checkpointer
    config = CheckpointerConfig()
    config.writer_config.write_barrier_timeout_secs = 20  # so long a killed rank's writer process lives on
    with make(config) as checkpointer:
        latest = os.path.join(run, "latest")
        first = checkpointer.load(latest)["step"] + 1 if os.path.exists(latest) else 0
        print(f"BEGIN rank {rank} of {world} at {first}", flush=True)
        for step in range(first, steps):
            futures = checkpointer.save(latest, {"rank": rank, "step": step}, step=step)
            if futures:
                futures[1].result()
            if os.path.exists(f"{run}/kill{rank}"):
                os.remove(f"{run}/kill{rank}")
                os.kill(os.getpid(), signal.SIGKILL)
            while os.path.exists(f"{run}/wait{world}"):  # until the test says more
                time.sleep(0.05)
    print(f"END rank {rank} of {world}", flush=True)
    """
)


def torchrun(folder, kind, steps, *options, alone="0"):
    (folder / "program.py").write_text(PROGRAM)
    with (folder / f"log{len(os.listdir(folder))}").open("w") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *options),
                *(str(folder / "program.py"), kind, str(folder / "run"), str(steps)),
            ],
            # Agents that share their store with the ranks lose each other's address when one joins late.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": alone},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("log*")))


@pytest.mark.parametrize(
    ("kind", "world"),
    [("async", 2), pytest.param("sync", 3, marks=pytest.mark.slow)],
)
def test_ranks_that_torchrun_starts_again_go_on_saving(tmp_path, kind, world):
    """After a rank was killed all are started again, with the store of their first life, and save on."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "kill1").touch()
    agent = torchrun(tmp_path, kind, 4, "--standalone", "--max-restarts", "1", f"--nproc-per-node={world}")
    try:
        assert agent.wait(150) == 0, logs(tmp_path)
    finally:
        agent.terminate()  # it ends its ranks, too
        agent.wait()
    text = logs(tmp_path)
    assert text.count("BEGIN") == 2 * world, text
    assert text.count("END") == world, text
    assert manifest_of(run / "latest").step == 3


@pytest.mark.slow
def test_ranks_save_on_as_agents_join_and_ranks_are_killed(tmp_path):
    """An agent that joins late changes the number of ranks, a rank is killed on one of two: all save on."""
    run = tmp_path / "run"
    run.mkdir()
    options = (
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=late", "--monitor-interval=0.2"),
        "--rdzv-conf=last_call_timeout=1",
    )

    def saw(words):
        deadline = time.monotonic() + 120
        while words not in logs(tmp_path):
            assert time.monotonic() < deadline, logs(tmp_path)
            time.sleep(0.05)

    (run / "wait1").touch()
    (run / "wait2").touch()
    agents = [torchrun(tmp_path, "sync", 30, *options, alone="1")]
    try:
        saw("BEGIN rank 0 of 1")
        agents.append(torchrun(tmp_path, "sync", 30, *options, alone="1"))
        saw("BEGIN rank 1 of 2")
        (run / "kill1").touch()
        (run / "wait2").unlink()
        assert [agent.wait(200) for agent in agents] == [0, 0], logs(tmp_path)
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(60)
    text = logs(tmp_path)
    assert text.count("BEGIN rank 1 of 2") >= 2, text
    assert "END rank 0 of 2" in text
    assert manifest_of(run / "latest").step == 29
