"""Counter rows as a run records them: counts that add over processes instead of shares.

A row says what a count is out of: `saturated` and `underflow` of a GEMM operand, `asked`,
`lost_decay` and `v_underflow` of a parameter are out of `n`; `unchanged` and `lost_updates` are out
of `asked`. Where zeros do not count (underflow, lost_decay) the count is the share among the
nonzero elements times `n`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_OF_N = ("saturated", "underflow", "asked", "lost_decay", "v_underflow")
_OF_ASKED = ("unchanged", "lost_updates")
_LARGEST = ("amax", "stale")
_ADDED = ("n", "energy", *_OF_N, *_OF_ASKED)


def counts(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` of handle.counters() or optimizer.counters() with its shares as counts."""
    n = int(row["n"])
    of_n = {key: row[key] * n for key in _OF_N if key in row}
    of_asked = {key: row[key] * of_n["asked"] for key in _OF_ASKED if key in row}
    whole = {key: round(value) for key, value in (of_n | of_asked).items()}
    return {**row, "n": n, **whole}


def shares(row: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `counts`."""
    n = max(row["n"], 1)
    of_n = {key: row[key] / n for key in _OF_N if key in row}
    of_asked = {key: row[key] / max(row["asked"], 1) for key in _OF_ASKED if key in row}
    return {**row, **of_n, **of_asked}


def added(parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all processes as one list: counts add, amax and stale are the largest."""
    return [_add(rows) for rows in zip(*parts, strict=True)]


def _add(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = dict(rows[0])
    n = sum(row["n"] for row in rows)
    for key in total:
        values = [row[key] for row in rows]
        if key in _ADDED:
            total[key] = sum(values)
        elif key in _LARGEST:
            total[key] = max(values)
        elif key == "underflow_energy":
            energies = [row["energy"] for row in rows]
            lost = sum(x * energy for x, energy in zip(values, energies, strict=True))
            total[key] = lost / sum(energies) if any(energies) else 0.0
        elif key == "update_rms":
            squares = (row["n"] * row[key] ** 2 for row in rows)
            total[key] = math.sqrt(sum(squares) / max(n, 1))
        elif isinstance(total[key], float):
            total[key] = sum(row["n"] * row[key] for row in rows) / max(n, 1)
    return total
