"""The options of every part. Each class is re-exported by the module whose part it configures.

They are plain mutable dataclasses, because users assign to their fields. Each field carries the rule for its
value. `validate` applies the rules when a checkpointer is built. Its errors name the field, the value and
what would be right.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _rule(right: str, holds: Callable[[Any], bool], hint: str | None = None) -> dict[str, Any]:
    """The metadata of a field: what its value must be, whether a value is that, and an example."""
    return {"rule": (right, holds, hint)}


def _integer(low: int, high: int) -> dict[str, Any]:
    return _rule(
        f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high
    )


def _choice(*choices: str) -> dict[str, Any]:
    return _rule(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def _part(kind: type) -> dict[str, Any]:
    return _rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))


_SECONDS = _rule(
    "a positive number of seconds",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9,
)
_FLAG = _rule("True or False", lambda value: isinstance(value, bool))
_MAYBE_FLAG = _rule("True, False or None", lambda value: value is None or isinstance(value, bool))
_MAYBE_TEXT = _rule(
    "a text that is not empty, or None",
    lambda value: value is None or (isinstance(value, str) and value != ""),
)
_KEYWORDS = _rule(
    "a dict with text keys",
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
)
_REPLICAS = _rule(
    "a list of patterns or DistributedDataParallel modules",
    lambda value: (
        isinstance(value, list | tuple)
        and all(isinstance(item, str) or hasattr(item, "parameters") for item in value)
    ),
    hint='replicated=["model.*"]',
)
_OBSERVERS = _rule(
    "a list of objects with an on_event method",
    lambda value: (
        isinstance(value, list) and all(callable(getattr(item, "on_event", None)) for item in value)
    ),
)


@dataclass
class CheckpointWriterConfig:
    """Options of the writer.

    Attributes:
        write_barrier_timeout_secs: How long a rank waits for the others, in seconds.
        start_id: The id that all ranks of this start of the job share. It must be new at every start.
            Defaults to the environment's ``MILEPOST_START_ID``.
        replicated: The plain tensors that are the same on all ranks. Milepost saves each byte of them
            once. Give patterns for their paths, such as ``"model.*"`` (``*`` stands for any text), or
            DistributedDataParallel modules. Each rank saves its other plain tensors itself. A DTensor
            says how the ranks share it.
    """

    write_barrier_timeout_secs: int = field(default=600, metadata=_SECONDS)
    start_id: str | None = field(default=None, metadata=_MAYBE_TEXT)
    replicated: list[Any] = field(default_factory=list, metadata=_REPLICAS)


@dataclass
class BarrierConfig:
    """The barrier at which the ranks meet before a checkpoint is committed.

    Attributes:
        barrier_type: Name of a registered barrier, such as "tcp_store"; None for no barrier.
        barrier_args: Keyword arguments of its constructor.
    """

    barrier_type: str | None = field(default=None, metadata=_MAYBE_TEXT)
    barrier_args: dict[str, Any] = field(default_factory=dict, metadata=_KEYWORDS)


@dataclass
class CheckpointStagerConfig:
    """Options of staging. With None, Milepost chooses what this machine can do.

    Attributes:
        use_pinned_memory: Pin the staging memory for copies from an accelerator.
        use_shared_memory: Stage into memory that the checkpoint process shares.
        use_async_staging: Copy while the training goes on (off by default).
        use_non_blocking_copy: Copy from the accelerator without blocking the host.
    """

    use_pinned_memory: bool | None = field(default=None, metadata=_MAYBE_FLAG)
    use_shared_memory: bool | None = field(default=None, metadata=_MAYBE_FLAG)
    use_async_staging: bool | None = field(default=None, metadata=_MAYBE_FLAG)
    use_non_blocking_copy: bool | None = field(default=None, metadata=_MAYBE_FLAG)


@dataclass
class CheckpointProcessConfig:
    """Options of the checkpoint process.

    Attributes:
        subprocess_init_timeout_secs: How long its start may take, in seconds.
        subprocess_shutdown_timeout_secs: How long it may make no progress when it is closed, in seconds.
        nice: Added to its niceness, 0 to 19. With a higher number the training gets the processors first.
        idle_io: It uses the disk only when nobody else does (if the I/O scheduler supports that).
    """

    subprocess_init_timeout_secs: int = field(default=30, metadata=_SECONDS)
    subprocess_shutdown_timeout_secs: int = field(default=60, metadata=_SECONDS)
    nice: int = field(default=0, metadata=_integer(0, 19))
    idle_io: bool = field(default=False, metadata=_FLAG)


@dataclass
class AsyncConfig:
    """How saves run beside the training.

    Attributes:
        max_in_flight: How many saves may run at the same time. Each needs an arena.
        when_busy: When that many saves are running, `save` waits ("wait") or does nothing ("skip"). "skip"
            needs a single rank, because several ranks would skip different saves.
        on_failure: When the checkpoint process is lost, write again with a new one ("retry"), fail the
            save ("raise"), or fail it with only a warning in the log ("warn").
        retries: How often "retry" writes again.
        on_low_memory: When an arena does not fit into memory, save without staging while the training
            waits ("sync"), or raise ("raise").
        require_guard: Refuse asynchronous staging without a guarded optimizer.
        observers: They get the events of every save; see `milepost.telemetry`.
    """

    max_in_flight: int = field(default=1, metadata=_integer(1, 1024))
    when_busy: Literal["wait", "skip"] = field(default="wait", metadata=_choice("wait", "skip"))
    on_failure: Literal["retry", "raise", "warn"] = field(
        default="retry", metadata=_choice("retry", "raise", "warn")
    )
    retries: int = field(default=1, metadata=_integer(0, 1000))
    on_low_memory: Literal["sync", "raise"] = field(default="sync", metadata=_choice("sync", "raise"))
    require_guard: bool = field(default=False, metadata=_FLAG)
    observers: list[Any] = field(default_factory=list, metadata=_OBSERVERS)


@dataclass
class CheckpointerConfig:
    """The options of a checkpointer: one field for each of its parts, and one for background saves.

    Attributes:
        writer_config: Options of the writer.
        barrier_config: The barrier at which ranks meet before a commit. With one, `meeting` has no effect.
        staging_config: Options of staging.
        process_config: Options of the checkpoint process.
        async_config: Options of background saves.
        meeting: With "auto", several ranks meet in each save at the store of the default process group. A
            save that returned is committed on every rank. With "none" each rank writes its part without
            waiting for the others.
    """

    writer_config: CheckpointWriterConfig = field(
        default_factory=CheckpointWriterConfig, metadata=_part(CheckpointWriterConfig)
    )
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig, metadata=_part(BarrierConfig))
    staging_config: CheckpointStagerConfig = field(
        default_factory=CheckpointStagerConfig, metadata=_part(CheckpointStagerConfig)
    )
    process_config: CheckpointProcessConfig = field(
        default_factory=CheckpointProcessConfig, metadata=_part(CheckpointProcessConfig)
    )
    async_config: AsyncConfig = field(default_factory=AsyncConfig, metadata=_part(AsyncConfig))
    meeting: Literal["auto", "none"] = field(default="auto", metadata=_choice("auto", "none"))


def validate(config: Any) -> None:
    """Check every option of a CheckpointerConfig.

    Raises:
        ConfigError: The first field that is wrong, with its value and what it must be.
    """
    if not isinstance(config, CheckpointerConfig):
        raise ConfigError(
            f"config must be a CheckpointerConfig, not {type(config).__name__}",
            hint="CheckpointerConfig(writer_config=..., barrier_config=...)",
        )
    _check(config, "")
    for part in fields(config):
        if part.name.endswith("_config"):
            _check(getattr(config, part.name), f"{part.name}.")


def _check(options: Any, prefix: str) -> None:
    for option in fields(options):
        value = getattr(options, option.name)
        right, holds, hint = option.metadata["rule"]
        if not holds(value):
            shown = type(value).__name__ if option.name.endswith("_config") else repr(value)
            raise ConfigError(f"{prefix}{option.name} must be {right}, not {shown}", hint=hint)
