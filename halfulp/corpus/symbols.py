"""Files to symbols: words without a tokenizer, tokens, and the keys of lines and documents."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.corpus.family import Symbols
from halfulp.corpus.lines import lines_in, text_before
from halfulp.corpus.read import Group, Notes, groups
from halfulp.corpus.spans import Spans, spans
from halfulp.corpus.tally import priorities_of
from halfulp.corpus.token_pieces import is_unmarked, tokens_before
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


class Context(NamedTuple):
    """What goes before a part of a document: its last `symbols`; `begun` symbols are known of."""

    symbols: np.ndarray
    begun: int


def is_stretch(file: SourceFile, config: CountConfig) -> bool:
    """Whether the file is a part of a file that is one document."""
    if file.end is None or file.kind in ("jsonl", "parquet"):
        return False
    return file.kind == "text" or is_unmarked(file, config)


def context_of(file: SourceFile, config: CountConfig) -> dict[str, Context]:
    """The symbols before a stretch that sequences in it can begin with, by stream."""
    longest = {
        "words": max(config.words, default=1) - 1,
        "tokens": max((*config.tokens, *config.windows), default=1) - 1,
    }
    if file.kind == "tokens":
        return {"tokens": Context(*tokens_before(file, config, longest["tokens"]))}
    begin, _ = lines_in(file, clean=bool(config.tokenizer))
    found = {}
    for text in text_before(file.path, begin, clean=bool(config.tokenizer)):
        found = _Text(config, goes_on=True).end_of(text, longest)
        if all(context.begun >= longest[name] for name, context in found.items()):
            break
    return found


def batches(
    files: Iterable[tuple[int, SourceFile]], config: CountConfig, notes: Notes
) -> Iterator[Batch]:
    """Numbered files, of text or of tokens, in memory that does not grow with them.

    A stretch, which must be the only file, goes on with the document of its context.
    Raises DataError for what is broken.
    """
    files = list(files)
    tokens_only = bool(files) and files[0][1].kind == "tokens"
    goes_on = any(file.begin and is_stretch(file, config) for _, file in files)
    taker = _Tokens(goes_on=goes_on) if tokens_only else _Text(config, goes_on=goes_on)
    for group in groups(files, config, notes):
        yield taker.take(group)


def tokenizer_of(config: CountConfig) -> Tokenizer | None:
    """The tokenizer that `config` names. DataError when it cannot be used."""
    if not config.tokenizer:
        return None
    if config.tokenizer == "bytes":
        return Bytes()
    return load_tokenizer(Path(config.tokenizer).expanduser())


_STEP = 1 << 18  # bytes of a context at a time


class _Text:
    def __init__(self, config: CountConfig, *, goes_on: bool) -> None:
        self._tokenizer = tokenizer_of(config)
        self._words, self._tokens = Words(goes_on=goes_on), _Tokens(goes_on=goes_on)

    def end_of(self, text: bytes, longest: Mapping[str, int]) -> dict[str, Context]:
        """The last symbols of some lines."""
        words, last = np.empty(0, np.uint64), np.array([False])
        for at in range(0, len(text), _STEP):
            found = self._words.feed([text[at : at + _STEP]], last).words
            words = np.concatenate([words, found])[-longest["words"] - 1 :]
        found = {"words": words}
        if self._tokenizer is not None:
            (tokens,) = self._tokenizer.encode([text.decode("utf-8", "replace")])
            found["tokens"] = np.asarray(tokens)
        return {name: Context(symbols, len(symbols)) for name, symbols in found.items()}

    def take(self, group: Group) -> Batch:
        data = [
            piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogateescape")
            for piece in group.pieces
        ]
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
    def __init__(self, *, goes_on: bool) -> None:
        self._fresh, self._document = not goes_on, (0, 0)

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
