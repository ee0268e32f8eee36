"""`halfulp guard explain` and `halfulp guard map`: what the guard of a run has done."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfulp.cli.common import check_outputs, plain, quiet_transformers
from halfulp.cli.output_options import Figures

if TYPE_CHECKING:
    from halfulp.report.guard_words import First
    from halfulp.report.incidents import Explained, Story
    from halfulp.train.precision_map import PrecisionMap

_MOST_SIGNS = 12


def explain(
    run: Annotated[Path, typer.Argument(help="Run directory, with or without a guard.")],
    json_: Figures = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Say what was abnormal before each incident of a run, what was done, and what it cost.

    Of a run without a guard: where one would have held a step.
    """
    check_outputs({"--json": json_}, force=force)
    from halfulp.report.guard_words import headline
    from halfulp.report.incidents import explain as explain_run

    found = explain_run(run)
    print(f"{run.resolve().name}: {headline(found)}")
    for i, story in enumerate(found.stories, 1):
        _print_story(i, story, found)
    if json_ is not None:
        json_.write_text(json.dumps(plain(figures(found)), indent=1) + "\n", encoding="utf-8")
        print(f"figures: {json_}")


def map_(
    run: Annotated[Path, typer.Argument(help="Run directory of `halfulp train`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="TOML file.")] = Path("policy.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write the precision map of a run as a policy for the next one.

    A rule for each block that the guard has raised comes before the rules of the run's own policy.
    Where none was raised it is that policy.
    """
    check_outputs({"--out": out}, force=force)
    from halfulp.train.precision_map import precision_map

    quiet_transformers()
    found = precision_map(run)
    out.write_text(found.policy.to_toml(), encoding="utf-8")
    if found.raised:
        _print_map(found)
    else:
        print(f"{run}: {_not_raised(found)}")
    print(f"policy: {out}; train with it: halfulp train --policy {out}")


def figures(found: "Explained") -> dict[str, Any]:
    """Everything that `explain` prints, as plain values; costs in steps' worth of tokens."""
    cost = found.cost
    return {
        "guarded": found.guarded,
        "steps": found.last_step,
        "planned_steps": found.planned_steps,
        "tokens_per_step": found.tokens_per_step,
        "cost": {**vars(cost), "steps": cost.steps, "share": found.share},
        "incidents": [story.to_dict() for story in found.stories],
    }


def _print_story(index: int, story: "Story", found: "Explained") -> None:
    from halfulp.cli.show import print_table
    from halfulp.report import guard_words as say
    from halfulp.report.incidents import cost_of

    incident = story.incident
    print(f"\n{index}. step {story.step:,}: {say.seen(incident)} → {say.judged(incident)}")
    if story.recorded:
        cost = cost_of([incident])
        tokens = f"{cost.steps * found.tokens_per_step:,.0f} tokens, " if cost.steps else ""
        share = _share(cost.steps, found)
        print(f"   done: {say.done(incident)}")
        print(f"   cost: {say.booked(cost)}{f' ({tokens}{share} of the run)' if tokens else ''}")
    elif incident["last"] > story.step:
        count = incident["triggers"]
        print(f"   it went on to step {incident['last']:,}: {count} steps would have been held")
    if not story.signs:
        print("   before it: no recorded signal was abnormal")
        return
    first = story.signs[0]
    print(
        f"   before it: {say.name(first.signal)} in {say.where(first)} was the first to be "
        f"abnormal, {first.lead:,} steps before"
    )
    rows = say.firsts(story.signs)
    head = ("first signal", "where", "since step", "steps before", "then", "worst", "threshold")
    print_table((f"   {head[0]}", *head[1:], "later"), [_cells(row) for row in rows[:_MOST_SIGNS]])
    if len(rows) > _MOST_SIGNS:
        print(f"   and {len(rows) - _MOST_SIGNS} more (--json has them all)")


def _cells(row: "First") -> list[object]:
    from halfulp.report import guard_words as say

    sign = row.sign
    values = (say.value(sign.signal, x) for x in (sign.first, sign.worst, sign.threshold))
    place = say.where(sign, row.blocks)
    later = ", ".join(row.also)
    return [f"   {say.name(sign.signal)}", place, sign.step, sign.lead, *values, later]


def _share(steps: float, found: "Explained") -> str:
    from halfulp.report import words

    length = found.planned_steps or found.last_step
    return words.share(steps / length) if length else "–"


def _not_raised(found: "PrecisionMap") -> str:
    if not found.incidents:
        return "its guard had no incident, so every block stands on the run's own policy"
    times = "incident" if found.incidents == 1 else "incidents"
    return f"after {found.incidents} {times} every block stands on the run's own policy"


def _print_map(found: "PrecisionMap") -> None:
    from halfulp.cli.show import print_table
    from halfulp.report.guard_words import recipe

    print(f"{len(found.raised)} of {found.blocks} blocks stand above the run's own policy")
    rows = [(block, own, recipe(name)) for block, (own, name) in found.raised.items()]
    print_table(("block", "own recipe", "raised to"), rows)
