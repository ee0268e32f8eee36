"""fit.json: a law fitted to one's own runs, with what a plan needs to know of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfulp.errors import PlanError
from halfulp.plan.bootstrap import Bootstrap, bootstrap
from halfulp.plan.fit import COEFFICIENTS, Fit, fit
from halfulp.plan.run_directories import read_runs

_LEAST, _MOST = 1e-30, 1e30


def fit_file(path: Path, *, draws: int = 1000) -> dict[str, Any]:
    """The content of the fit.json of a table of runs, with the band of `draws` resamples.

    Raises PlanError as `fit` and `bootstrap` do.
    """
    found = fit(read_runs([path]))
    return content(found, bootstrap(found, draws), source=path.name)


def content(found: Fit, boot: Bootstrap | None, *, source: str) -> dict[str, Any]:
    """The fields of fit.json: coefficients, resampled ones, ranges, runs; losses in nats/token."""
    runs = found.runs
    columns = {"N": runs.parameters, "D": runs.tokens, "C": runs.flops}
    return {
        "kind": "fit",
        "formula": "L = E + A/N^alpha + B/D^beta",
        "coefficients": {name: getattr(found.law, name) for name in COEFFICIENTS},
        "draws": [] if boot is None else boot.draws.tolist(),
        "ranges": {name: [float(c.min()), float(c.max())] for name, c in columns.items()},
        "runs": len(runs),
        "spread": found.spread,
        "source": source,
        "notes": list(runs.notes),
        "table": [
            {"N": n, "D": d, "loss_nats": loss, "residual": off}
            for n, d, loss, off in zip(
                runs.parameters.tolist(), runs.tokens.tolist(), runs.loss_nats.tolist(),
                found.residuals.tolist(), strict=True,
            )
        ],
    }  # fmt: skip


def read_fit(path: Path) -> dict[str, Any]:
    """What `halfulp plan fit -o` wrote; PlanError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != "fit":
            raise ValueError(f"kind is {found['kind']!r}")
        _check_numbers([found["coefficients"][name] for name in COEFFICIENTS])
        for draw in found["draws"]:
            _check_numbers(draw)
            if len(draw) != len(COEFFICIENTS):
                raise ValueError("a resample has not five coefficients")
        for name in ("N", "D", "C"):
            low, high = found["ranges"][name]
            _check_numbers([low, high])
            if low > high:
                raise ValueError(f"the range of {name} ends below its beginning")
        if type(found["runs"]) is not int or not isinstance(found.get("notes", []), list):
            raise ValueError("runs is no whole number, or notes are no list")
    except FileNotFoundError as error:
        raise PlanError(
            f"the fit {path} does not exist. Make it with: halfulp plan fit runs.csv -o {path}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(
            f"{path} is no fit of `halfulp plan fit -o`: {type(error).__name__}: {error}. "
            "Fit the runs again."
        ) from error
    return found


def _check_numbers(values: Sequence[float]) -> None:
    """Coefficients and ranges of any law are far inside these limits; powers of them must be."""
    for value in values:
        if isinstance(value, bool) or not _LEAST < value < _MOST:
            raise ValueError(f"{value!r} is no number between {_LEAST:g} and {_MOST:g}")
