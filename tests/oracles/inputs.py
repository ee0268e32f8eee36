"""Values chosen to hurt: ties, subnormals, overflow, NaN payloads, every short bit pattern."""

from functools import cache

import numpy as np

from oracles.grids import values

NAN_PATTERNS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0x7F802000, 0x7F810000)
DATA_KINDS = (
    "normal", "wide", "lognormal", "below_power_of_two", "subnormal", "random_bits", "nan_inf",
)  # fmt: skip


def from_bits(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


@cache
def common() -> np.ndarray:
    """All bf16 and fp16 patterns, random patterns, powers of two ± 1 ulp, specials."""
    halves = np.arange(2**16, dtype=np.uint32)
    random = np.random.default_rng(1).integers(0, 2**32, 2**16, dtype=np.uint32)
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32).view(np.uint32)
    near = (powers[:, None] + np.arange(-1, 2).astype(np.uint32)).ravel()
    specials = np.array([0, 0x7F800000, 0x7F7FFFFF, *NAN_PATTERNS], np.uint32)
    patterns = np.concatenate([halves << 16, random, near, specials])
    patterns = np.concatenate([patterns, patterns ^ np.uint32(1 << 31)])
    fp16 = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    return np.concatenate([patterns.view(np.float32), fp16])


def around_grid(name: str) -> np.ndarray:
    """Every value, midpoint and quarter point of a format, ± 0, 1, 2 fp32 ulp, both signs."""
    grid = values(name)
    gap = np.append(np.diff(grid), grid[-1] - grid[-2])
    points = np.concatenate([grid + gap * share for share in (0, 0.25, 0.5, 0.75)])
    with np.errstate(all="ignore"):
        bits = points.astype(np.float32).view(np.uint32)
    near = (bits.astype(np.int64)[:, None] + np.arange(-2, 3)).clip(0, 0x7FFFFFFF).ravel()
    near = near.astype(np.uint32)
    return np.concatenate([near, near ^ np.uint32(1 << 31)]).view(np.float32)


@cache
def adversarial(name: str) -> np.ndarray:
    """The set on which a rounding routine must be bit-exact (0.3 to 1 million values)."""
    return np.concatenate([common(), around_grid(name)])


def mixture(n: int, seed: int = 0) -> np.ndarray:
    """`n` values of all sizes: three quarters within 2^±12 of 1, the rest any bit pattern."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * np.exp2(rng.uniform(-12, 12, n))).astype(np.float32)
    x[::4] = rng.integers(0, 2**32, len(x[::4]), dtype=np.uint32).view(np.float32)
    return x


def data(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """fp32 [rows, columns] of one of `DATA_KINDS`."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns)
    x = rng.standard_normal(shape)
    if kind == "wide":
        x *= np.exp2(rng.integers(-60, 60, shape))
    if kind == "lognormal":
        x = np.exp(3 * x) * rng.choice([-1, 1], shape)
    if kind == "below_power_of_two":
        x = (1 - rng.integers(1, 4, shape) * 2.0**-24) * np.exp2(rng.integers(-3, 1, shape))
        x *= np.exp2(rng.integers(-40, 40, (rows, 1)))
    if kind == "subnormal":
        x = rng.integers(-(2**12), 2**12, shape) * 2.0**-149
        x[::2] *= 2.0**14
    if kind == "random_bits":
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
        x = np.where(bits & 0x7F800000 == 0x7F800000, bits & 0x3FFFFFFF, bits)
        x = x.astype(np.uint32).view(np.float32)
    if kind == "nan_inf":
        x[rng.random(shape) < 0.005] = np.nan
        x[rng.random(shape) < 0.005] = -np.inf
    x = x.astype(np.float32)
    x[-1, : columns // 2] = 0.0
    return x
