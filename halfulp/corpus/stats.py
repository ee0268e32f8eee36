"""What a corpus holds, as one value that can be written and read again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfulp.corpus.config import CountConfig
from halfulp.corpus.growth import Growth, growth
from halfulp.corpus.read import named, skips
from halfulp.corpus.scan import Counted, stream_of
from halfulp.corpus.symbols import tokenizer_of
from halfulp.data.cache import write_json
from halfulp.data.corpus import SourceFile
from halfulp.errors import DataError

FORMAT = "halfulp-corpus-stats-1"
NORMALIZATION = "white space only separates words; nothing else is changed"


@dataclass(frozen=True)
class Stats:
    """The sequences of a corpus: `counts` by definition, "documents", "words:3", "tokens:8", …

    `text_bytes` is None for token files; `symbols`: how many "words" and "tokens" there are.
    `skipped`: files that are no text, and why; `invalid`: bytes that are not UTF-8, by file;
    `unmarked`: token files that do not mark documents. `split`: growth is that of pieces of 64 KB,
    as the corpus is a few long documents.
    """

    paths: tuple[str, ...]
    files: int
    text_bytes: int | None
    symbols: dict[str, int]
    empty_documents: int
    tokenizer: dict[str, Any] | None
    skipped: dict[str, str]
    invalid: dict[str, int]
    unmarked: tuple[str, ...]
    counts: dict[str, Growth]
    split: bool = False

    @property
    def documents(self) -> int:
        """Documents that are not empty."""
        return self.counts["documents"].occurrences

    @property
    def shuffled(self) -> bool | None:
        """Whether the first half of the files is like a random half; None where unknown."""
        known = [count.shuffled for count in self.counts.values() if count.shuffled is not None]
        return all(known) if known else None

    def notes(self) -> list[str]:
        """Sentences that a reader of the figures must know."""
        found = skips(self.skipped)
        if self.invalid:
            found.append(
                f"bytes that are not UTF-8, counted as letters: {sum(self.invalid.values()):,}, in "
                f"{named(list(self.invalid))}"
            )
        if self.unmarked:
            found.append(
                f"documents are not marked, so that each file is counted as one, in "
                f"{named(self.unmarked)}; name their end with --end-token"
            )
        if self.split and self.documents:
            found.append("few files: exponents and forecasts are of pieces of 64 KB, not documents")
        if not self.documents:
            found.append("0 documents: there is nothing to count")
        if self.shuffled is False:
            found.append(_not_shuffled(self))
        sampled = [count for count in self.counts.values() if not count.exact]
        if sampled:
            worst = max(count.rel_std for count in sampled)
            found.append(
                f"exact where no ± stands; elsewhere a sample of the sequences, standard error up "
                f"to {worst:.1%}. A larger --keep makes more of them exact"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is unknown is null."""
        head = {"format": FORMAT, "halfulp": version("halfulp"), "normalization": NORMALIZATION}
        counts = {name: _json(count) for name, count in self.counts.items()}
        return head | asdict(self) | {"shuffled": self.shuffled, "counts": counts}

    def save(self, path: Path) -> None:
        """Write the JSON to `path`, whole or not at all."""
        write_json(path, self.to_json())


def stats_of(
    paths: Sequence[str], files: Sequence[SourceFile], config: CountConfig, counted: Counted
) -> Stats:
    """What was counted of `files`, which are those of `paths`."""
    notes, tokenizer = counted.notes, tokenizer_of(config)
    counts = {}
    for name, tally in counted.tallies.items():
        stream = stream_of(name)
        symbols = {s: found[stream] for s, found in counted.symbols.items() if stream in found}
        counts[name] = growth(name, tally, symbols)
    streams = {name for found in counted.symbols.values() for name in found}
    totals = {
        n: sum(found.get(n, 0) for found in counted.symbols.values()) for n in sorted(streams)
    }
    return Stats(
        tuple(map(str, paths)),
        len(files),
        counted.text_bytes if files[0].kind != "tokens" else None,
        totals,
        counted.empty_documents,
        None if tokenizer is None else tokenizer.describe(),
        dict(sorted(notes.skipped.items())),
        dict(sorted(notes.invalid.items())),
        tuple(sorted(notes.unmarked)),
        counts,
        config.split,
    )


def load_stats(path: Path) -> Stats:
    """The statistics that `Stats.save` wrote.

    Raises DataError for a file that is missing or something else.
    """
    cure = "Write it with: halfulp corpus stats PATH -o stats.json"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. {cure}") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}). {cure}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path} holds no statistics of a corpus ({FORMAT}). {cure}")
    try:
        counts = {name: _growth(name, count) for name, count in found["counts"].items()}
        known: dict[str, Any] = {field.name: found[field.name] for field in fields(Stats)}
        for name, value in (
            ("paths", tuple(found["paths"])),
            ("unmarked", tuple(found["unmarked"])),
            ("counts", counts),
        ):
            known[name] = value
        return Stats(**known)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error!r} is missing or wrong. {cure}") from error


def _not_shuffled(stats: Stats) -> str:
    judged = [count for count in stats.counts.values() if count.shuffled is False]
    worst = max(judged, key=lambda c: abs((c.order_exponent or 0) - (c.random_exponent or 0)))
    return (
        f"not shuffled: from the first half of the files to the whole, {worst.name} grows with "
        f"the exponent {worst.order_exponent:.2f}, from a random half with "
        f"{worst.random_exponent:.2f}. The figures here are of documents in random order; a run "
        "that reads only the first part sees another corpus. Shuffle it before training"
    )


def _json(count: Growth) -> dict[str, Any]:
    shown = asdict(count) | {"duplicates": count.duplicates, "shuffled": count.shuffled}
    del shown["name"]
    return shown


def _growth(name: str, found: dict[str, Any]) -> Growth:
    known = {field.name: found[field.name] for field in fields(Growth) if field.name != "name"}
    known |= {"f": tuple(found["f"]), "curve": tuple((t, u) for t, u in found["curve"])}
    return Growth(name, **known)
