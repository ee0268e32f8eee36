"""The section "Sharpness" of a report on runs: what they measured of themselves."""

from collections.abc import Sequence

from halfulp.report import sharpness as say
from halfulp.report import words
from halfulp.report.document import figure_card
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.read import Record
from halfulp.report.sharpness import Track, track
from halfulp.report.sharpness_plots import block_figure, logits_figure, type_figure
from halfulp.report.tables import mark

_LEAD = (
    "The sharpness of a block is the trace of its Gauss-Newton matrix over its parameters: how "
    "fast the loss bends when one of its weights moves. Compare blocks of one run, or one block "
    "over time; the absolute value depends on model and data. “The paper” is Wang et al., "
    "arXiv:2502.19002."
)
_TYPES = (
    "All layers of a type together. Every point is one measurement; neighbors differ by its "
    "sampling error."
)
_BLOCKS = (
    "Rows are blocks, from the type that the paper finds flattest to the sharpest; a stronger "
    "color is sharper, on one logarithmic scale. The number is the last measurement."
)
_LOGITS = (
    "Left: the largest rise of the loss, in percent, when every logit y moves by at most "
    "0.0005 (|y| + 1), exact (Lee et al., Keskar et al.). A constant in all logits moves the solid "
    "line and not the dashed one. Right: log Z away from 0 is drift of the logits."
)


def sharpness_section(records: Sequence[Record]) -> Markup | None:
    """Verdict per run on the paper's order, and the figures; None where nothing was measured."""
    tracks = [found for found in map(track, records) if found is not None]
    if not tracks:
        return None
    logits = logits_figure(tracks)
    return join(
        tag("h2", "Sharpness"),
        tag("p", _LEAD, class_="lead"),
        tag("div", tag("ul", *map(_finding, tracks), class_="findings"), class_="card"),
        figure_card(type_figure(tracks), _TYPES),
        tag(
            "figure",
            tag("div", block_figure(tracks), class_="scroll"),
            tag("figcaption", _BLOCKS),
            tag("details", tag("summary", "Numbers"), numbers_table(tracks)),
            class_="card",
        ),
        figure_card(logits, _LOGITS) if logits is not None else None,
    )


def _finding(one: Track) -> Markup:
    found = one.at_the_end()
    judged = say.pairs(found)
    verdict = say.overall(judged)
    measured = f"{words.count(one.last)} measurement{'s' if one.last != 1 else ''}"
    text = (
        f" Over the last {measured}, up to step {int(one.steps[-1]):,}: {say.order(found)}. "
        f"{say.on_the_paper(judged)}"
    )
    return tag(
        "li",
        tag("span", mark(verdict, ""), tag("span", f"{verdict}: ", class_="hidden")),
        tag("span", tag("b", f"{one.run.label}."), text),
    )


def numbers_table(tracks: Sequence[Track]) -> Markup:
    """One row per run and block type: first measurement, end with its interval, parameters."""
    rows: list[list[Child]] = []
    for one in tracks:
        first = {kind: float(values[0]) for kind, values in one.by_type().items()}
        for kind, found in one.at_the_end().items():
            rows.append(
                [
                    join(kind, tag("small", one.run.label) if len(tracks) > 1 else None),
                    f"{found.parameters:,}",
                    say.number(first[kind]),
                    say.number(found.sharpness),
                    say.within(found),
                ]
            )
    head: list[Child] = [
        "block type", "parameters", f"at step {int(tracks[0].steps[0]):,}", "at the end", "± 95 %",
    ]  # fmt: skip
    if len({int(one.steps[0]) for one in tracks}) > 1:
        head[2] = "at first"
    return table(head, rows, numeric=frozenset({1, 2, 3, 4}), caption="Sharpness per block type")
