"""`halfulp plan fit`: the scaling law of one's own runs, how far to trust it, what to run next."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.common import check_outputs
from halfulp.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from halfulp.plan.bootstrap import Band, Bootstrap
    from halfulp.plan.fit import Fit


def fit(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS…",
            help="CSV with N, D, loss (and C, lr, batch, bits), run directories, sweeps, or "
            "folders of runs.",
        ),
    ],
    bootstrap: Annotated[int, typer.Option(help="Resamples behind the bands; 0 = none.")] = 1000,
    precision: Annotated[
        str, typer.Option(help="Only runs of this recipe or so many bits, where there are several.")
    ] = "",
    next_flops: Annotated[
        float | None, typer.Option(help="What the next run may cost. [default: the largest run's]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    json_: Annotated[
        Path | None,
        typer.Option("--json", "-o", help="Write all figures there: what plan --law takes."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture there, as SVG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to your own runs.

    N are all parameters of the model and D the tokens trained on; losses are held out, in nats per
    token, of one tokenizer and text. Bands are 80 % of the resampled fits.
    """
    from halfulp.plan.fit import fit as fit_law
    from halfulp.plan.fit_file import content
    from halfulp.plan.run_directories import read_runs

    check_outputs({"--json": json_, "--plot": plot}, force=force, inputs=runs)
    if next_flops is not None and not bootstrap:
        raise ConfigError("--next-flops needs resamples. Leave out --bootstrap 0.")
    found = fit_law(read_runs(runs, precision=precision))
    boot = _resampled(found, bootstrap, seed) if bootstrap else None
    figures = content(found, boot, source=", ".join(path.name for path in runs))
    figures |= _further(found, boot, next_flops)
    _print(found, boot, figures)
    if json_ is not None:
        _write(json_, json.dumps(figures, indent=1) + "\n")
        print(f"figures: {json_} (halfulp plan --law {json_})")
    if plot is not None:
        from halfulp.report.fit_plot import fit_svg

        _write(plot, fit_svg(found, boot))
        print(f"picture: {plot}")


def _resampled(found: "Fit", draws: int, seed: int) -> "Bootstrap":
    from halfulp.cli.common import Steps
    from halfulp.plan.bootstrap import bootstrap

    with Steps() as steps:
        return bootstrap(
            found, draws, seed=seed, progress=lambda done: steps.count(f"resample {done}/{draws}")
        )


def _further(found: "Fit", boot: "Bootstrap | None", next_flops: float | None) -> dict:
    """The bands, the error on the largest runs, and what to run next, as plain values."""
    from halfulp.plan.leave_out import leave_largest_out
    from halfulp.plan.next_run import next_run

    further: dict = {"exponent": found.law.exponent}
    try:
        left = leave_largest_out(found)
        further["left_out"] = {
            "runs": len(left.errors), "fitted": left.fitted, "reach": left.reach,
            "error": left.error, "bias": left.bias,
        }  # fmt: skip
    except PlanError as error:
        further["left_out"] = {"refused": str(error)}
    if boot is not None:
        further["bands"] = {name: vars(band) for name, band in _bands(boot).items()}
        further["next_run"] = vars(next_run(boot, next_flops))
    return further


def _bands(boot: "Bootstrap") -> dict[str, "Band"]:
    names = ("E", "A", "B", "alpha", "beta")
    bands = {name: boot.band(lambda law, name=name: getattr(law, name)) for name in names}
    bands["exponent"] = boot.band(lambda law: law.exponent)
    flops = 10 * float(boot.fit.runs.flops.max())
    n, d = boot.fit.law.allocate(flops)
    bands["parameters_at_10x"] = boot.band(lambda law: law.allocate(flops)[0])
    bands["loss_at_10x"] = boot.loss(n, d)
    bands["run_at_10x"] = boot.run_loss(n, d)
    return bands


_NO_FLOOR = 0.02  # E as a share of the least loss, below which it is not told from 0
_WORDS = {
    "exponent": "a in N* ∝ C^a",
    "parameters_at_10x": "N* at 10 × the largest C",
    "loss_at_10x": "loss there, nats/token",
    "run_at_10x": "loss of one run there",
}


def _print(found: "Fit", boot: "Bootstrap | None", figures: dict) -> None:
    from halfulp.cli.show import print_table

    ranges = figures["ranges"]
    span = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in ranges.items())
    print(f"{len(found.runs)} runs: {span} (C = 6 N D; N counts all parameters)")
    for note in found.runs.notes:
        print(f"note: {note}")
    print("L = E + A/N^alpha + B/D^beta, nats/token; Huber loss of ln L, delta 0.001")
    if boot is None:
        rows = [(name, f"{value:.5g}") for name, value in figures["coefficients"].items()]
        print_table(("", "fitted"), rows)
    else:
        bands = _bands(boot)
        rows = [
            (_WORDS.get(name, name), f"{b.value:.5g}", f"{b.low:.5g} to {b.high:.5g}")
            for name, b in bands.items()
        ]
        print_table(("", "fitted", f"80 % of {len(boot.draws)} resamples"), rows)
        if bands["E"].low < _NO_FLOOR * found.runs.loss_nats.min():
            print("note: E may be 0: the runs do not tell how low the loss can get")
    print(f"one run is off by {found.spread:.2%} of its loss (root mean square)")
    _print_worst(found)
    _print_left_out(figures["left_out"])
    if boot is not None:
        _print_next(figures["next_run"])


def _print_worst(found: "Fit") -> None:
    import numpy as np

    worst = int(np.argmax(np.abs(found.residuals)))
    name = f" ({found.runs.names[worst]})" if found.runs.names else ""
    print(
        f"largest residual: {found.residuals[worst]:+.2%} at N = "
        f"{found.runs.parameters[worst]:.3g}, D = {found.runs.tokens[worst]:.3g}{name}"
    )


def _print_left_out(left: dict) -> None:
    if "refused" in left:
        print(f"error on the largest runs: not known: {left['refused']}")
        return
    print(
        f"the {left['runs']} largest runs, predicted from the {left['fitted']} others (C up to "
        f"{left['reach']:.2g} × theirs): off by {left['error']:.2%}, mean {left['bias']:+.2%}"
    )


def _print_next(best: dict) -> None:
    print(
        f"run next: N = {best['parameters']:.3g}, D = {best['tokens']:.3g} "
        f"({best['flops']:.3g} FLOPs): the doubt about the loss at {best['target_flops']:.3g} "
        f"FLOPs goes from ± {best['doubt']:.2%} to ± {best['doubt_after']:.2%}"
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
