"""Fewer bits, narrower windows: which learning rates still train, and whose logits turn sharp.

Set-up. `halfulp.sweep`: byte-level Llama of 0.13 M parameters on the Python standard library, 240
steps of 512 tokens, rates 2^-12 … 2^-4 by octaves, 3 seeds paired by weights and data, validation
on 32 768 held-out tokens in the recipe's arithmetic, all linears quantized in all three GEMMs, the
head included. A rate is inside the window when its mean over seeds is at most 2% above fp32's
lowest mean; edges are interpolated in log2 of the rate, and a window that reaches the end of the
grid is at least as wide as it says. φ is the sharpness of the held-out logits (arXiv:1609.04836's
metric in the space of the logits, ε = 5e-4, all tokens, closed form) at the end of the run.
Intervals of windows are bootstraps over 3 seeds and therefore too narrow; those of ratios are
Student's on log ratios. The gates were set on another tiny model, byte-level GPT at lr 3e-3.
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reproduce.bit_reduction import CURRENT
from reproduce.common import Interval, Result, interval, judge, show, together
from reproduce.runs import LENGTH, PRESET, ROWS, STEPS, policy

if TYPE_CHECKING:
    from halfulp.sweep.result import Result as Run
    from halfulp.sweep.table import Table

KEEPS_RUNS = True
PAPER, PROXIES = "arXiv:2405.18710", "arXiv:2309.14322"
RATES = tuple(2.0**k for k in range(-12, -3))
SLOW, FAST = 2.0**-8, 2.0**-5  # about 3e-3 and 3e-2, where the gates were set
RECIPES = {  # label → policy file
    "fp32": policy("fp32"),
    "current": policy("fp32", head=True, lines=CURRENT),
    "unscaled": policy("fp8_unscaled", head=True),
    "e8m1": policy("mask_e8m1_nearest", head=True),
    "e6m7": policy("mask_e6m7", head=True),
    "e5m7": policy("mask_e5m7", head=True),
}


def claims() -> Iterator[Result]:
    """B3 and B4 of the bit-reduction study."""
    table = measured()
    yield _window_claim(table, "unscaled", below=-1.0)
    yield _window_claim(table, "current", above=-0.5, below=0.5)
    yield _spike_claim(table)
    yield _ratio_claim(table, "unscaled", SLOW, above=1.8)
    yield _ratio_claim(table, "current", SLOW, below=1.3)
    yield _ratio_claim(table, "e5m7", SLOW, above=3.0)
    yield _ratio_claim(table, "e6m7", SLOW, above=0.9, below=1.1)
    yield _hidden_claim(table)


def measured() -> "Table":
    """The sweep of all recipes, in the user's cache; an interrupted one goes on."""
    from halfulp.numerics.kernel import cache_directory
    from halfulp.sweep.design import make_design
    from halfulp.sweep.run import run_design
    from halfulp.train.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{label}.toml" for label in RECIPES]
        for file, text in zip(files, RECIPES.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        design = make_design(load_config(_config()), recipes=list(map(str, files)), lrs=RATES)
    path = cache_directory() / "reproduce" / f"lr_window-{design.digest()[:12]}"
    return run_design(design, path, jobs=2, command=("reproduce",), on_event=_say)


def _config() -> dict[str, Any]:
    train = {"steps": STEPS, "rows": ROWS, "eval_every": 0, "eval_batches": 64, "count_every": 0}
    train |= {"checkpoint_every": 0, "device": "cpu", "threads": 1}
    return {
        "model": {"preset": PRESET},
        "data": {"length": LENGTH},
        "train": train,
        "sharpness": {"every": 0},
    }


def _say(event: Mapping[str, Any]) -> None:
    if event["event"] == "result":
        loss, seconds = event["loss_nats"], event["wall_seconds"]
        print(f"  {event['id']}: {event['status']} {loss:.3f} ({seconds:.0f} s)", file=sys.stderr)


def _runs(table: "Table", label: str, lr: float) -> list["Run"]:
    """The runs of one recipe at one rate, by seed."""
    found = [r for r in table.results if r.recipe == f"{label}.toml" and r.lr == lr]
    return sorted(found, key=lambda r: r.seed)


def _window_claim(
    table: "Table", label: str, *, above: float = -math.inf, below: float = math.inf
) -> Result:
    one, other = _widths(table, label), _widths(table, "fp32")
    change = interval([a - b for a, b in zip(one, other, strict=True)])
    gate = (
        f"at least {-below:g} octave narrower than"
        if above == -math.inf
        else f"within {below:g} octaves of"
    )
    rows = [table.row(f"{name}.toml").window for name in (label, "fp32")]
    return Result(
        f"The window of {label} is {gate} fp32's",
        PAPER,
        f"{change.text('+.2f')} octaves ({change.n} seeds, each with its own windows); of the mean "
        f"curves: {label} {rows[0]}, fp32 {rows[1]}",
        judge(change, above=above, below=below),
    )


def _widths(table: "Table", label: str) -> list[float]:
    """Octaves of the window, for each seed alone."""
    from halfulp.sweep.window import window

    one, fp32 = _losses(table, label), _losses(table, "fp32")
    found = [window(one[:, [s]], fp32[:, [s]], np.array(RATES)) for s in range(one.shape[1])]
    return [w.octaves for w in found if w is not None]


def _losses(table: "Table", label: str) -> np.ndarray:
    """Held-out losses [rates, seeds]; a run that failed counts with its first loss."""
    return np.array([[_capped(run) for run in _runs(table, label, lr)] for lr in RATES])


def _capped(run: "Run") -> float:
    return run.loss_nats if run.loss_nats < run.initial_nats else run.initial_nats


def _spike_claim(table: "Table") -> Result:
    """OLMo's rule on short runs: steps after the first 128."""
    names = ("unscaled", "e5m7", "e8m1", "current")
    gaps = {name: _spikes(table, name) for name in names}
    return Result(
        "Fewer bits have more spikes: a larger share of steps beyond 6 σ of the last 128 than fp32 "
        "(mean over all rates), without scales",
        PAPER,
        "; ".join(f"{name} {gap.text('+.2%')}" for name, gap in gaps.items()),
        together(*(judge(gaps[name], above=0.0) for name in ("unscaled", "e5m7"))),
    )


def _spikes(table: "Table", label: str) -> Interval:
    """Share of spikes above fp32's, paired by seed."""
    shares = [
        [sum(_share(r) for lr in RATES for r in _runs(table, name, lr) if r.seed == seed)
         for name in (label, "fp32")]
        for seed in table.seeds
    ]  # fmt: skip
    return interval([(a - b) / len(RATES) for a, b in shares])


def _share(run: "Run") -> float:
    share = run.spikes.get("olmo_core", math.nan)
    return 1.0 if math.isnan(share) else share  # a run that broke off is nothing but spikes


def _ratio_claim(
    table: "Table", label: str, lr: float, *, above: float = -math.inf, below: float = math.inf
) -> Result:
    ratio = _ratio(table, label, lr)
    bounds = [f"at least {above:g}"] * (above > -math.inf) + [f"at most {below:g}"] * (
        below < math.inf
    )
    return Result(
        f"φ of {label} is {' and '.join(bounds)} × that of fp32, lr 2^{math.log2(lr):.0f}",
        PAPER,
        f"{ratio.text('.2f')} × ({ratio.n} seeds)",
        judge(ratio, above=above, below=below),
    )


def _ratio(table: "Table", label: str, lr: float) -> Interval:
    """φ against fp32's of the same seed: geometric mean with Student's interval of the log."""
    low, high = _runs(table, label, lr), _runs(table, "fp32", lr)
    logs = [math.log(a.sharpness / b.sharpness) for a, b in zip(low, high, strict=True)]
    found = interval(logs)
    return Interval(*map(math.exp, (found.mean, found.low, found.high)), found.n)


def _hidden_claim(table: "Table") -> Result:
    low, high = _runs(table, "e8m1", FAST), _runs(table, "fp32", FAST)
    gap = interval([a.loss_nats - b.loss_nats for a, b in zip(low, high, strict=True)])
    ratio = _ratio(table, "e8m1", FAST)
    return Result(
        "φ shows what the loss does not: E8M1 rounded to nearest is within 0.05 nats of fp32 and "
        f"its φ at least 2 × as high, lr 2^{math.log2(FAST):.0f}",
        PAPER,
        f"loss {gap} nats, φ {ratio.text('.2f')} × ({gap.n} seeds)",
        together(judge(gap, below=0.05), judge(ratio, above=2.0)),
    )


if __name__ == "__main__":
    show(claims())
