"""64-bit keys of n-grams: blocks of tokens in, one key for every n-gram inside a document.

The key of tokens t_1 … t_n is Σ m(t_j) · B^(n−j) mod 2^64, where m mixes and B is odd. With
P_i the key of the first i tokens, the key of the n-gram that ends at i is P_i − P_(i−n) · B^n: one
pass serves every n (Karp and Rabin 1987, with wraparound for the modulus). And as B is odd, P is a
running sum: P_i = B^i · Σ_(k≤i) m(t_k) · B^(−k).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from halfulp.corpus import murmur
from halfulp.errors import DataError

BASE = 0xD1342543DE82EF95
OFFSET = 0x9E3779B97F4A7C15  # m(t) is the finalizer of t + OFFSET: it would map 0 to 0
BLOCK = 1 << 14  # tokens: the work arrays of one block stay in a core's own cache
MOST = 1024  # longest n-gram
_TILE = BLOCK
NEW_DOCUMENT = (0,)


@dataclass(frozen=True)
class Block:
    """Some tokens with the context before them.

    `tokens` [context + fresh], unsigned. `starts` [documents]: positions in `tokens` where
    documents begin, ascending; the first is at or before 0 where its document began earlier.
    """

    tokens: np.ndarray
    context: int
    starts: np.ndarray

    def inside(self, ends: np.ndarray, n: int | np.ndarray, *, apart: bool = False) -> np.ndarray:
        """Which n-grams that end at `ends` lie in one document (mask).

        `apart`: and begin at a multiple of n in it.
        """
        length = ends - self._begins[ends] + 1
        return (length >= n) & (length % n == 0) if apart else length >= n

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        """Where the document of each token begins; of those before the first start: there."""
        edges = np.concatenate(([0], np.maximum(self.starts[1:], 0), [len(self.tokens)]))
        return np.repeat(self.starts, np.diff(edges))

    def count(self, orders: Sequence[int], *, apart: bool = False) -> list[int]:
        """How many n-grams of each n end in the fresh tokens and lie in one document."""
        n = np.asarray(orders)[:, None]
        before = np.maximum(self.context - self.starts, 0)
        after = np.append(self.starts[1:], len(self.tokens)) - self.starts
        if apart:
            new = after // n - before // n
        else:
            new = np.maximum(after - n + 1, 0) - np.maximum(before - n + 1, 0)
        return np.maximum(new, 0).sum(axis=1).tolist()


class Stream:
    """Tokens in, blocks out; carries the context that the next call's first n-grams need.

    `tokens` counts the tokens taken and `documents` the documents begun.
    """

    def __init__(self, longest: int) -> None:
        self.tokens = 0
        self.documents = 0
        self._room = longest - 1
        self._context = np.empty(0, np.uint8)
        self._begun = 0  # tokens of the open document so far
        self._is_open = False

    def go_on(self, tokens: np.ndarray, begun: int) -> None:
        """Begin inside a document, with the last of its `begun` tokens so far; none is counted."""
        tokens = unsigned(tokens)
        self._context = tokens[max(0, len(tokens) - self._room) :].copy()
        self._begun, self._is_open = begun, True

    def blocks(
        self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray, *, size: int = BLOCK
    ) -> Iterator[Block]:
        """Blocks of at most `size` fresh tokens; `starts` are positions where documents begin.

        Tokens before the first start go on with the document of the call before.
        """
        tokens = unsigned(tokens)
        starts = self._checked(len(tokens), starts)
        for at in range(0, len(tokens), size):
            fresh = tokens[at : at + size]
            lo, hi = np.searchsorted(starts, (at, at + len(fresh)))
            yield self._block(fresh, starts[lo:hi] - at)
        # A document without tokens, after the last token.
        self._open(int(len(starts) - np.searchsorted(starts, len(tokens))))

    def _checked(self, count: int, starts: Sequence[int] | np.ndarray) -> np.ndarray:
        found = np.asarray(starts, np.int64)
        if len(found) and (found[0] < 0 or found[-1] > count or (np.diff(found) < 0).any()):
            raise DataError(
                f"document starts must ascend within 0 … {count}; they run from {found[0]} to "
                f"{found[-1]}. Give positions in this call's tokens."
            )
        if not self._is_open and count and (len(found) == 0 or found[0] > 0):
            raise DataError(
                "the first tokens belong to no document. The first call must have 0 in starts."
            )
        return found

    def _open(self, documents: int) -> None:
        if documents:
            self.documents += documents
            self._begun, self._is_open = 0, True

    def _block(self, fresh: np.ndarray, starts: np.ndarray) -> Block:
        dtype = np.promote_types(self._context.dtype, fresh.dtype)
        tokens = np.concatenate((self._context, fresh), dtype=dtype)
        context = len(self._context)
        earlier = np.full(int(self._is_open), -self._begun, np.int64)
        self.documents += len(starts)
        self._is_open = True
        self.tokens += len(fresh)
        block = Block(tokens, context, np.concatenate((earlier, starts)) + context)
        self._begun = len(tokens) - int(block.starts[-1])
        self._context = tokens[max(0, len(tokens) - self._room) :].copy()
        return block


def prefix(block: Block, out: np.ndarray | None = None, factor: int = 1) -> np.ndarray:
    """Keys · factor of the first 0, 1, 2 … tokens, [tokens + 1] uint64; `out`: where to write."""
    size = len(block.tokens)
    sums = np.empty(size + 1, np.uint64) if out is None else out[: size + 1]
    sums[0] = 0
    down, up = powers(pow(BASE, -1, 1 << 64), _TILE, factor), powers(BASE, _TILE)
    scratch = np.empty(_TILE, np.uint64)
    for at in range(0, size, _TILE):
        tokens = block.tokens[at : at + _TILE]
        part, room = sums[at + 1 : at + 1 + len(tokens)], len(tokens)
        _mix(tokens, part, scratch[:room])
        np.multiply(part, down[:room], out=part)
        part[:1] += sums[at : at + 1] * np.uint64(BASE)
        np.add.accumulate(part, out=part)
        np.multiply(part, up[:room], out=part)
    return sums


def _mix(tokens: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    if tokens.itemsize <= 2:
        _mixed().take(tokens, out=out, mode="clip")
        return
    np.add(tokens, np.uint64(OFFSET), out=out, dtype=np.uint64)
    murmur.fmix(out, scratch)


@functools.cache
def _mixed() -> np.ndarray:
    """m(t) of the tokens of 16 bits."""
    table = np.arange(1 << 16, dtype=np.uint64) + np.uint64(OFFSET)
    murmur.fmix(table, np.empty_like(table))
    return table


def first_end(block: Block, n: int) -> int:
    """The first position in the block where an n-gram can end."""
    return min(max(n - 1, block.context), len(block.tokens))


def ngram_keys(block: Block, sums: np.ndarray, n: int, out: np.ndarray | None = None) -> np.ndarray:
    """Keys of the n-grams ending at first_end(block, n) and after, documents ignored.

    `sums` from `prefix`; its factor is theirs too. `out` [tokens]: where to write them.
    """
    size, first = len(block.tokens), first_end(block, n)
    out = np.empty(size - first, np.uint64) if out is None else out[: size - first]
    np.multiply(sums[first + 1 - n : size + 1 - n], pow(BASE, n, 1 << 64), out=out)
    return np.subtract(sums[first + 1 :], out, out=out)


def join(left: int, right: int, right_length: int) -> int:
    """Key of the concatenation of two spans, from their keys and the second one's length."""
    return (left * pow(BASE, right_length, 1 << 64) + right) % (1 << 64)


def unsigned(tokens: np.ndarray) -> np.ndarray:
    """`tokens` as a contiguous array of unsigned integers of the same width.

    Raises DataError for another type than integers of 8 to 64 bits in one dimension.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"tokens must be a list of integers; here is an array of {tokens.dtype} with "
            f"{tokens.ndim} dimensions. Give one document's token numbers."
        )
    native = tokens.astype(tokens.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native).view(f"u{tokens.dtype.itemsize}")


@functools.lru_cache(maxsize=8)
def powers(base: int, count: int, first: int = 1) -> np.ndarray:
    """first · base^i mod 2^64 for i < count, read-only."""
    table = np.full(count, base, np.uint64)
    table[0] = first
    np.multiply.accumulate(table, out=table)
    table.flags.writeable = False
    return table
