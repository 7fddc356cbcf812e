"""Observers: what they are told, in which order, and that they disturb nothing."""

from __future__ import annotations

import logging
import threading

import pytest
from support.background import Collect, error_of, make, parts, result, state_of

from milepost.telemetry import Event, LoggingObserver, ProgressObserver, notify

STEPS = ["staging", "staged", "writing", "committed"]


def test_events_come_in_order_with_durations_and_bytes(tmp_path):
    """A save is told of as staging, staged, writing, committed, with growing times and bytes."""
    seen = Collect()
    path = str(tmp_path / "c")
    with make(observers=[seen]) as checkpointer:
        result(checkpointer.save(path, state_of(7, 100_000), step=7)[1])
    assert seen.kinds() == STEPS
    assert {(event.path, event.step) for event in seen.events} == {(path, 7)}
    seconds = [event.seconds for event in seen.events]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0
    assert seen.events[1].bytes_done == 400_000
    assert seen.events[-2].bytes_done == seen.events[-2].size_bytes > 400_000
    assert seen.events[-1].bytes_done == seen.events[-2].size_bytes


def test_the_futures_have_the_figures(tmp_path):
    """Both futures tell when they began and ended and their bytes; the write also when it was durable."""
    with make() as checkpointer:
        staged, written = checkpointer.save(str(tmp_path / "c"), state_of(1), step=1)
        result(staged)
        result(written)
    assert staged.path == written.path == str(tmp_path / "c")
    assert staged.step == written.step == 1
    assert staged.started_at == written.started_at <= staged.finished_at
    assert staged.finished_at <= written.written_at <= written.finished_at
    assert staged.bytes_done == 4000
    assert written.bytes_done == (tmp_path / "c" / "checkpoint_0.pt").stat().st_size
    assert 0 < staged.seconds <= written.seconds == written.finished_at - written.started_at
    assert not staged.skipped
    assert not written.skipped


def test_a_future_that_is_not_done_has_figures_too():
    """`seconds` is the time so far."""
    from milepost.background.saves import SaveFuture

    future = SaveFuture("p", None, 0.0)
    assert future.finished_at is None
    assert future.seconds > 0


def test_a_failure_is_an_event_with_its_error(tmp_path):
    """A save that fails in the background, and one that fails at once, end with "failed"."""
    seen = Collect()
    (tmp_path / "file").write_text("mine")
    with make(observers=[seen]) as checkpointer:
        with pytest.raises(OSError):
            checkpointer.save(str(tmp_path / "file"), state_of(1))
        with pytest.raises(ValueError):
            checkpointer.save(str(tmp_path / "c"), {"x": object()})
    assert seen.kinds(tmp_path / "file") == ["staging", "staged", "failed"]
    assert seen.kinds(tmp_path / "c") == ["staging", "failed"]
    assert isinstance(seen.events[-1].error, ValueError)
    assert seen.events[-1].seconds > 0


def test_an_observer_that_fails_disturbs_nothing(tmp_path, caplog):
    """What an observer raises is logged; the save and the other observers go on."""

    class Broken:
        def on_event(self, event):
            raise RuntimeError("observer is broken")

    seen = Collect()
    with make(observers=[Broken(), seen]) as checkpointer:
        result(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
    assert seen.kinds() == STEPS
    assert "observer is broken" in caplog.text
    caplog.clear()  # the tracebacks in it hold the checkpointer


def test_an_observer_may_use_the_checkpointer(tmp_path):
    """A save can be begun as soon as an observer hears that another is committed."""
    futures = []
    saved, begun = threading.Event(), threading.Event()

    def again(_):
        futures.append(checkpointer.save(str(tmp_path / "second"), state_of(2))[1])
        begun.set()

    class Again:
        def on_event(self, event):
            if event.kind == "committed" and event.path.endswith("first"):
                assert saved.wait(60)
                written.add_done_callback(again)

    with make(observers=[Again()]) as checkpointer:
        written = checkpointer.save(str(tmp_path / "first"), state_of(1))[1]
        saved.set()
        result(written)
        assert begun.wait(60)
        checkpointer.wait_committed(60)
    assert result(futures[0]) is None


def test_progress_that_fails_disturbs_nothing(tmp_path, caplog):
    """A process whose `on_progress` raises goes on."""
    from support.saves import ONE

    from milepost.checkpoint_process import CheckpointProcess, LeanWriter
    from milepost.config import CheckpointProcessConfig

    def broken(*_):
        raise RuntimeError("progress is broken")

    process = CheckpointProcess(ONE, CheckpointProcessConfig(), lean=LeanWriter(), on_progress=broken)
    with parts(process=process) as checkpointer:
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1]) is None
    assert "progress is broken" in caplog.text
    caplog.clear()


EVENTS = [
    Event("staging", "run/a", 1),
    Event("staged", "run/a", 1, 0.5, 2**20),
    Event("writing", "run/a", 1, 0.6, 2**19, 2**21),
    Event("committed", "run/a", 1, 1.5, 2**21),
    Event("skipped", "run/b", 2),
    Event("low_memory", "run/c", 3),
    Event("failed", "run/c", 3, 2.5, error=OSError("disk full")),
]


def test_logging_observer_logs_what_matters(caplog):
    """Staged, committed and skipped are infos, low memory a warning, failures errors with their reason."""
    caplog.set_level(logging.INFO)
    for event in EVENTS:
        notify([LoggingObserver()], event)
    lines = [(record.levelname, record.message) for record in caplog.records]
    assert lines == [
        ("INFO", "run/a staged after 0.50 s, 1.0 MiB"),
        ("INFO", "run/a committed after 1.50 s, 2.0 MiB"),
        ("INFO", "run/b skipped after 0.00 s, 0.0 MiB"),
        ("WARNING", "run/c is saved without staging: memory is low"),
        ("ERROR", "run/c failed after 2.50 s: disk full"),
    ]


def test_logging_observer_takes_a_logger(caplog):
    """The logger may be the user's own."""
    caplog.set_level(logging.INFO)
    LoggingObserver(logging.getLogger("mine")).on_event(EVENTS[1])
    assert caplog.records[0].name == "mine"


def test_progress_observer_shows_a_line_for_each_save(capsys):
    """The line names the save and how far it is; nothing is written to standard output."""
    with ProgressObserver() as observer:
        for event in EVENTS:
            notify([observer], event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "run/a committed" in captured.err
    assert "run/c failed" in captured.err
    assert observer._tasks == {}
