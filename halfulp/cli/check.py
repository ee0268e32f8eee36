"""`halfulp check`: what every rounding costs, and the policy that fits the budget."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from halfulp.cli.common import (
    Steps,
    check_outputs,
    command_line,
    pairs,
    quiet_transformers,
    words,
)
from halfulp.cli.model_options import Hints, Texts, TokenizerName
from halfulp.cli.output_options import Figures, Force, Page
from halfulp.errors import CheckError, ConfigError, HalfulpError

if TYPE_CHECKING:
    from halfulp.check.report import CheckReport, Row

COULD_NOT_TELL, WRONG_INPUT = 3, 64


def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Run directory, local Hugging Face directory, or preset."
        ),
    ],
    data: Texts = None,
    tokenizer: TokenizerName = None,
    tokens: Annotated[int, typer.Option(help="Tokens to price, and as many to hold out.")] = 512,
    formats: Annotated[
        str, typer.Option(help="Words of `halfulp formats`, or quantizers, with commas.")
    ] = "bf16,fp16,e4m3,e5m2,mxfp8,nvfp4,int8",
    budget: Annotated[float, typer.Option(help="KL in nats per token that is allowed.")] = 1e-3,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the verdict is about: bf16, fp16, autocast-bf16, autocast-fp16, a recipe "
            "or a policy.toml. Without it, the plan."
        ),
    ] = None,
    lr: Annotated[
        float, typer.Option(help="Learning rate of the backward and update prices.")
    ] = 1e-4,
    hardware: Annotated[
        str, typer.Option(help="Only formats that it multiplies: hopper, blackwell, cpu, …")
    ] = "any",
    pin: Annotated[
        list[str] | None,
        typer.Option(help="'GLOB=never below bf16', 'GLOB=exactly e4m3' or 'GLOB=free'."),
    ] = None,
    hint: Hints = None,
    probes: Annotated[int, typer.Option(help="Backward passes; more are more certain.")] = 2,
    seed: Annotated[int, typer.Option(help="Of labels, signs and the choice of text.")] = 0,
    policy: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("policy.toml"),
    html: Page = None,
    json_: Figures = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also test what this machine's kernels really do.")
    ] = False,
    explain: Annotated[str | None, typer.Option(help="Say everything about one site.")] = None,
    attn: Annotated[str, typer.Option(help="eager shows scores; sdpa prices fused.")] = "eager",
    force: Force = False,
) -> None:
    """Price every rounding before the run.

    Every tensor in every format, in nats per token; a verdict, and a plan of formats for a budget.

    Exit codes: 0 the target meets the budget, 2 it does not, 3 it could not be judged, 64 the
    input is wrong.
    """
    try:
        check_outputs({"--policy": policy, "--html": html, "--json": json_}, force=force)
        report = _run(
            model, data, tokenizer, tokens, formats, budget, target, lr, hardware, pin or [],
            hint or [], probes, seed, kernels, attn,
        )  # fmt: skip
        _print(report)
        try:
            _write(report, policy, html, json_)
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be written: {error.strerror}.") from error
        if explain:
            _explain(report, explain)
    except HalfulpError as error:
        error.exit_code = COULD_NOT_TELL if isinstance(error, CheckError) else WRONG_INPUT
        raise
    raise typer.Exit(report.exit_code)


def _run(
    where: str, data: list[str] | None, tokenizer: str | None, tokens: int, formats: str,
    budget: float, target: str | None, lr: float, hardware: str, pins: list[str],
    hints: list[str], probes: int, seed: int, kernels: bool, attn: str,
) -> "CheckReport":  # fmt: skip
    from halfulp.check.examine import check as examine
    from halfulp.cli.load import load_model

    logging.getLogger("halfulp").setLevel(logging.ERROR)
    quiet_transformers()
    listed = words("--formats", formats)
    _check_numbers(budget, lr, probes, attn)
    loaded = load_model(where, data=data, tokenizer=tokenizer, tokens=tokens, seed=seed)
    with Steps() as steps:
        report = examine(
            loaded.model, loaded.text, held_out=loaded.held_out, formats=listed, budget=budget,
            target=target, lr=lr, hardware=hardware.lower(), pins=pairs("--pin", pins),
            hints=pairs("--hint", hints) or None, probes=probes, seed=seed, attention=attn,
            kernels=kernels, progress=steps.say,
        )  # fmt: skip
    return replace(report, model=f"{where} ({report.model})", notes=loaded.notes + report.notes)


def _check_numbers(budget: float, lr: float, probes: int, attn: str) -> None:
    if not (math.isfinite(budget) and budget > 0):
        raise ConfigError(f"--budget {budget} is no positive number of nats per token.")
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"--lr {lr} is no positive learning rate.")
    if probes < 1:
        raise ConfigError(f"--probes {probes} is none. Give 1 or more.")
    if attn not in ("eager", "sdpa"):
        raise ConfigError(f"--attn {attn!r} is unknown. Give eager or sdpa.")


def _print(report: "CheckReport") -> None:
    from halfulp.check.report import KL_IS_CHANGE
    from halfulp.cli.show import print_table

    print(
        f"{report.model}: {report.tokens} tokens, loss {_text(report.loss_nats)} nats/token, "
        f"entropy {_text(report.entropy_nats)}, median top-2 margin {_text(report.median_margin)}, "
        f"reference {report.reference}, seed {report.seed}"
    )
    for note in report.notes:
        print(f"note: {note}")
    columns = (
        "format", "sites", "KL predicted", "KL measured", "ratio", "flips predicted",
        "flips measured", "range", "grade",
    )  # fmt: skip
    print("\nEvery stored tensor in one format (KL in nats/token)")
    print_table(columns, [_cells(r) for r in report.uniform])
    print("\nOnly the operands of the GEMMs")
    print_table(columns, [_cells(r) for r in report.operands])
    for row in (*report.uniform, *report.operands):
        if row.ratio == row.ratio and not 0.5 <= row.ratio <= 2:
            print(f"{row.name}: predicted and measured disagree. {_likely(row)}")
    _print_sites(report)
    _print_plan(report)
    _print_training(report)
    _print_findings(report)
    for kernel in report.kernels:
        print(kernel)
    print(f"\n{report.seconds:.1f} s, the time of {report.forwards:.0f} forward passes.")
    if report.asked is not None:
        print_table(columns, [_cells(report.asked)])
        if report.asked.why:
            print(f"no prediction: {report.asked.why}")
    print(f"{report.verdict.status}: {report.verdict.sentence} {KL_IS_CHANGE}")


def _likely(row: "Row") -> str:
    if row.range_events:
        return "Some elements are out of range."
    if not row.predicted_kl > 1e-9:
        return "Both are near the noise of fp32."
    return "Errors agree in direction, or the list of sites is incomplete; trust the measured one."


def _cells(row: "Row") -> tuple[str, ...]:
    return (
        row.name, str(row.sites), _text(row.predicted_kl), _text(row.measured_kl),
        _text(row.ratio, 2), _share(row.predicted_flips), _share(row.measured_flips),
        str(row.range_events or ""), row.grade,
    )  # fmt: skip


def _print_sites(report: "CheckReport") -> None:
    from halfulp.cli.show import print_table

    print(f"\nThe costliest sites in {report.focus}")
    rows = [
        (s.name, s.block, _text(s.kl), f"{s.share:.1%}", f"{s.cumulative:.1%}", s.crosses, s.reason)
        for s in report.sites
    ]
    columns = ("site", "block", "KL", "share", "together", "over budget in", "why")
    print_table(columns, rows)
    kept = ", ".join(f"{kind} {_text(kl)}" for kind, kl in report.keep.items())
    print(f"KL that is left of {report.focus} if one kind stays exact: {kept}")
    print(f"\nLowest safe format per block for {report.budget:g} nats/token")
    safe = [(s.block, s.alone, s.together) for s in report.lowest_safe]
    print_table(("block", "alone", "all blocks at once"), safe)


def _print_plan(report: "CheckReport") -> None:
    plan = report.plan
    print(
        f"\nPlan for {report.budget:g} nats/token: {plan.average_bits:.1f} bits per operand, KL "
        f"predicted {_text(plan.predicted_kl)}, measured {_text(plan.measured_kl)}, on held-out "
        f"text {_text(plan.held_out_kl)} (flips {_share(plan.held_out_flips)})"
    )
    if len(plan.tries) > 1:
        tries = ", ".join(_text(t) for t in plan.tries)
        print(f"planned again because the first plan measured above the budget: aims {tries}")
    everywhere = {e.format: e.why for e in plan.excluded if e.group == "*"}
    for fmt, why in everywhere.items():
        print(f"not used: {fmt}, because {why}")
    pinned = sorted({e.why for e in plan.excluded if e.why.startswith("pinned")})
    for why in pinned:
        print(f"{why} (--pin '{why.split()[1]}=free' releases it)")
    for change in report.what_if:
        print(f"what if: {change}")


def _print_training(report: "CheckReport") -> None:
    from halfulp.cli.show import print_table

    if report.updates is None:
        return
    print("\nBackward GEMMs: relative error, median over GEMMs (worst), and how many are biased")
    print_table(("format", "product", "predicted", "measured", "biased"), _backward(report))
    print(f"\nOne AdamW step at lr {report.updates.lr:g} with weights stored in few bits")
    rows = [
        (w.block, w.format, _share(w.lost_updates), _share(w.lost_decay), _rate(w.lr_half),
         _rate(w.lr_stop))
        for w in report.updates.weights
    ]  # fmt: skip
    columns = (
        "block",
        "weights",
        "updates lost",
        "decay lost",
        "half lost below lr",
        "no learning below lr",
    )
    print_table(columns, [r for r in rows if r[1] == "bf16" or r[0] == "all"])


def _backward(report: "CheckReport") -> list[tuple[str, ...]]:
    from statistics import median

    groups: dict[tuple[str, str], list] = {}
    for row in report.backward:
        groups.setdefault((row.format, row.which), []).append(row)
    lines = []
    for (fmt, which), rows in groups.items():
        pairs = [
            [x for r in rows if math.isfinite(x := getattr(r, name))]
            for name in ("predicted_rel", "measured_rel")
        ]
        said = [f"{median(xs):.2g} ({max(xs):.2g})" if xs else "–" for xs in pairs]
        lines.append((fmt, which, *said, f"{sum(r.biased for r in rows)} of {len(rows)}"))
    return lines


def _print_findings(report: "CheckReport") -> None:
    kinds: dict[str, list] = {}
    for finding in report.findings:
        kinds.setdefault(finding.kind, []).append(finding)
    if kinds:
        print()
    for kind, found in kinds.items():
        worst = max(found, key=lambda f: abs(f.value) if f.value == f.value else 0.0)
        which = "largest" if abs(worst.value) > 0 else "first"
        more = f" ({len(found)} such findings, the {which} shown)" if len(found) > 1 else ""
        print(f"{kind}: {worst.text}{more}")


def _explain(report: "CheckReport", name: str) -> None:
    from halfulp.cli.show import print_table

    site = report.site(name)
    print(
        f"\n{site.name}: {site.kind} in {site.block}, made by {site.op}, shape {site.shape}, "
        f"largest magnitude {_text(site.amax)}"
    )
    rows = [
        (f, _text(kl), _text(site.kl_stochastic[f]), _share(site.flushed[f]),
         _share(site.saturated[f]), _text(site.shrinkage[f]), _text(site.z[f], 1),
         " ".join(_text(h) for h in site.heads.get(f, ())))
        for f, kl in site.kl.items()
    ]  # fmt: skip
    columns = (
        "format", "KL", "KL stochastic", "become 0", "too large", "shrinkage", "z", "KL per head",
    )  # fmt: skip
    print_table(columns, rows)


def _write(report: "CheckReport", policy: Path, html: Path | None, json_: Path | None) -> None:
    policy.write_text(report.plan.policy, encoding="utf-8")
    print(f"policy: {policy} (halfulp train --policy {policy})")
    if json_ is not None:
        json_.write_text(report.to_json() + "\n", encoding="utf-8")
        print(f"figures: {json_}")
    if html is not None:
        from halfulp.report.check_page import write_check

        path = write_check(report, html, name=report.model, force=True, command=command_line())
        print(f"page: {path}")


def _text(value: float, digits: int = 0) -> str:
    """Two significant digits (or so many decimals), a dash for what is not known."""
    if value != value:
        return "–"
    return f"{value:.{digits}f}" if digits else f"{value:.3g}"


def _rate(value: float) -> str:
    """A learning rate; a dash where any rate changes the weights (those that are zero)."""
    return "–" if value < 1e-30 else _text(value)


class CheckCommand(TyperCommand):
    """A wrong option exits with 64 here: 2 means that the target is over the budget."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "exit_code") and hasattr(error, "format_message"):
                error.exit_code = WRONG_INPUT  # pyright: ignore[reportAttributeAccessIssue]
            raise


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.2%}"
