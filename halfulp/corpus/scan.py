"""One shard of a corpus to tallies: everything that is counted, in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.config import CountConfig
from halfulp.corpus.family import Family, Symbols
from halfulp.corpus.read import Group, Notes, groups
from halfulp.corpus.tally import Tally, priorities_of
from halfulp.corpus.words import Words, document_starts, segments
from halfulp.data.corpus import SourceFile
from halfulp.data.tokenizer import Bytes, Tokenizer, load_tokenizer

_NO_PLACE = np.uint64(0)


@dataclass(frozen=True)
class Shard:
    """Some numbered files of a corpus and how they are counted."""

    index: int
    files: tuple[tuple[int, SourceFile], ...]
    config: CountConfig
    stored_bytes: int


@dataclass
class Counted:
    """What shards came to. `symbols`: words or tokens by shard and family, for the file order."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    symbols: dict[int, dict[str, int]] = field(default_factory=dict)
    text_bytes: int = 0
    empty_documents: int = 0
    notes: Notes = field(default_factory=Notes)

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


def scan(shard: Shard) -> Counted:
    """Read the shard and count it.

    Raises DataError for what is broken.
    """
    scanner = _Scan(shard)
    for group in groups(shard.files, shard.config, scanner.found.notes):
        scanner.feed(group)
    return scanner.result()


class _Scan:
    def __init__(self, shard: Shard) -> None:
        config = shard.config
        self.found = Counted()
        self._shard = shard.index
        self._is_text = shard.files[0][1].kind != "tokens"
        names = config.definitions(text=self._is_text)
        limit = config.keep // len(names)
        self._families = {
            name: Family(lengths, limit=limit, shard=shard.index, apart=name == "window")
            for name, lengths in config.families().items()
        }
        self._whole = {name: Tally(Sample(limit)) for name in names if ":" not in name}
        self._tokenizer = tokenizer_of(config)
        self._words = Words()
        self._fresh, self._document = True, (0, 0)  # of token documents

    def feed(self, group: Group) -> None:
        priorities = priorities_of(group.numbers)
        if not self._is_text:
            self._feed_tokens(group.pieces, group.last, priorities, documents=True)
            return
        data = [piece.encode("utf-8", "surrogateescape") for piece in group.pieces]
        self.found.text_bytes += sum(map(len, data))
        words = self._words.feed(data, group.last)
        self._count("documents", words.documents, words.document_pieces, priorities)
        self._count("lines", words.lines, words.line_pieces, priorities)
        self.found.empty_documents += int(group.last.sum()) - len(words.documents)
        if family := self._families.get("words"):
            family.feed(Symbols(words.words, words.starts, words.cuts, priorities))
        if self._tokenizer is not None:
            tokens = self._tokenizer.encode([_valid(piece) for piece in group.pieces])
            self._feed_tokens(tokens, group.last, priorities, documents=False)

    def result(self) -> Counted:
        for name, family in self._families.items():
            self._whole |= {f"{name}:{n}": tally for n, tally in family.tallies.items()}
        self.found.symbols[self._shard] = {n: f.symbols for n, f in self._families.items()}
        self.found.tallies = {name: tally.settled() for name, tally in self._whole.items()}
        return self.found

    def _feed_tokens(
        self,
        pieces: Sequence[np.ndarray],
        last: np.ndarray,
        priorities: np.ndarray,
        *,
        documents: bool,
    ) -> None:
        cuts = np.cumsum([len(piece) for piece in pieces])
        tokens = np.concatenate(pieces)
        starts, self._fresh = document_starts(cuts, last, self._fresh), bool(last[-1])
        if documents:
            keys, whole, self._document = segments(tokens, cuts[last], self._document)
            self._count("documents", keys, np.flatnonzero(last)[whole], priorities)
            self.found.empty_documents += int(last.sum()) - len(keys)
        for name in ("tokens", "window"):
            if family := self._families.get(name):
                family.feed(Symbols(tokens, starts, cuts, priorities))

    def _count(
        self, name: str, keys: np.ndarray, pieces: np.ndarray, priorities: np.ndarray
    ) -> None:
        tally, mine = self._whole[name], priorities[pieces]
        tally.count(np.ones(len(keys), np.int64), mine)
        chosen = tally.sample.chosen(keys)
        tally.sample.add(keys[chosen], mine[chosen], np.full(len(chosen), _NO_PLACE))


def tokenizer_of(config: CountConfig) -> Tokenizer | None:
    """The tokenizer that `config` names. DataError when it cannot be used."""
    if not config.tokenizer:
        return None
    if config.tokenizer == "bytes":
        return Bytes()
    return load_tokenizer(Path(config.tokenizer).expanduser())


def _valid(text: str) -> str:
    """`text` with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
