"""Coverage-guided fuzzing of what reads a checkpoint: index, manifest, data file.

    pip install atheris
    python tests/fuzz/fuzz_checkpoint.py TARGET [libFuzzer options, such as -max_total_time=60] [CORPUS]

TARGET is "index", "manifest" (their bytes, signed), "object" (those of a pickle, signed), or "plain" (a
data file without a manifest). Whatever the bytes: a value, or an error of Milepost's that names the file.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

try:
    import atheris
except ImportError:  # `check` and `seeds` are of use without it
    atheris = None

sys.path.insert(0, str(Path(__file__).parents[1]))

if atheris:
    with atheris.instrument_imports(include=["milepost"], enable_loader_override=False):
        import milepost.checkpoint_reader
        import milepost.health.verify  # noqa: F401

from support.forge import Forge, dump, write
from support.saves import load, save
from support.states import make_state

from milepost.errors import (
    ConfigError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    MismatchError,
    UnsupportedFormatError,
)
from milepost.health.verify import verify as verify_checkpoint
from milepost.storage import default_storage

ALLOWED = (
    CorruptCheckpointError,
    UnsupportedFormatError,
    IncompleteCheckpointError,
    MismatchError,
    ConfigError,  # a device that is not here
)
TARGETS = ("index", "manifest", "object", "plain")


OBJECTS = [
    b"\x80\x02}(K\1NG?\xf0\0\0\0\0\0\0Nu.",
    b"\x80\x02c__builtin__\nset\n](K\1\x8a\1\2e\x85R.",
    b"\x80\x02c__builtin__\nbytearray\nc_codecs\nencode\nX\1\0\0\0aX\6\0\0\0latin1\x86R\x85R.",
    b"\x80\x02ccollections\nCounter\n})q\0h\0\x85q\1K\1s\x85R.",
]
"""Small pickles of the kinds that a scan follows."""


class Fuzzed:
    """A checkpoint, one part of which is replaced again and again."""

    def __init__(self, target: str) -> None:
        assert target in TARGETS, f"unknown target {target!r}"
        self.target = target
        self.path = tempfile.mkdtemp(prefix="milepost-fuzz-") + "/step"
        save(self.path, 1)
        self.forge = Forge(self.path)
        self.object = self.forge.record(self.forge.node("sparse")[1])
        self.whole = bytes(self.forge.data), dump(self.forge.index)

    def seeds(self) -> list[bytes]:
        """Valid inputs."""
        return {
            "index": [dump(self.forge.index)],
            "manifest": [dump(self.forge.body)],
            "object": [bytes(self.forge.data[self.object]), *OBJECTS],
            "plain": [bytes(self.forge.data)],
        }[self.target]

    def put(self, data: bytes) -> None:
        """Make these bytes the part."""
        if self.target == "index":
            self.forge.sign_index(data)
        elif self.target == "manifest":
            self.forge.sign_manifest(data)
        elif self.target == "object":
            self.forge.data, self.forge.index = bytearray(self.whole[0]), json.loads(self.whole[1])
            self.forge.put_object("sparse", data[:20_000])
        else:
            Path(f"{self.path}/manifest.json").unlink(missing_ok=True)
            Path(f"{self.path}/index_0.json").unlink(missing_ok=True)
            write(f"{self.path}/checkpoint_0.pt", data)

    def check(self, data: bytes) -> None:
        """Load and verify with these bytes; any exception but those allowed is a finding."""
        self.put(data)
        for work in (
            lambda: load(self.path),
            lambda: load(self.path, make_state(2)),
            lambda: load(self.path, verify="first"),
            lambda: verify_checkpoint(default_storage(), self.path),
        ):
            try:
                work()
            except ALLOWED as error:
                if "step" not in str(error):
                    raise AssertionError(f"the error does not name the file: {error}") from error


def main() -> None:
    """Fuzz until told to stop."""
    if atheris is None:
        sys.exit("this needs atheris: pip install atheris")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    fuzzed = Fuzzed(sys.argv.pop(1))
    corpus = Path(tempfile.mkdtemp(prefix="milepost-corpus-"))
    for number, seed in enumerate(fuzzed.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus), "-max_len=20000"], fuzzed.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
