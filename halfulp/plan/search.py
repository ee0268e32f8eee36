"""Minima and roots over quantities that span many powers of ten."""

import math
from collections.abc import Callable

_GRID = 97  # points; a minimum is looked for between the neighbors of the best one


def minimize_log(f: Callable[[float], float], low: float, high: float) -> float:
    """The x in [low, high] at which `f` is least, looked for on a grid and then by Brent's method.

    Relative error about 1e-6 where f is smooth: near a minimum f itself cannot tell more.
    """
    from scipy.optimize import minimize_scalar

    step = math.log(high / low) / (_GRID - 1)
    points = [math.log(low) + step * i for i in range(_GRID)]
    best = min(points, key=lambda x: f(math.exp(x)))
    found = minimize_scalar(
        lambda x: f(math.exp(x)), bounds=(best - step, best + step), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    return min(max(math.exp(found.x), low), high)  # pyright: ignore[reportAttributeAccessIssue]


def root_log(f: Callable[[float], float], low: float, high: float) -> float | None:
    """The x in [low, high] at which the monotonic `f` is zero; None where its sign stays."""
    from scipy.optimize import brentq

    a, b = math.log(low), math.log(high)
    if f(low) * f(high) > 0:
        return None
    found = brentq(lambda x: f(math.exp(x)), a, b, xtol=1e-13)
    return math.exp(float(found))  # pyright: ignore[reportArgumentType]
