"""A recipe that fails by itself, and the same run with the guard on.

Set-up. Byte-level Llama of 6 layers and 64 channels (0.35 M parameters) on the Python standard
library, 600 steps of 1024 tokens, cosine to a tenth of the rate, counters every 25 steps, all else
of the guard at its defaults; 3 seeds, losses on held-out text in the arithmetic that the run ended
with, paired by seed with bf16_amp. Blocks raised: the share of the blocks with a GEMM that ended
above the recipe they began with. `fp8_unscaled` multiplies E4M3 and E5M2 without a scale;
`nvfp4_all` is NVFP4 in every linear. The rate is one that suits bf16.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from reproduce.common import Result, difference, interval, judge, together

SOURCE = "arXiv:2405.18710: low precision pays only if it is as stable"
SEEDS, STEPS, LR, WORKERS = range(3), 600, 0.01, 2
RECIPES = ("fp8_unscaled", "nvfp4_all")
REFERENCE = "bf16_amp"
DIVERGED, CLOSE, RAISED = 0.5, 0.05, 0.3  # nats, nats, share of the blocks


@dataclass(frozen=True)
class Run:
    """One training run."""

    recipe: str
    guarded: bool
    seed: int


@dataclass(frozen=True)
class Ended:
    """How a run ended; `incidents` says what the guard did, step by step."""

    loss_nats: float
    raised: float
    high: float  # share raised to 16 bits or more
    incidents: tuple[str, ...] = ()
    spent: float = 0.0  # steps withheld, replayed and passes of attribution


def claims() -> Iterator[Result]:
    """Three claims for each recipe."""
    runs = [Run(REFERENCE, False, seed) for seed in SEEDS]
    runs += [Run(r, guarded, seed) for r in RECIPES for guarded in (False, True) for seed in SEEDS]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        ended = dict(zip(runs, pool.map(_train, runs), strict=True))
    reference = [ended[Run(REFERENCE, False, seed)] for seed in SEEDS]
    for recipe in RECIPES:
        alone, guarded = ([ended[Run(recipe, on, seed)] for seed in SEEDS] for on in (False, True))
        yield _alone(recipe, alone, reference)
        yield _guarded(recipe, guarded, reference)
        yield _raised(recipe, guarded)


def _alone(recipe: str, runs: list[Ended], reference: list[Ended]) -> Result:
    gap = _gap(runs, reference)
    return Result(
        f"{recipe} without the guard diverges (gate: at least {DIVERGED:g} nats above bf16)",
        SOURCE,
        f"{gap} nats",
        judge(gap, above=DIVERGED),
    )


def _guarded(recipe: str, runs: list[Ended], reference: list[Ended]) -> Result:
    gap = _gap(runs, reference)
    spent = interval([run.spent / STEPS for run in runs])
    return Result(
        f"{recipe} with the guard ends within {CLOSE:g} nats of bf16",
        SOURCE,
        f"{gap} nats, for {spent.text('.1%')} of the run's tokens more; {_told(runs)}",
        judge(gap, below=CLOSE),
    )


def _raised(recipe: str, runs: list[Ended]) -> Result:
    shares = [run.raised for run in runs]
    verdict = together(*(judge(interval([s, s]), below=RAISED) for s in shares))
    return Result(
        f"and raises at most {RAISED:.0%} of the blocks",
        SOURCE,
        f"seed by seed {', '.join(f'{share:.0%}' for share in shares)}; to 16 bits or more: "
        f"{', '.join(f'{run.high:.0%}' for run in runs)}",
        verdict,
    )


def _gap(runs: list[Ended], reference: list[Ended]):
    return difference([r.loss_nats for r in runs], [r.loss_nats for r in reference])


def _told(runs: list[Ended]) -> str:
    """What the guard did in the run with the median number of incidents."""
    middle = sorted(runs, key=lambda run: len(run.incidents))[len(runs) // 2]
    counts = statistics.fmean(len(run.incidents) for run in runs)
    return f"{counts:.1f} incidents a run, for example: {'; '.join(middle.incidents) or 'none'}"


def _train(run: Run) -> Ended:
    """In a process of its own."""
    from halfulp.errors import NonFiniteError, StoppedError
    from halfulp.train.config import load_config
    from halfulp.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        config = load_config(_config(run, path))
        try:
            loss = train(config).loss_nats
        except (NonFiniteError, StoppedError):
            loss = float("nan")
        events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
        summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    guard = summary.get("guard", {})
    spent = sum(guard.get(key, 0.0) for key in ("withheld", "replayed", "passes", "shadows"))
    told = [
        f"step {e['step']}, {e['trigger']}, {e['verdict']}: {', '.join(e['done'])}"
        for e in events
        if e["event"] == "guard"
    ]
    raised, high = _shares(run, guard.get("map", {}))
    return Ended(loss, raised, high, tuple(told), spent)


def _shares(run: Run, ended: dict[str, str]) -> tuple[float, float]:
    """Of the blocks with a GEMM: raised at all, and raised to 16 bits or more."""
    with_gemm = [r for b, r in ended.items() if b.rpartition(".")[2] not in ("norm", "emb")]
    raised = [recipe for recipe in with_gemm if recipe != run.recipe]
    high = [recipe for recipe in raised if recipe in (REFERENCE, "fp32")]
    return len(raised) / max(1, len(with_gemm)), len(high) / max(1, len(with_gemm))


def _config(run: Run, path: Path) -> dict[str, Any]:
    return {
        "model": {"preset": "llama-tiny", "layers": 6},
        "data": {"tokenizer": "bytes", "length": 64, "max_tokens": 4_000_000},
        "train": {
            "steps": STEPS,
            "rows": 16,
            "lr": LR,
            "seed": run.seed,
            "eval_every": 0,
            "eval_batches": 32,
            "checkpoint_every": 0,
            "count_every": 25,
            "threads": 1,
            "device": "cpu",
        },
        "sharpness": {"every": 0},
        "policy": {"recipe": run.recipe},
        "guard": {"on": run.guarded},
        "run": {"out": str(path)},
    }
