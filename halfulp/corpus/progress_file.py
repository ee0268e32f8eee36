"""The shards of a corpus that are done, kept on disk until all are."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import stat_of
from halfulp.corpus.read import Notes
from halfulp.corpus.scan import Counted, Stretch
from halfulp.corpus.tally import Tally
from halfulp.data.cache import key_of, replacing
from halfulp.data.corpus import SourceFile
from halfulp.errors import DataError
from halfulp.numerics.kernel import cache_directory

LAYOUT = 2  # part of every name; raise it when the same text would be counted otherwise
_ARRAYS = ("keys", "priorities", "least")


@dataclass
class Progress:
    """What was counted, and the indices of the shards that it comes from."""

    counted: Counted = field(default_factory=Counted)
    done: set[int] = field(default_factory=set)


def progress_path(files: Sequence[SourceFile], config: CountConfig) -> Path:
    """Where the progress of this count is kept: in the user's cache, by files and definitions.

    A file is known by path, size and time of change. DataError when one cannot be read.
    """
    found = [(str(file.path.absolute()), stat_of(file.path)) for file in files]
    marks = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in found]
    return cache_directory() / "corpus" / f"{key_of(LAYOUT, asdict(config), marks)}.npz"


def save_progress(path: Path, progress: Progress) -> None:
    """Write `progress` to `path`, whole or not at all."""
    counted, arrays = progress.counted, {}
    shifts = {}
    for number, (name, tally) in enumerate(counted.tallies.items()):
        arrays |= {f"{number} {part}": getattr(tally.sample, part) for part in _ARRAYS}
        arrays[f"{number} steps"] = tally.steps
        shifts[name] = tally.sample.shift
    facts = {
        "done": sorted(progress.done),
        "shifts": shifts,
        "symbols": counted.symbols,
        "text_bytes": counted.text_bytes,
        "empty_documents": counted.empty_documents,
        "notes": asdict(counted.notes),
        "stretches": counted.stretches,
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with replacing(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_progress(path: Path, config: CountConfig) -> Progress:
    """The progress in `path`.

    Raises DataError when there is none or it is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return _read({name: stored[name] for name in stored.files}, config)
    except FileNotFoundError as error:
        raise DataError(
            "there is nothing to resume: no count of these files with these options was stopped. "
            "Leave --resume out."
        ) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"the progress kept in {path} is damaged ({error}). Leave --resume out to start again."
        ) from error


def _read(stored: dict[str, Any], config: CountConfig) -> Progress:
    facts = json.loads(stored["facts"].tobytes())
    limit = config.keep // len(facts["shifts"])
    tallies = {}
    for number, (name, shift) in enumerate(facts["shifts"].items()):
        parts = {part: stored[f"{number} {part}"] for part in _ARRAYS}
        tallies[name] = Tally(Sample(limit, shift, **parts), stored[f"{number} steps"])
    symbols = {int(shard): by_family for shard, by_family in facts["symbols"].items()}
    stretches = {
        int(file): {int(begin): Stretch(*stretch) for begin, stretch in found.items()}
        for file, found in facts["stretches"].items()
    }
    counted = Counted(
        tallies, symbols, facts["text_bytes"], facts["empty_documents"], Notes(**facts["notes"]),
        stretches,
    )  # fmt: skip
    return Progress(counted, set(facts["done"]))
