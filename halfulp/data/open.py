"""A configuration to tokens: training and held-out streams, and batches of them."""

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfulp.data.config import DataConfig
from halfulp.data.corpus import Listing, list_files
from halfulp.data.sampling import sample_windows, windows_in
from halfulp.data.split import document_ranges, first_tokens
from halfulp.data.stored import Stored
from halfulp.data.text_corpus import store_text
from halfulp.data.token_files import store_tokens
from halfulp.data.tokens import TokenSource
from halfulp.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """An opened corpus: `vocab` token ids, a `train` and a `val` stream.

    `digest` is a SHA-256 of tokens, tokenizer and split: equal digests give equal batches.
    """

    vocab: int
    digest: str
    train: TokenSource
    val: TokenSource
    facts: dict[str, Any] = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """What was read and how it was split, ready for JSON.

        `documents` and `bytes` (of text) are None where token files do not say them.
        """
        return json.loads(json.dumps(self.facts))

    def windows(self, split: str, length: int) -> int:
        """How many windows of length + 1 tokens an epoch of `split` has.

        They start at multiples of `length`, so neighbors share one token.
        Raises DataError when there is none.
        """
        source = self._source(split)
        if length < 1:
            raise DataError(f"a window of length {length} was asked for; give 1 or more.")
        count = windows_in(len(source), length)
        if not count:
            more = "raise data.val_fraction" if split == "val" else "raise data.max_tokens if set"
            raise DataError(
                f"the {split} split has {len(source)} tokens, and one window of length {length} "
                f"needs {length + 1}. Give more text, {more}, or shorten the window."
            )
        return count

    def batch(self, split: str, index: int, *, rows: int, length: int, seed: int) -> torch.Tensor:
        """Batch number `index` as int64 [rows, length + 1].

        Its rows are the samples index * rows … index * rows + rows - 1 of an endless stream that
        visits every window once an epoch, in an order drawn from (seed, epoch). Nothing is
        remembered between calls.
        Raises DataError for an unknown split, a negative index, or a split without a window.
        """
        source, windows = self._source(split), self.windows(split, length)
        if index < 0 or rows < 1:
            raise DataError(
                f"batch {index} of {rows} rows was asked for; index starts at 0 and rows at 1."
            )
        out = np.empty((rows, length + 1), np.int64)
        chosen = sample_windows(index * rows, rows, windows=windows, seed=seed)
        for row, window in enumerate(chosen):
            out[row] = source[window * length : window * length + length + 1]
        return torch.from_numpy(out)

    def _source(self, split: str) -> TokenSource:
        if split not in ("train", "val"):
            raise DataError(f"there is no split {split!r}; the splits are 'train' and 'val'.")
        return self.train if split == "train" else self.val


def open_data(config: DataConfig, cache: Path | str) -> Data:
    """Tokenize, split and memory-map the corpus of `config`; what `cache` holds is reused.

    Several processes may open one corpus at once.
    Raises DataError, naming file and cure, for anything that cannot be read.
    """
    cache = Path(cache)
    listing = list_files(config.source)
    for path in listing.skipped:
        log.warning("%s begins like a binary file and is skipped", path)
    if listing.files[0].kind == "tokens":
        stored = store_tokens(config, listing.files, cache)
    elif config.vocab:
        raise DataError(
            f"data.vocab is {config.vocab}, and {listing.files[0].path} is text: its tokenizer "
            "says the vocabulary. Leave data.vocab out."
        )
    else:
        stored = store_text(config, listing.files, cache)
    return _data(config, listing, stored)


def _data(config: DataConfig, listing: Listing, stored: Stored) -> Data:
    train_ranges, val_ranges, how = _split(config, stored)
    if config.max_tokens:
        train_ranges = first_tokens(train_ranges, config.max_tokens)
    train = TokenSource(stored.arrays, train_ranges)
    val = TokenSource(stored.arrays, val_ranges)
    for name, source in (("training", train), ("held-out", val)):
        if len(source) < 2:
            raise DataError(
                f"the sources {list(config.source)} leave {len(source)} {name} tokens, and one "
                "window needs at least 2. Give more text, or change data.val_fraction."
            )
    digest = _digest(stored, train_ranges, val_ranges)
    facts = {
        "source": list(config.source),
        "files": len(listing.files),
        "skipped": list(listing.skipped),
        "tokens": sum(map(len, stored.arrays)),
        "train_tokens": len(train),
        "val_tokens": len(val),
        "vocab": stored.vocab,
        "split": how,
        "digest": digest,
        **stored.facts,
    }
    return Data(stored.vocab, digest, train, val, facts)


def _split(config: DataConfig, stored: Stored) -> tuple[np.ndarray, np.ndarray, str]:
    if stored.ends is not None and stored.held_out is not None:
        held = stored.held_out
        how = (
            f"by document: {int(held.sum())} of {len(held)} documents are held out, "
            f"by a hash with seed {config.seed}"
        )
        return document_ranges(stored.ends, ~held), document_ranges(stored.ends, held), how
    total = sum(map(len, stored.arrays))
    cut = total - math.ceil(total * config.val_fraction)
    why = (
        "the token files mark no documents"
        if stored.ends is None
        else "no whole documents come near that share"
    )
    how = f"by position: the last {config.val_fraction:.2%} of the tokens are held out ({why})"
    return np.array([[0, cut]]), np.array([[cut, total]]), how


def _digest(stored: Stored, train: np.ndarray, val: np.ndarray) -> str:
    digest = hashlib.sha256()
    said = [stored.sha256, stored.vocab, stored.facts["tokenizer"]["sha256"], len(train)]
    digest.update(json.dumps(said).encode())
    for ranges in (train, val):
        digest.update(np.ascontiguousarray(ranges, "<i8").tobytes())
    return digest.hexdigest()
