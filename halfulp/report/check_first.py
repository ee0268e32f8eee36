"""The first screen of a check's page: is it safe, and which block is the trouble?"""

import math
from collections.abc import Sequence

from halfulp.check.report import CheckReport, Row
from halfulp.report import check_words as say
from halfulp.report import words
from halfulp.report.check_tables import card
from halfulp.report.html import Markup, join, tag
from halfulp.report.price import FAIL, PASS
from halfulp.report.tables import mark


def first_screen(report: CheckReport, name: str) -> Markup:
    """Verdict in words, three numbers, one sentence per family of formats."""
    verdict = report.verdict
    sentence = say.capital(verdict.sentence)
    badge = mark(verdict.status, f"{words.sentence(verdict.status)}.")
    return join(
        tag("p", f"halfulp check · {name}", class_="kicker"),
        tag("h1", badge, sentence),
        _numbers(report),
        _safety(report),
    )


def _numbers(report: CheckReport) -> Markup:
    three = [_asked_number(report), _narrowest_number(report), _trouble_number(report)]
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in three
    ]
    return tag("div", *cells, class_="numbers")


def _asked_number(report: CheckReport) -> tuple[str, str, str]:
    row, plan = report.asked, report.plan
    name = "the plan" if row is None else row.name
    measured = plan.measured_kl if row is None else row.measured_kl
    flips = plan.measured_flips if row is None else row.measured_flips
    note = f"KL {say.kl(measured)} nats/token, budget {report.budget:g}; "
    changed = (
        f"{words.share(flips)} of the next tokens change" if flips else "no next token changes"
    )
    what = f"{name}, measured"
    if not math.isfinite(measured):
        return "broken", what, "the run gave NaN or inf"
    return say.of_budget(measured, report.budget), what, note + changed


def _narrowest_number(report: CheckReport) -> tuple[str, str, str]:
    gemms = say.narrowest(report.operands, report.budget)
    whole = say.narrowest(report.uniform, report.budget)
    value = " or ".join(row.name for row in gemms[:2]) or "none"
    what = "narrowest safe format of all GEMMs"
    everything = " or ".join(row.name for row in whole[:2]) or "no format"
    note = f"for every stored tensor: {everything}; mixed by the plan: {say.plan_bits(report)}"
    return value, what, note


def _trouble_number(report: CheckReport) -> tuple[str, str, str]:
    block, share = say.costliest(say.block_costs(report, report.focus, "stored"))
    worst = next((s for s in report.sites if s.block == block), None)
    where = f"most of it {worst.kind}" if worst else "of every stored tensor"
    value = f"{block} {words.share(share)}" if share == share else block or "–"
    other, part = say.costliest(say.block_costs(report, report.focus, "operand"))
    note = f"of the predicted KL when all is stored in {report.focus}, {where}"
    if other and part == part:
        note += f"; of GEMM operands alone: {other} {words.share(part)}"
    return value, "costliest block", note if block else "no block costs anything"


def _safety(report: CheckReport) -> Markup:
    """One sentence per family of formats, and one about the plan."""
    stored = {row.name: row for row in report.uniform}
    rows = [
        _family(report, name, members, stored)
        for name, members in say.families(report.operands).items()
    ]
    plan = report.plan
    inside = plan.measured_kl <= report.budget
    held = _held_out(report)
    text = (
        f" {say.plan_bits(report)}, {say.of_budget(plan.measured_kl, report.budget)}"
        f"{f', on held-out text {held}' if held else ''}."
    )
    word = "within the budget" if inside else "above the budget"
    rows.append((PASS if inside else FAIL, f"The plan: {word}.", text))
    items = [
        tag(
            "li",
            tag("span", mark(status, ""), tag("span", f"{status}: ", class_="hidden")),
            tag("span", tag("b", lead), rest),
        )
        for status, lead, rest in rows
    ]
    title = "All GEMMs in one format, attention and head included"
    return card(tag("h3", title), tag("ul", *items, class_="findings"))


def _held_out(report: CheckReport) -> str:
    kl = report.plan.held_out_kl
    return say.times(kl, report.budget) if kl == kl else ""


def _family(
    report: CheckReport, name: str, members: Sequence[Row], stored: dict[str, Row]
) -> tuple[str, str, str]:
    """Verdict, sentence in bold and the rest, about one family as operands of all GEMMs."""
    good = [row for row in members if say.safe(row, report.budget)]
    bad = [row for row in members if not say.safe(row, report.budget)]
    alone = len(members) == 1 and members[0].name.upper() != name
    which = f" ({members[0].name})" if alone else ""
    answer = "safe" if not bad else "not safe"
    if good and bad:
        answer = f"safe as {words.listing([r.name for r in good])} only"
    said = f" {say.members(members, report.budget)}"
    if bad:
        where = say.trouble(report, bad[0].name, "operand")
        said += f", {where}" if where else ""
    everywhere = [stored[r.name] for r in members if r.name in stored]
    too = [row for row in everywhere if say.safe(row, report.budget)]
    if good and len(too) == len(everywhere):
        said += ". Also when every tensor is stored so."
    elif good and too:
        said += f". As storage of every tensor only {words.listing([r.name for r in too])}."
    else:
        said += f". If every tensor is stored so: {say.members(everywhere, report.budget)}."
    return PASS if good else FAIL, f"{name}{which}: {answer}.", said
