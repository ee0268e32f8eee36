"""Averages of correlated series, with honest uncertainties."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """An average, its 95 % half-width, and how many independent values it is worth."""

    value: float
    half_width: float
    count: int
    effective: float


def autocorrelation_time(series: np.ndarray) -> float:
    """How many consecutive values carry the information of one independent value; at least 1.

    Geyer's initial positive sequence: autocorrelations are summed in neighboring pairs until a
    pair is no longer positive. A trend counts as correlation.
    """
    n = len(series)
    centered = series - series.mean() if n else series
    variance = float(centered @ centered)
    if n < 2 or variance == 0.0:
        return 1.0
    full = np.correlate(centered, centered, mode="full")[n - 1 :] / variance
    time = 1.0 + 2.0 * float(full[1])
    for k in range(2, n - 1, 2):
        pair = float(full[k] + full[k + 1])
        if pair <= 0:
            break
        time += 2.0 * pair
    return min(float(n), max(1.0, time))


def mean(series: np.ndarray) -> Mean:
    """Average of a correlated series; the half-width is inf if it is worth less than two values."""
    n = len(series)
    if n == 0:
        return Mean(math.nan, math.inf, 0, 0.0)
    effective = n / autocorrelation_time(series)
    if effective < 2:
        return Mean(float(series.mean()), math.inf, n, effective)
    error = float(series.std(ddof=1)) / math.sqrt(effective)
    return Mean(float(series.mean()), student(effective - 1) * error, n, effective)


def student(freedom: float) -> float:
    """The 97.5 % point of Student's t, by its expansion around the normal; within 6 % from 2 on."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered moving average; near the ends over the part of the window that exists."""
    first, stop = _windows(len(values), window)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    return (sums[stop] - sums[first]) / (stop - first)


def band(values: np.ndarray, window: int) -> np.ndarray:
    """95 % half-width of `smooth(values, window)` from the scatter within each window."""
    residual = values - smooth(values, window)
    scatter = np.sqrt(np.maximum(smooth(residual**2, max(window, 25)), 0.0))
    first, stop = _windows(len(values), window)
    effective = np.maximum((stop - first) / autocorrelation_time(residual), 1.0)
    return 1.959964 * scatter / np.sqrt(effective)


def _windows(n: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(n)
    return np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, n)
