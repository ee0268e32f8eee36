"""`halfulp sweep`: many runs that differ in recipe, learning rate, seed and data."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfulp.cli.common import command_line, overrides_of, quiet_transformers, words
from halfulp.cli.default_group import DefaultGroup
from halfulp.cli.sweep_progress import SweepProgress
from halfulp.cli.sweep_status import status
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.sweep.design import Design
    from halfulp.sweep.table import Table

sweep = typer.Typer(
    name="sweep",
    help="Train recipe × learning rate × seed, all paired by seed.\n\n"
    "`halfulp sweep run.toml …` is `halfulp sweep run run.toml …`, whose options "
    "`halfulp sweep run --help` lists.",
    cls=DefaultGroup,
    no_args_is_help=True,
)
sweep.command()(status)


@sweep.command("run")
def run(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file as for `halfulp train`; defaults without.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipes, policy files or stages (bf16_amp:0.2+te_current), with commas."
        ),
    ] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rates: 1e-4:1e-1:7 (first:last:how many) or 1e-3,…")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many (default: 3), or which: 0,1,5.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="What the others are compared with (default: the first).")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A data set: NAME=SOURCE[,SOURCE] or SOURCE; may be repeated."),
    ] = None,
    guard: Annotated[bool, typer.Option("--guard", help="Guard the runs.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other option of `halfulp train`; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the sweep (default: sweep).")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep there.")] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Runs at a time (default: as many as have room).")
    ] = 0,
    time: Annotated[
        str | None, typer.Option(help="Start no run that would not be done by then: 30m, 2h, 90s.")
    ] = None,
    timeout: Annotated[str, typer.Option(help="End a run that makes no step for so long.")] = "10m",
    ray: Annotated[
        str | None, typer.Option(help="Run on a Ray cluster: its address, or auto.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the sweep at --out.")] = False,
) -> None:
    """Train every recipe × learning rate × seed × data set.

    The most informative runs come first; each result is kept as it comes. The same command, or
    --resume, goes on with a sweep that was cut short.
    """
    from halfulp.sweep.run import run_design

    named = {"config": config, "--recipe": recipe, "--lr": lr, "--seeds": seeds}
    named |= {"--reference": reference, "--data": data, "--set": set_}
    named |= {"--guard": guard or None, "--force": force or None, "--out": out}
    if ray == "":
        raise ConfigError("--ray is empty. Give the address of the cluster, or auto.")
    if resume is None:
        path = Path("sweep") if out is None else out
        design = _design(config, recipe, lr, seeds, reference, data, guard, set_)
    else:
        path, design = resume, _resumed(resume, [n for n, v in named.items() if v is not None])
    quiet_transformers()
    with SweepProgress(design) as progress:
        try:
            table = run_design(
                design, path, jobs=jobs, time_s=0.0 if time is None else _seconds("--time", time),
                timeout_s=_seconds("--timeout", timeout), ray=ray or "", force=force,
                command=command_line().split(), on_event=progress.event,
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"interrupted; go on with: halfulp sweep --resume {path}")
            raise typer.Exit(130) from None
    _conclude(table, path)


def _design(
    config: Path | None,
    recipe: str | None,
    lr: str | None,
    seeds: str | None,
    reference: str | None,
    data: list[str] | None,
    guard: bool,
    set_: list[str] | None,
) -> "Design":
    from halfulp.sweep.design import make_design
    from halfulp.train.config import load_config

    for option, given, example in (
        ("--recipe", recipe, "bf16_amp,te_current"),
        ("--lr", lr, "1e-4:1e-1:7"),
    ):
        if given is None:
            raise ConfigError(f"{option} is missing. Give for example {option} {example}.")
    overrides = overrides_of({"policy": {}}, set_ or [])
    own = {"--seeds": "," in (seeds or ""), "--data": bool(data), "--guard": guard}
    for name, option in _overruled(overrides, own).items():
        raise ConfigError(f"--set {name} has no effect on a sweep. Use {option}.")
    design = make_design(
        load_config({} if config is None else config, overrides),
        recipes=words("--recipe", recipe or "", "bf16_amp,te_current"),
        lrs=rates(lr or ""),
        seeds=3 if seeds is None else _seeds(seeds),
        reference=reference or "",
        data=_data_sets(data) if data else None,
        guard=guard,
    )
    if config is not None:
        _say_overruled(config, own)
    return design


def _overruled(given: Mapping[str, Mapping[str, Any]], own: Mapping[str, bool]) -> dict[str, str]:
    """What of `given` the sweep replaces, and by which option; `own` has the sweep's own ones."""
    options = {
        "train.lr": "--lr", "policy.recipe": "--recipe", "policy.file": "--recipe",
        "policy.schedule": "--recipe", "guard.on": "--guard", "run.out": "--out",
    }  # fmt: skip
    options |= {"train.seed": "--seeds"} if own["--seeds"] else {}
    options |= {"data.source": "--data"} if own["--data"] else {}
    options |= {f"guard.{key}": "--guard" for key in given.get("guard", {}) if not own["--guard"]}
    names = {f"{section}.{key}" for section, values in given.items() for key in values}
    return {name: option for name, option in options.items() if name in names}


def _say_overruled(config: Path, own: Mapping[str, bool]) -> None:
    """Print what of the file is left out, but for values that an option has replaced."""
    content = tomllib.loads(config.read_text(encoding="utf-8"))
    if content.get("guard", {}).get("on") == own["--guard"]:
        del content["guard"]["on"]
    replaced = {"train.lr", "policy.recipe", "policy.file", "train.seed", "data.source"}
    found = _overruled(content, own)
    for name in sorted(found.keys() - replaced):
        print(f"{name} of {config} is left out: a sweep has {found[name]}")


def _resumed(path: Path, given: list[str]) -> "Design":
    from halfulp.sweep.store import read_design

    if given:
        raise ConfigError(
            f"--resume goes on with the sweep's own design, so {', '.join(given)} cannot be given. "
            "Delete them, or start a new sweep."
        )
    return read_design(path)


def rates(text: str) -> list[float]:
    """Learning rates of "1e-4:1e-1:7", evenly spaced in log lr, or of a list with commas."""
    try:
        if ":" not in text:
            return [float(word) for word in words("--lr", text, "1e-3,1e-2")]
        first, last, count = text.split(":")
        low, high, n = float(first), float(last), int(count)
        if not 0 < low < high < math.inf or n < 2:
            raise ValueError("the first must be below the last, and there must be two or more")
        return [float(f"{low * (high / low) ** (i / (n - 1)):.4g}") for i in range(n)]
    except ValueError as error:
        raise ConfigError(
            f"--lr {text!r} is not understood ({error}). Write 1e-4:1e-1:7, or 1e-3,2e-3,4e-3."
        ) from error


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(word) for word in words("--seeds", text, "0,1")] if "," in text else int(text)
    except ValueError as error:
        raise ConfigError(f"--seeds {text!r} is not understood. Write 3, or 0,1,5.") from error


def _data_sets(given: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, sources = text.partition("=")
        name = name.strip() if equals else Path(text).stem
        if not name or name in found:
            what = f"the name {name!r} is taken" if name else "it has no name"
            raise ConfigError(f"--data {text!r} cannot be used: {what}. Write NAME=SOURCE.")
        found[name] = words("--data", sources, "code=src,docs") if equals else [text]
    return found


def _seconds(option: str, text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{option} {text!r} is not understood. Write 90s, 30m, 2h or 1d.")
    return seconds


def _conclude(table: "Table", path: Path) -> None:
    from halfulp.sweep.order import left_out, next_cell

    lost = sum(result.lost for result in table.results)
    done = {result.id for result in table.results if not result.lost}
    never = len(left_out(table.design, table.results))
    notes = [f"{lost} lost"] if lost else []
    notes += [f"{never} left out: recipe refused"] if never else []
    said = f" ({', '.join(notes)})" if notes else ""
    print(f"{len(table.results)} of {len(table.design.cells())} runs done{said}: {path}")
    if next_cell(table.design, table.results, done) is not None:
        print(f"go on with: halfulp sweep --resume {path}")
    print(table.verdict())
    print(f"see: halfulp report {path}")
