"""One shard of a corpus to tallies: everything that is counted, in one pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.config import CountConfig
from halfulp.corpus.family import Family
from halfulp.corpus.keys import join
from halfulp.corpus.read import Notes
from halfulp.corpus.spans import Spans
from halfulp.corpus.symbols import Batch, batches, context_of, is_stretch
from halfulp.corpus.tally import Tally, cells_of
from halfulp.data.corpus import SourceFile


@dataclass(frozen=True)
class Shard:
    """Some numbered files of a corpus and how they are counted; `size` in bytes on disk.

    `shifts` of the samples of shards that are done, by definition: what they have given up needs
    not be kept here, and the union is the same.
    """

    index: int
    files: tuple[tuple[int, SourceFile], ...]
    config: CountConfig
    size: int
    shifts: Mapping[str, int] = field(default_factory=dict)


class Stretch(NamedTuple):
    """A part of a document: its key, its symbols, and the priority of the unit that it ends in."""

    key: int
    length: int
    priority: int


@dataclass
class Counted:
    """What shards came to. `symbols`: how many "words" and "tokens" there are in each shard.

    `stretches` of documents that are divided, by file and by where they begin; none is counted as
    a document before `join_documents`.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    symbols: dict[int, dict[str, int]] = field(default_factory=dict)
    text_bytes: int = 0
    empty_documents: int = 0
    notes: Notes = field(default_factory=Notes)
    stretches: dict[int, dict[int, Stretch]] = field(default_factory=dict)

    def merge(self, other: "Counted") -> None:
        """Take in another shard; the order of shards does not matter."""
        for name, tally in other.tallies.items():
            if name in self.tallies:
                self.tallies[name].merge(tally)
            else:
                self.tallies[name] = tally
        self.symbols |= other.symbols
        self.text_bytes += other.text_bytes
        self.empty_documents += other.empty_documents
        self.notes.merge(other.notes)
        for file, found in other.stretches.items():
            self.stretches.setdefault(file, {}).update(found)

    def join_documents(self) -> None:
        """Count the documents that the stretches make up; all shards must be merged."""
        for stretches in self.stretches.values():
            key = length = priority = 0
            for _, stretch in sorted(stretches.items()):
                key, priority = join(key, stretch.key, stretch.length), stretch.priority
                length += stretch.length
            if not length:
                self.empty_documents += 1
                continue
            whole = Spans(np.array([key], np.uint64), np.zeros(1, np.int64), np.array([length]))
            sample = self.tallies["documents"].sample
            tally = Tally(Sample(sample.limit, sample.shift))
            _count(tally, whole, np.array([priority], np.uint32))
            self.tallies["documents"].merge(tally)
        self.stretches = {}


def scan(shard: Shard, progress: Callable[[int], None] | None = None) -> Counted:
    """Read the shard and count it; `progress` is told the bytes of text, or tokens, of each batch.

    A stretch (`is_stretch`) must be a shard of its own.

    Raises DataError for what is broken.
    """
    config, found = shard.config, Counted()
    names = config.definitions(text=shard.files[0][1].kind != "tokens")
    limit = config.keep // len(names)
    samples = {name: Sample(limit, shard.shifts.get(name, 0)) for name in names}
    families = {
        name: Family(
            {n: samples[f"{name}:{n}"] for n in lengths},
            shard=shard.index,
            apart=name == "window",
        )
        for name, lengths in config.families().items()
    }
    whole = {name: Tally(samples[name]) for name in names if ":" not in name}
    symbols = found.symbols[shard.index] = {}
    number, file = shard.files[0]
    stretch = is_stretch(file, config)
    if stretch and file.begin:
        context = context_of(file, config)
        for name, family in families.items():
            family.go_on(*context[stream_of(name)])
    for batch in batches(shard.files, config, found.notes):
        if stretch and (ended := _taken_out(batch)):
            found.stretches[number] = {file.begin: ended}
        for name, spans in batch.spans.items():
            _count(whole[name], spans, batch.priorities)
        for name, family in families.items():
            family.feed(batch.symbols[stream_of(name)])
        for name, batch_symbols in batch.symbols.items():
            symbols[name] = symbols.get(name, 0) + len(batch_symbols.symbols)
        found.text_bytes += batch.text_bytes
        found.empty_documents += 0 if stretch else batch.empty_documents
        if progress is not None:
            progress(batch.text_bytes or max(len(s.symbols) for s in batch.symbols.values()))
    parts = {f"{name}:{n}": t for name, f in families.items() for n, t in f.tallies.items()}
    found.tallies = {name: tally.settled() for name, tally in (whole | parts).items()}
    return found


def stream_of(definition: str) -> str:
    """What a definition's sequences are made of: "words" or "tokens"; "" for lines, documents."""
    family = definition.partition(":")[0]
    return {"words": "words", "tokens": "tokens", "window": "tokens"}.get(family, "")


def _taken_out(batch: Batch) -> Stretch | None:
    """What would be a document, had its file not been divided, if it ended here."""
    whole = batch.spans.pop("documents")
    if len(whole.keys):
        return Stretch(int(whole.keys[0]), int(whole.lengths[0]), int(batch.priorities[-1]))
    return Stretch(0, 0, int(batch.priorities[-1])) if batch.empty_documents else None


def _count(tally: Tally, spans: Spans, priorities: np.ndarray) -> None:
    priorities = priorities[spans.pieces]
    tally.count(np.ones(len(spans.keys), np.int64), cells_of(priorities))
    chosen = tally.sample.chosen(spans.keys)
    lengths = spans.lengths[chosen].astype(np.uint64)
    tally.sample.add(spans.keys[chosen], priorities[chosen], lengths)
