"""Keys of whole sequences of symbols, as lines and documents are, each as if it were an n-gram."""

import ctypes
from typing import NamedTuple

import numpy as np

from halfulp.corpus import native
from halfulp.corpus.keys import BASE, Block, join, powers, prefix, unsigned


class Spans(NamedTuple):
    """Sequences that ended: their `keys`, the `pieces` in which they ended, symbols in each [n]."""

    keys: np.ndarray
    pieces: np.ndarray
    lengths: np.ndarray


def spans(
    symbols: np.ndarray, ends: np.ndarray, pieces: np.ndarray, begun: tuple[int, int]
) -> tuple[Spans, tuple[int, int]]:
    """The spans up to each of `ends` that hold a symbol, and what is open after them.

    `begun` and the second value: key and symbols of the span that is open before and after.
    """
    bounds = np.concatenate([[0], ends, [len(symbols)]])
    keys = span_keys(symbols, bounds[:-1], bounds[1:])
    lengths = np.diff(bounds)
    keys[0] = join(begun[0], int(keys[0]), int(lengths[0]))
    lengths[0] += begun[1]
    filled = np.flatnonzero(lengths[:-1])
    open_ = (int(keys[-1]), int(lengths[-1]))
    return Spans(keys[filled], pieces[filled], lengths[filled]), open_


def span_keys(symbols: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Keys of the spans symbols[starts[i]:ends[i]], as if each were an n-gram; 0 for an empty one.

    Needs 32 bytes of memory per symbol: give stretches, and join the keys of a cut span.
    """
    block = Block(unsigned(symbols), 0, np.zeros(1, np.int64))
    sums = _prefix(block)
    return sums[ends] - sums[starts] * _power(ends - starts)


def _power(exponents: np.ndarray) -> np.ndarray:
    """BASE^exponents mod 2^64, for exponents below 2^28."""
    low, high = powers(BASE, 1 << 14), powers(pow(BASE, 1 << 14, 1 << 64), 1 << 14)
    return low[exponents & (1 << 14) - 1] * high[exponents >> 14]


def _prefix(block: Block) -> np.ndarray:
    library, _ = native.status()
    if library is None:
        return prefix(block)
    sums = np.empty(len(block.tokens) + 1, np.uint64)
    orders = np.empty(0, np.int64)
    job = native.Job(*native.described(block, orders, False), 0, None, None, sums.ctypes.data)
    library.halfulp_prefix(ctypes.byref(job))
    return sums
