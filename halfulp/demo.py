"""Six runs of one small model that differ in precision only: the effects, on a bare machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfulp.errors import HalfulpError, RunError
from halfulp.train.config import TrainConfig, load_config
from halfulp.train.loop import Summary, train
from halfulp.train.open import free_directory

RECIPES = ("fp32", "bf16_weights", "bf16_weights_sr", "te_current", "fp8_unscaled", "nvfp4_all")


@dataclass(frozen=True)
class DemoRun:
    """One run of the demo; `failure` says why there is no summary."""

    recipe: str
    path: Path
    summary: Summary | None
    failure: str = ""


@dataclass(frozen=True)
class Demo:
    """The runs in the order of RECIPES, fp32 first, and the report that compares them."""

    path: Path
    runs: tuple[DemoRun, ...]
    report: Path | None
    interrupted: bool


def config_of_demo(*, quick: bool) -> TrainConfig:
    """What the six runs share: everything but the recipe and the directory."""
    steps = 60 if quick else 300
    return load_config(
        {
            "model": {"preset": "llama-tiny" if quick else "llama-demo"},
            "data": {"length": 128, "max_tokens": 4_000_000},
            "train": {
                "steps": steps,
                "rows": 4 if quick else 8,
                "lr": 3e-4,
                "warmup": 0.05,
                "eval_every": steps // 4,
                "eval_batches": 4 if quick else 8,
                "checkpoint_every": 0,
                "keep": 1,
                "count_every": steps // 10,
            },
            "guard": {"on": False},  # it would make the precisions alike
        }
    )


def demo(
    out: Path | None = None,
    *,
    quick: bool = False,
    force: bool = False,
    on_run: Callable[[str, int], None] | None = None,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
) -> Demo:
    """Train the six runs one after the other and write `report.html` beside them.

    `out` None makes a directory runs/demo-001, with the first free number. `on_run` receives the
    recipe and the number of steps before each run, `on_event` the events of the run.
    A run that fails is a result: the others go on. RunError if `out` is in use and `force` is not
    given. Ctrl-C ends the demo after the present step.
    """
    from halfulp.report import write_report

    path = free_directory(Path("runs"), "demo") if out is None else out
    if path.exists() and not (path.is_dir() and not any(path.iterdir())) and not force:
        raise RunError(f"{path} is in use. Give another --out, or --force to replace the demo.")
    config = config_of_demo(quick=quick)
    runs: list[DemoRun] = []
    for recipe in RECIPES:
        if on_run is not None:
            on_run(recipe, config.train.steps)
        runs.append(_one_run(config, recipe, path / recipe, force, on_event))
        if (summary := runs[-1].summary) is not None and summary.reason == "interrupted":
            return Demo(path, tuple(runs), None, interrupted=True)
    there = [run.path for run in runs if (run.path / "config.toml").exists()]
    report = write_report(there, path / "report.html", title="halfulp demo", force=force)
    return Demo(path, tuple(runs), report, interrupted=False)


def _one_run(
    config: TrainConfig,
    recipe: str,
    path: Path,
    force: bool,
    on_event: Callable[[Mapping[str, Any]], None] | None,
) -> DemoRun:
    config = replace(
        config,
        policy=replace(config.policy, recipe=recipe),
        run=replace(config.run, out=str(path)),
    )
    command = ("halfulp", "demo")
    try:
        summary = train(config, force=force, command=command, on_event=on_event)
    except HalfulpError as error:
        if recipe == RECIPES[0]:
            raise  # nothing to compare with: the machine or the data is at fault
        return DemoRun(recipe, path, None, str(error))
    return DemoRun(recipe, path, summary)
