"""Files to symbols: words without a tokenizer, tokens, and the keys of lines and documents."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.corpus.family import Symbols
from halfulp.corpus.read import Group, Notes, groups
from halfulp.corpus.spans import Spans, spans
from halfulp.corpus.tally import priorities_of
from halfulp.corpus.words import Words, document_starts
from halfulp.data.corpus import SourceFile
from halfulp.data.tokenizer import Bytes, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Batch:
    """Some pieces of documents.

    - `symbols`: the pieces as "words" and as "tokens", as far as asked for.
    - `spans`: "documents" and "lines" (of text) that ended here and are not empty.
    - `priorities` [pieces].
    """

    symbols: dict[str, Symbols]
    spans: dict[str, Spans]
    priorities: np.ndarray
    text_bytes: int
    empty_documents: int


def batches(
    files: Iterable[tuple[int, SourceFile]], config: CountConfig, notes: Notes
) -> Iterator[Batch]:
    """Numbered files, of text or of tokens, in memory that does not grow with them.

    Raises DataError for what is broken.
    """
    files = list(files)
    tokens_only = bool(files) and files[0][1].kind == "tokens"
    taker = _Tokens() if tokens_only else _Text(config)
    for group in groups(files, config, notes):
        yield taker.take(group)


def tokenizer_of(config: CountConfig) -> Tokenizer | None:
    """The tokenizer that `config` names. DataError when it cannot be used."""
    if not config.tokenizer:
        return None
    if config.tokenizer == "bytes":
        return Bytes()
    return load_tokenizer(Path(config.tokenizer).expanduser())


class _Text:
    def __init__(self, config: CountConfig) -> None:
        self._tokenizer = tokenizer_of(config)
        self._words, self._tokens = Words(), _Tokens()

    def take(self, group: Group) -> Batch:
        data = [piece.encode("utf-8", "surrogateescape") for piece in group.pieces]
        priorities = priorities_of(group.numbers)
        found = self._words.feed(data, group.last)
        symbols = {"words": Symbols(found.words, found.starts, found.cuts, priorities)}
        if self._tokenizer is not None:
            tokens = self._tokenizer.encode([_valid(piece) for piece in group.pieces])
            symbols["tokens"] = self._tokens.symbols(group._replace(pieces=tokens))
        empty = int(group.last.sum()) - len(found.documents.keys)
        ended = {"documents": found.documents, "lines": found.lines}
        return Batch(symbols, ended, priorities, sum(map(len, data)), empty)


class _Tokens:
    def __init__(self) -> None:
        self._fresh, self._document = True, (0, 0)

    def take(self, group: Group) -> Batch:
        found = self.symbols(group)
        ends, pieces = found.cuts[group.last], np.flatnonzero(group.last)
        documents, self._document = spans(found.symbols, ends, pieces, self._document)
        empty = len(ends) - len(documents.keys)
        return Batch({"tokens": found}, {"documents": documents}, found.priorities, 0, empty)

    def symbols(self, group: Group) -> Symbols:
        cuts = np.cumsum([len(piece) for piece in group.pieces])
        starts = document_starts(cuts, group.last, self._fresh)
        self._fresh = bool(group.last[-1])
        return Symbols(np.concatenate(group.pieces), starts, cuts, priorities_of(group.numbers))


def _valid(text: str) -> str:
    """`text` with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
