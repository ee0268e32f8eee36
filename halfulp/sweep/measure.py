"""The numbers of one run directory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.run import Run
from halfulp.sweep.spikes import spike_scores

# Steps that the end of a run is, and that its losses are smoothed over: a share, and the least. The
# smallest of single losses is that of the easiest batch, and would make short runs look diverged.
_TAIL, _LEAST = 0.05, 10
_MOST_TOKENS = 1 << 24  # of which unigrams are counted


def measure(path: Path) -> dict[str, Any]:
    """Fields of Result that the run directory at `path` decides; a run that broke off has fewer.

    * `initial_nats`: training loss of the first step, before any update.
    * `tail_nats`: median of the last 5 % of the training losses, at least 10; `best_nats`: the
      smallest mean of as many consecutive ones.
    * `spikes`: convention → share of the steps (halfulp.sweep.spikes).
    * `sharpness`, `sharpness_centered`, `logz`: of the held-out logits at the last evaluation.
    * `unigram_nats`: entropy of the held-out tokens, which no model without context gets below.

    Steps that a rollback has taken back do not count. RunError, DataError if it cannot be read.
    """
    from halfulp.report.course import course_of

    run = Run.open(path, writer=False)
    summary, events = run.summary(), course_of(run.events()).events
    names = ("steps", "tokens", "parameters", "seconds", "loss_nats", "loss_nats_fp32")
    return {
        **{name: summary[name] for name in names if name in summary},
        "planned_steps": int(run.config()["train"]["steps"]),
        "unigram_nats": unigram_nats(run),
        **_of_steps([event for event in events if event["event"] == "step"]),
        **_of_logits([event for event in events if event["event"] == "eval"]),
    }


def unigram_nats(run: Run) -> float:
    """Entropy in nats/token of the run's held-out tokens (the first 16 M of them)."""
    from halfulp.data import open_data
    from halfulp.numerics.kernel import cache_directory
    from halfulp.train.config import load_config

    data = open_data(load_config(run.config()).data.corpus(), cache_directory() / "data")
    return entropy_nats(np.bincount(data.val[:_MOST_TOKENS]))


def entropy_nats(counts: np.ndarray) -> float:
    """Σ −p ln p of p = counts / Σ counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def tail_and_best(losses: np.ndarray) -> tuple[float, float]:
    """(median of the last losses, smallest mean of as many consecutive ones) [steps ≥ 1]."""
    window = min(len(losses), max(_LEAST, round(_TAIL * len(losses))))
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    best = (sums[window:] - sums[:-window]).min() / window
    return float(np.median(losses[-window:])), float(best)


def _of_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not steps:
        return {}
    losses = np.array([event["loss_nats"] for event in steps], dtype=float)
    norms = np.array([event["grad_norm"] for event in steps], dtype=float)
    tail, best = tail_and_best(losses)
    return {
        "initial_nats": float(losses[0]),
        "tail_nats": tail,
        "best_nats": best,
        "spikes": spike_scores(losses, norms),
    }


def _of_logits(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    state = evaluations[-1].get("logits", {}) if evaluations else {}
    names = ("sharpness", "sharpness_centered", "logz")
    return {name: state.get(name, math.nan) for name in names}
