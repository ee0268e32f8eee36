"""Scaled quantization of a matrix, group by group in a plain loop."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from oracles.grids import F32, Grid, double, floor_log2, grid, round_array

MOST = F32(np.finfo(F32).max)


def groups(shape: tuple[int, int], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """The tiles of a matrix; 0 stands for the whole extent; the last ones may be partial."""
    height, width = (t or s for t, s in zip(tile, shape, strict=True))
    for r in range(0, shape[0], height):
        for c in range(0, shape[1], width):
            yield slice(r, r + height), slice(c, c + width)


def exponent_up(amax: float, largest: float) -> int:
    """The least E ≥ −127 with amax ≤ largest · 2^E."""
    ratio = Fraction(float(amax)) / Fraction(largest)
    e = floor_log2(ratio)
    return max(e if Fraction(2) ** e == ratio else e + 1, -127)


def exponent_floor(amax: float, largest: float) -> int:
    """OCP: floor(log2 amax) − floor(log2 largest), at least −127."""
    top = floor_log2(Fraction(largest))
    return max(floor_log2(Fraction(float(amax))) - top, -127)


def scale_pair(amax: float, g: Grid, rule: str, margin: int = 0) -> tuple[float, float]:
    """(s, 1/s) of a group with this max |x|, each rounded once to fp32 where not exact."""
    if not np.isfinite(amax):
        return np.nan, np.nan
    if amax == 0:
        return 1.0, 1.0
    if rule == "current":
        with np.errstate(all="ignore"):
            s = min(F32(g.largest) / F32(amax) * F32(2.0**-margin), MOST)
        return float(s), float(F32(1) / s)
    e = (exponent_floor if rule == "e8m0_floor" else exponent_up)(amax, g.largest)
    e = min(e + margin, 127)
    return 2.0**-e, 2.0**e


def quantize(
    x: np.ndarray,
    name: str,
    rule: str,
    tile: tuple[int, int],
    *,
    margin: int = 0,
    rounding: str = "nearest",
    words: np.ndarray | None = None,
) -> np.ndarray:
    """fp32 [rows, columns] under `current`, `p2`, `e8m0_up` or `e8m0_floor` scales per tile."""
    g, y = grid(name), np.empty_like(x)
    for at in groups(x.shape, tile):
        amax = np.abs(double(x[at])).max()
        y[at] = given(x[at], g, *scale_pair(amax, g, rule, margin), rounding, _at(words, at))
    return y


def given(
    x: np.ndarray,
    g: Grid,
    s: float,
    inverse: float,
    rounding: str = "nearest",
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Q(x · s) · (1/s), each product rounded once to fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (double(x) * s).astype(F32)
        return (round_array(scaled, g, rounding, True, words) * inverse).astype(F32)


def nvfp4(
    x: np.ndarray,
    tile: tuple[int, int],
    rounding: str = "nearest",
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Transformer Engine's reference formula, in its order of fp32 operations."""
    amax = np.abs(x).max()
    if not np.isfinite(amax):
        return np.full_like(x, np.nan)
    with np.errstate(all="ignore"):
        g = F32(1) if amax == 0 else min(F32(2688) / amax, MOST)
    y, decode, e4m3 = np.empty_like(x), F32(1) / g, grid("e4m3")
    for at in groups(x.shape, tile):
        block_amax = np.abs(x[at]).max()
        block = round_array(np.float64(block_amax * F32(g * F32(1 / 6))), e4m3, saturate=True)
        s = F32(block) * decode
        with np.errstate(over="ignore", divide="ignore"):
            inverse = min(F32(1) / s, MOST)
            scaled = np.clip(x[at] * inverse, F32(-6), F32(6))
        codes = round_array(scaled, grid("e2m1"), rounding, True, _at(words, at))
        y[at] = codes.astype(F32) * s
    return y


def _at(words: np.ndarray | None, at: tuple[slice, slice]) -> np.ndarray | None:
    return None if words is None else words[at]
