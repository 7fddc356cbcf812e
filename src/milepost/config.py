"""The options of every part. Each class is re-exported by the module whose part it configures.

They are plain mutable dataclasses, as users assign to their fields; `validate` checks them when a
checkpointer is built, and its errors name the field, the value and what would be right.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from milepost.errors import ConfigError

__all__ = [
    "AsyncConfig",
    "BarrierConfig",
    "CheckpointProcessConfig",
    "CheckpointStagerConfig",
    "CheckpointWriterConfig",
    "CheckpointerConfig",
    "validate",
]


@dataclass
class CheckpointWriterConfig:
    """Options of the writer.

    Attributes:
        write_barrier_timeout_secs: How long a rank waits for the others, in seconds.
        start_id: Common id of this start of the job, for several ranks; it must be new at every start.
            Defaults to the environment's ``MILEPOST_START_ID``.
        replicated: Which plain tensors are the same on all ranks, so that each byte of them is saved once:
            patterns for their paths such as ``"model.*"`` (``*`` stands for any text), or
            DistributedDataParallel modules. All other plain tensors are each rank's own; a DTensor says
            itself how it lies.
    """

    write_barrier_timeout_secs: int = 600
    start_id: str | None = None
    replicated: list[Any] = field(default_factory=list)


@dataclass
class BarrierConfig:
    """Which barrier the ranks meet at before a checkpoint is committed.

    Attributes:
        barrier_type: Name of a registered barrier, such as "tcp_store"; None for no barrier.
        barrier_args: Keyword arguments of its constructor.
    """

    barrier_type: str | None = None
    barrier_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class CheckpointStagerConfig:
    """Options of staging. None means what suits this machine.

    Attributes:
        use_pinned_memory: Pin the staging memory for copies from an accelerator.
        use_shared_memory: Stage into memory that the checkpoint process shares.
        use_async_staging: Let the copy itself run beside the training (off by default).
        use_non_blocking_copy: Copy from the accelerator without blocking the host.
    """

    use_pinned_memory: bool | None = None
    use_shared_memory: bool | None = None
    use_async_staging: bool | None = None
    use_non_blocking_copy: bool | None = None


@dataclass
class CheckpointProcessConfig:
    """Options of the checkpoint process.

    Attributes:
        subprocess_init_timeout_secs: How long its start may take, in seconds.
        subprocess_shutdown_timeout_secs: How long it may stand still when it is closed, in seconds.
        nice: Added to its niceness, 0 to 19: it yields the processors to the training.
        idle_io: Give it the disk only when nobody else wants it (where the I/O scheduler knows that).
    """

    subprocess_init_timeout_secs: int = 30
    subprocess_shutdown_timeout_secs: int = 60
    nice: int = 0
    idle_io: bool = False


@dataclass
class AsyncConfig:
    """How saves run beside the training.

    Attributes:
        max_in_flight: How many saves may be under way; each needs an arena.
        when_busy: With that many under way, `save` waits ("wait"), or does nothing ("skip"; only with one
            rank, as several would skip different saves).
        on_failure: When the checkpoint process is lost: write again with a fresh one ("retry"), let the
            save fail ("raise"), or let it fail with no more than a warning in the log ("warn").
        retries: How often "retry" does.
        on_low_memory: When an arena does not fit into memory: save without staging, while the training
            waits ("sync"), or raise ("raise").
        require_guard: Refuse asynchronous staging without a guarded optimizer.
        observers: Told of every save; see `milepost.telemetry`.
    """

    max_in_flight: int = 1
    when_busy: Literal["wait", "skip"] = "wait"
    on_failure: Literal["retry", "raise", "warn"] = "retry"
    retries: int = 1
    on_low_memory: Literal["sync", "raise"] = "sync"
    require_guard: bool = False
    observers: list[Any] = field(default_factory=list)


@dataclass
class CheckpointerConfig:
    """The options of a checkpointer: one field for each of its parts, and one for background saves.

    Attributes:
        writer_config: Options of the writer.
        barrier_config: Where the ranks meet before a commit, in place of what `meeting` says.
        staging_config: Options of staging.
        process_config: Options of the checkpoint process.
        async_config: Options of background saves.
        meeting: With "auto", several ranks meet in each save at the store of the default process group: what
            was saved is committed, on every rank. With "none" each rank writes its part, and nobody waits.
    """

    writer_config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig)
    staging_config: CheckpointStagerConfig = field(default_factory=CheckpointStagerConfig)
    process_config: CheckpointProcessConfig = field(default_factory=CheckpointProcessConfig)
    async_config: AsyncConfig = field(default_factory=AsyncConfig)
    meeting: Literal["auto", "none"] = "auto"


_PARTS = {
    "writer_config": CheckpointWriterConfig,
    "barrier_config": BarrierConfig,
    "staging_config": CheckpointStagerConfig,
    "process_config": CheckpointProcessConfig,
    "async_config": AsyncConfig,
}

_CHOICES = {
    "meeting": ("auto", "none"),
    "async_config.when_busy": ("wait", "skip"),
    "async_config.on_failure": ("retry", "raise", "warn"),
    "async_config.on_low_memory": ("sync", "raise"),
}

_RANGES = {
    "process_config.nice": (0, 19),
    "async_config.max_in_flight": (1, 1024),
    "async_config.retries": (0, 1000),
}


def validate(config: Any) -> None:
    """Check every option of a CheckpointerConfig.

    Raises:
        ConfigError: Names the first field that is not right.
    """
    if not isinstance(config, CheckpointerConfig):
        raise ConfigError(
            f"config must be a CheckpointerConfig, not {type(config).__name__}",
            hint="CheckpointerConfig(writer_config=..., barrier_config=...)",
        )
    _check("meeting", config.meeting, "")
    for name, kind in _PARTS.items():
        part = getattr(config, name)
        if not isinstance(part, kind):
            raise ConfigError(f"{name} must be a {kind.__name__}, not {type(part).__name__}")
        for option in fields(kind):
            _check(f"{name}.{option.name}", getattr(part, option.name), str(option.type))


def _check(name: str, value: Any, kind: str) -> None:
    if name.endswith("_secs"):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ConfigError(f"{name} must be a positive number of seconds, not {value!r}")
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, _CHOICES[name]))}, not {value!r}")
    elif name in _RANGES:
        low, high = _RANGES[name]
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    elif name == "writer_config.replicated":
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, str) or hasattr(item, "parameters") for item in value
        ):
            raise ConfigError(
                f"{name} must be a list of patterns or DistributedDataParallel modules, not {value!r}",
                hint='replicated=["model.*"]',
            )
    elif kind == "list[Any]":
        if not isinstance(value, list) or not all(
            callable(getattr(item, "on_event", None)) for item in value
        ):
            raise ConfigError(f"{name} must be a list of objects with an on_event method, not {value!r}")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")
    elif kind == "bool | None":
        if not (value is None or isinstance(value, bool)):
            raise ConfigError(f"{name} must be True, False or None, not {value!r}")
    elif kind == "str | None":
        if not (value is None or (isinstance(value, str) and value)):
            raise ConfigError(f"{name} must be a text that is not empty, or None, not {value!r}")
    elif not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a dict with text keys, not {value!r}")
