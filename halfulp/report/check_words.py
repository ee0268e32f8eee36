"""Numbers and phrases of a check's page, and what follows from its data for one sentence."""

import math
from collections.abc import Iterable, Mapping, Sequence

from halfulp.check.report import CheckReport, Row
from halfulp.errors import FormatError
from halfulp.formats import format_bits
from halfulp.report import words
from halfulp.report.price import FAIL, PASS

NOT_FINITE = "not finite"
RATIO = (0.5, 2.0)  # outside, a prediction failed its self-test
_MOST_MEMBERS = 4
_KINDS = {
    "overflow": "values of {sites} become inf",
    "saturated": "values of {sites} exceed the largest of the format",
    "nonlinear": "{sites} beyond the linear range",
    "shrinkage": "rounding scales {sites} instead of scattering",
    "bias": "errors of {sites} point one way",
    "flushed": "in {sites} over 1 % of the entries become 0",
}


def kl(value: float) -> str:
    """Two digits with an exponent, "3.1e-5"; "–" for what is unknown, "∞" for inf."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.replace('-', '−')}e{int(exponent)}"


def number(value: float, digits: int = 3) -> str:
    """A number of moderate size; "–" for NaN, "∞" for inf."""
    return f"{value:.{digits}g}" if math.isfinite(value) else kl(value)


def times(value: float, budget: float) -> str:
    """How often the budget: "0.32 ×", "9.6 ×", "< 0.01 ×"; "not finite" for NaN and inf."""
    part = value / budget
    if not math.isfinite(part):
        return NOT_FINITE
    if part < 0.01:
        return "< 0.01 ×"
    if 0.95 <= part < 1.05:
        return f"{part:.3f} ×"
    return f"{part:#.2g} ×".replace(". ×", " ×") if part < 99.5 else f"{part:,.0f} ×"


def of_budget(value: float, budget: float) -> str:
    """ "0.32 × the budget"; "not finite" for NaN and inf."""
    return times(value, budget) + (" the budget" if math.isfinite(value) else "")


def bits(word: str) -> float:
    """Bits of a format's element with its share of the scales; NaN for words it does not know."""
    try:
        return format_bits(word)
    except FormatError:
        return math.nan


def safe(row: Row, budget: float) -> bool:
    """Whether the measured run stayed inside the budget; NaN and inf did not."""
    return row.measured_kl <= budget


def verdict(row: Row, budget: float) -> str:
    """pass or fail of one measured run."""
    return PASS if safe(row, budget) else FAIL


def narrowest(rows: Iterable[Row], budget: float) -> list[Row]:
    """The safe rows of fewest bits, the best of them first; [] when none is safe."""
    fits = [row for row in rows if safe(row, budget) and bits(row.name) == bits(row.name)]
    least = min((bits(row.name) for row in fits), default=math.nan)
    return sorted((r for r in fits if bits(r.name) == least), key=lambda r: r.measured_kl)


def block_costs(report: CheckReport, word: str, family: str) -> dict[str, float]:
    """Predicted KL of each block in a format: of its "stored" tensors or its GEMM "operand"s."""
    if family == "stored":
        return {block: cells.get(word, math.nan) for block, cells in report.heat.items()}
    found: dict[str, float] = {}
    for site in report.every_site:
        if site.family == family and word in site.kl:
            price = site.kl[word]
            found[site.block] = found.get(site.block, 0.0) + (0.0 if price != price else price)
    return found


def costliest(costs: Mapping[str, float]) -> tuple[str, float]:
    """The block that costs most and its share of all; ("", NaN) when nothing costs anything."""
    known = {block: cost for block, cost in costs.items() if cost == cost}
    if not known or max(known.values()) <= 0:
        return "", math.nan
    block = max(known, key=lambda b: known[b])
    if math.isinf(known[block]):
        return block, math.nan
    return block, known[block] / math.fsum(known.values())


def trouble(report: CheckReport, word: str, family: str) -> str:
    """ "most in layers.0.attn (39 %)"; "" when it is not known."""
    block, share = costliest(block_costs(report, word, family))
    if not block:
        return ""
    return f"most in {block} ({words.share(share)})" if share == share else f"inf in {block}"


def family(word: str) -> str:
    """What people call a format's family: "FP8", "16-bit formats", …"""
    size = bits(word)
    if size != size:
        return word
    if word.startswith("int"):
        return f"INT{round(size)}"
    return "16-bit formats" if 9 < size <= 16 else f"FP{math.floor(size)}"


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by family, widest first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: -math.floor(bits(r.name)) if bits(r.name) > 0 else 0):
        found.setdefault(family(row.name), []).append(row)
    return found


def cause(report: CheckReport, row: Row, operands: bool) -> str:
    """Why prediction and measurement of a row may differ by more than RATIO."""
    if not math.isfinite(row.measured_kl):
        return "the run gave NaN or inf"
    if not math.isfinite(row.ratio) or RATIO[0] <= row.ratio <= RATIO[1]:
        return ""
    wanted = {s.name for s in report.every_site if (s.family == "operand") == operands}
    counts: dict[str, int] = {}
    for finding in report.findings:
        if finding.format == row.name and finding.site in wanted:
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
    said = [
        text.format(sites=_sites(counts[kind])) for kind, text in _KINDS.items() if kind in counts
    ]
    if not said and row.measured_kl < 1e-9:
        said = ["the measured KL is near the noise of fp32"]
    return "; ".join(said[:2]) or "no detector names a cause; more probes make the price surer"


def _sites(n: int) -> str:
    return "1 site" if n == 1 else f"{n} sites"


def members(rows: Sequence[Row], budget: float) -> str:
    """ "e4m3 1.1 ×, mxfp8 1.1 × the budget"; a single one is not named."""
    if len(rows) == 1:
        return of_budget(rows[0].measured_kl, budget)
    shown = [f"{row.name} {times(row.measured_kl, budget)}" for row in rows[:_MOST_MEMBERS]]
    rest = f" and {len(rows) - _MOST_MEMBERS} more" if len(rows) > _MOST_MEMBERS else ""
    ended = math.isfinite(rows[min(len(rows), _MOST_MEMBERS) - 1].measured_kl)
    return f"{', '.join(shown)}{rest}{' the budget' if ended else ''}"


def capital(text: str) -> str:
    """`text` with a capital first letter, unless it begins with a name such as te_current."""
    first = text.split(" ", 1)[0]
    return words.sentence(text) if first.isalpha() else text


def plan_bits(report: CheckReport) -> str:
    """ "7.74 bits on average", of the plan."""
    average = report.plan.average_bits
    return f"{average:.3g} bits on average" if math.isfinite(average) else "average bits unknown"
