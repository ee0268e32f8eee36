"""The training part of a check's page: backward GEMMs and one optimizer step."""

import math
import statistics
from collections.abc import Sequence

from halfulp.check.backward import GemmError
from halfulp.check.report import CheckReport
from halfulp.check.updates import ALL, UpdateSheet, WeightRow
from halfulp.report import check_words as say
from halfulp.report import words
from halfulp.report.check_tables import card, folded
from halfulp.report.counters import block_order
from halfulp.report.html import Child, Markup, join, table, tag

_WORST = 5
_NAMES = {"dgrad": "input gradients", "wgrad": "weight gradients", "fprop": "outputs"}


def training(report: CheckReport) -> Markup | None:
    """Backward GEMMs and the optimizer sheet; None when nothing of it was asked for."""
    parts = [_backward(report.backward), _updates(report.updates)]
    if parts == [None, None]:
        return None
    lead = "What one training batch shows: prices above are about the forward pass only."
    return join(tag("h2", "Training"), tag("p", lead, class_="lead"), *parts)


def _backward(rows: Sequence[GemmError]) -> Markup | None:
    if not rows:
        return None
    kinds = list(dict.fromkeys(row.which for row in rows))
    formats = list(dict.fromkeys(row.format for row in rows))
    head: list[Child] = ["format"]
    for kind in kinds:
        head += [f"{kind}: median error", "worst"]
    head += ["predicted / measured", "biased GEMMs", "most entries becoming 0"]
    body = [_format_row(word, [r for r in rows if r.format == word], kinds) for word in formats]
    numeric = frozenset(range(1, len(head)))
    caption = "Errors of the backward GEMMs per format"
    named = ", ".join(f"{k} makes the {_NAMES.get(k, k)}" for k in kinds)
    text = (
        "Relative error of one product whose two operands are rounded, measured against the exact "
        f"product: {named}. G/X: format of the output gradient / of the other operand. Biased: "
        "more than 2 % of the product itself is gained or lost, which training cannot average out."
    )
    return join(
        card(
            tag("h3", "Backward GEMMs"), tag("p", text, class_="lead"),
            table(head, body, numeric=numeric, caption=caption),
            folded("The worst GEMMs of each format", _worst(rows, formats)),
        )
    )  # fmt: skip


def _error(row: GemmError) -> float:
    return row.measured_rel if row.measured_rel == row.measured_rel else row.predicted_rel


def _format_row(word: str, rows: Sequence[GemmError], kinds: Sequence[str]) -> list[Child]:
    cells: list[Child] = [word]
    for kind in kinds:
        known = [r for r in rows if r.which == kind and math.isfinite(_error(r))]
        if not known:
            cells += ["–", "–"]
            continue
        worst = max(known, key=_error)
        cells += [
            words.share(statistics.median(_error(r) for r in known)),
            join(words.share(_error(worst)), tag("small", worst.gemm)),
        ]
    ratios = sorted(r.ratio for r in rows if math.isfinite(r.ratio) and r.ratio > 0)
    span = f"{ratios[0]:.2f} … {ratios[-1]:.2f}" if ratios else "–"
    biased = [r for r in rows if r.biased]
    zero = max(rows, key=lambda r: r.flushed if r.flushed == r.flushed else -1.0)
    return [
        *cells,
        span,
        f"{len(biased)} of {len(rows)}" if biased else "none",
        _zeros(zero),
    ]


def _zeros(row: GemmError) -> Child:
    if not row.flushed > 0:
        return "none"
    energy = row.flushed_energy
    held = "under 0.0001\u00a0%" if 0 < energy < 1e-6 else words.share(energy)
    note = f"of {row.gemm}, {held} of its Σ x²"
    return join(words.share(row.flushed), tag("small", note))


def _worst(rows: Sequence[GemmError], formats: Sequence[str]) -> Markup:
    head: list[Child] = ["GEMM", "product", "format", "measured", "predicted", "bias"]
    body: list[list[Child]] = []
    for word in formats:
        known = [r for r in rows if r.format == word and math.isfinite(_error(r))]
        for row in sorted(known, key=lambda r: -_error(r))[:_WORST]:
            bias = tag("b", _bias(row), class_="fail") if row.biased else _bias(row)
            rel = [words.share(row.measured_rel), words.share(row.predicted_rel)]
            body.append([row.gemm, row.which, word, *rel, bias])
    return table(head, body, numeric=frozenset({3, 4, 5}), caption="Worst backward GEMMs")


def _bias(row: GemmError) -> str:
    value = row.predicted_bias if row.measured_bias != row.measured_bias else row.measured_bias
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:+.2f}\u00a0%".replace("-", "−")


def _updates(sheet: UpdateSheet | None) -> Markup | None:
    if sheet is None:
        return None
    whole = [row for row in sheet.weights if row.block == ALL]
    rest = sorted((r for r in sheet.weights if r.block != ALL), key=lambda r: block_order(r.block))
    settings = (
        f"One AdamW step at lr {sheet.lr:g}, weight decay {sheet.weight_decay:g}, betas "
        f"{sheet.betas[0]:g} and {sheet.betas[1]:g}, eps {sheet.eps:g}; gradient norm "
        f"{say.number(sheet.grad_norm)}. An update is lost when rounding to nearest returns the "
        "old weight. Stochastic rounding, or an fp32 master copy, keeps it."
    )
    silent = next((r for r in sheet.floors if r.block == ALL), None)
    note = _floor_note(silent.floor, silent.silent, sheet.eps) if silent else None
    return card(
        tag("h3", "Optimizer step: weights stored in few bits"),
        tag("p", settings, class_="lead"),
        tag("p", _sentence(whole[0], sheet)) if whole else None,
        _weights(whole or rest, "Lost updates of all blocks"),
        tag("p", note, class_="lead after") if note else None,
        folded("Block by block", _weights(rest, "Lost updates per block")) if whole else None,
        folded("Second moments in few bits", _moments(sheet)) if sheet.moments else None,
    )


def _sentence(row: WeightRow, sheet: UpdateSheet) -> Markup:
    decay = _lost_decay(row)
    stop = row.lr_stop
    below = (
        "most entries never move"
        if math.isinf(stop)
        else f"below lr {say.kl(stop)} they stand still"
    )
    return join(
        tag("b", f"{row.format} weights"),
        f" lose {words.share(row.lost_updates)} of the updates at lr {sheet.lr:g}{decay}; {below}.",
    )


def _lost_decay(row: WeightRow) -> str:
    if row.lost_decay != row.lost_decay:
        return ""
    return f" and {words.share(row.lost_decay)} of the weight decay"


def _weights(rows: Sequence[WeightRow], caption: str) -> Markup:
    head: list[Child] = [
        "block", "weights in", "updates lost", "decay lost", "half lost below lr",
        "stand still below lr", "update / weight",
    ]  # fmt: skip
    body: list[list[Child]] = [
        [
            row.block,
            row.format,
            _loud(row.lost_updates, 0.1),
            words.share(row.lost_decay) if row.lost_decay == row.lost_decay else "– no decay",
            say.kl(row.lr_half),
            say.kl(row.lr_stop),
            words.share(row.relative_update),
        ]
        for row in rows
    ]
    return table(head, body, numeric=frozenset(range(2, 7)), caption=caption)


def _loud(share: float, limit: float) -> Child:
    text = words.share(share)
    return tag("b", text, class_="fail") if share >= limit else text


def _floor_note(floor: float, silent: float, eps: float) -> str | None:
    said = []
    if silent > 0.001:
        said.append(
            f"{words.share(silent)} of the entries had no gradient on this batch (rare tokens, for "
            "example), so that only decay could move them"
        )
    if floor > 0.001:
        said.append(f"eps = {eps:g} rules {words.share(floor)} of the nonzero gradients")
    return f"{words.sentence('; '.join(said))}." if said else None


def _moments(sheet: UpdateSheet) -> Markup:
    blocks = sorted({r.block for r in sheet.moments}, key=lambda b: (b != ALL, block_order(b)))
    formats = list(dict.fromkeys(row.format for row in sheet.moments))
    cells = {(r.block, r.format): r.underflow for r in sheet.moments}
    rows: list[list[Child]] = [
        [block, *(_loud(cells.get((block, word), math.nan), 0.01) for word in formats)]
        for block in blocks
    ]
    caption = "Share of the second moment that is zero although the gradient is not"
    numeric = frozenset(range(1, len(formats) + 1))
    made = table(["block", *formats], rows, numeric=numeric, caption=caption)
    return join(tag("p", f"{caption}.", class_="lead after"), made)
