"""Runs to fit a law to: parameters, tokens and held-out loss of each, and what makes them unfit."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfulp.errors import PlanError

LEAST_RUNS = 6
LEAST_VALUES = 3  # different N, and D: E, A and alpha are three unknowns
_APART = 0.05  # relative scatter of D around a power of N, below which the two are one variable
_UNITS = 3.0  # factor between C and 6 N D that another count of FLOPs explains
_SMALLEST = 1e3  # parameters, and tokens: below it the column is in millions or billions
_LARGEST = 1e18
_RATIO = 1e-2, 1e6  # tokens per parameter of the middle run; beyond, one of them is in millions
_HIGHEST = 20.0  # nats per token; guessing among 250,000 tokens costs 12.4
_COLUMNS = {
    "parameters": ("n", "params", "parameters"),
    "tokens": ("d", "tokens"),
    "loss_nats": ("loss", "loss_nats"),
    "flops": ("c", "flops"),
    "lr": ("lr",),
    "batch": ("batch",),
    "precision": ("bits", "precision", "recipe"),
}
_NEEDED = ("parameters", "tokens", "loss_nats")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished run, as it was written down."""

    name: str
    parameters: float
    tokens: float
    loss_nats: float
    flops: float | None = None
    rate: tuple[str, str] = ("", "")  # learning rate and batch
    precision: str = ""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Columns of one length; `notes` say which rows were left out, and why."""

    parameters: NDArray[np.float64]
    tokens: NDArray[np.float64]
    loss_nats: NDArray[np.float64]  # held out, per token
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def flops(self) -> NDArray[np.float64]:
        """6 N D of each run."""
        return 6.0 * self.parameters * self.tokens

    def where(self, chosen: NDArray[np.bool_]) -> "Runs":
        """The chosen runs alone."""
        names = tuple(name for name, kept in zip(self.names, chosen, strict=False) if kept)
        return replace(
            self, parameters=self.parameters[chosen], tokens=self.tokens[chosen],
            loss_nats=self.loss_nats[chosen], names=names,
        )  # fmt: skip

    def check(self) -> None:
        """PlanError where these runs cannot tell five coefficients."""
        for what, column in (("parameters", self.parameters), ("tokens", self.tokens)):
            _check_column(what, column)
        _check_losses(self.loss_nats)
        _check_ratio(self.parameters, self.tokens)
        rows = set(zip(self.parameters, self.tokens, self.loss_nats, strict=True))
        if len(rows) < LEAST_RUNS:
            same = f" ({len(self)} rows, the others repeat one of them)" * (len(rows) < len(self))
            raise PlanError(
                f"{len(rows)} runs cannot tell the five coefficients of a law{same}. Give "
                f"{LEAST_RUNS} or more, of {LEAST_VALUES} sizes and {LEAST_VALUES} lengths at "
                "least; 20 to 40 make a useful band."
            )
        for what, column in (("N", self.parameters), ("D", self.tokens)):
            if (values := len(np.unique(column))) < LEAST_VALUES:
                raise PlanError(
                    f"the runs have {values} different {what}, and its exponent needs "
                    f"{LEAST_VALUES}. Add runs with other {what}."
                )
        _check_apart(self.parameters, self.tokens)


def runs_of(rows: Sequence[Row], *, precision: str = "", notes: Sequence[str] = ()) -> Runs:
    """The rows of one precision, at the best learning rate and batch of each (N, D).

    Rows that are equal in everything count once. PlanError for rows of several precisions when none
    is chosen, for a `precision` that no row has, and for FLOPs far from 6 N D.
    """
    said = list(notes)
    labels = Counter(row.precision for row in rows)
    if len(labels) > 1 and not precision:
        raise PlanError(
            f"the runs are of {len(labels)} precisions ({_listed(labels)}), and a law is about "
            "one. Choose with --precision."
        )
    if precision and precision not in labels:
        raise PlanError(f"no run has the precision {precision!r}; there are {_listed(labels)}.")
    rows = [row for row in rows if not precision or row.precision == precision]
    if others := labels.total() - len(rows):
        said.append(f"{others} runs of other precisions are left out.")
    _check_units(rows)
    kept = _at_best_rate(list({replace(row, name=""): row for row in rows}.values()))
    if dropped := len(rows) - len(kept):
        said.append(
            f"{dropped} rows are left out: exact repeats, and runs at a learning rate or batch "
            "that another of the same N and D beats."
        )
    columns = (np.array([getattr(r, name) for r in kept], dtype=float) for name in _NEEDED)
    return Runs(
        **dict(zip(_NEEDED, columns, strict=True)),
        names=tuple(row.name for row in kept), notes=tuple(said),
    )  # fmt: skip


def read_csv(path: Path) -> list[Row]:
    """The rows of a table with the columns N, D and loss, and optionally C, lr, batch and bits.

    N and D may be called params or parameters, and tokens; the loss is held out, in nats per token.
    Commas, semicolons or tabs separate. PlanError naming the line of what is no number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the table {path} cannot be read: {error}. Give a CSV file.") from error
    header = text.partition("\n")[0]
    mark = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=mark, skipinitialspace=True)
    columns = _columns(path, reader.fieldnames or ())
    return [_row(path, reader.line_num, line, columns) for line in reader if any(line.values())]


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """What each column is → its name in the header."""
    found: dict[str, str] = {}
    for name in header:
        for what, words in _COLUMNS.items():
            if (name or "").strip().lower() in words:
                if what in found:
                    raise PlanError(f"{path} has two columns for {what}: {found[what]}, {name}.")
                found[what] = name
    if missing := [what for what in _NEEDED if what not in found]:
        raise PlanError(
            f"{path} has no column for {', '.join(missing)}; its header is "
            f"{', '.join(header) or 'empty'}. Name them N, D and loss (nats per token)."
        )
    return found


def _row(path: Path, line: int, cells: Mapping[str, str], columns: Mapping[str, str]) -> Row:
    if None in cells:
        raise PlanError(
            f"{path}, line {line} has more cells than the header. Write numbers with a point, and "
            "name every column."
        )

    def text(what: str) -> str:
        return (cells.get(columns.get(what, "")) or "").strip()

    def number(what: str) -> float:
        try:
            return float(text(what))
        except ValueError as error:
            raise PlanError(
                f"{path}, line {line}: {columns[what]} = {text(what)!r} is no number. Write it "
                "out, such as 7e9, or delete the line."
            ) from error

    return Row(
        name=f"line {line}", parameters=number("parameters"), tokens=number("tokens"),
        loss_nats=number("loss_nats"), flops=number("flops") if text("flops") else None,
        rate=(text("lr"), text("batch")), precision=text("precision"),
    )  # fmt: skip


def _at_best_rate(rows: Sequence[Row]) -> list[Row]:
    """The rows whose learning rate and batch have the least mean loss at their N and D."""
    groups: dict[tuple[float, float], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        rates = groups.setdefault((row.parameters, row.tokens), {})
        rates.setdefault(row.rate, []).append(row.loss_nats)
    best = {
        place: min(rates, key=lambda rate, rates=rates: float(np.mean(rates[rate])))
        for place, rates in groups.items()
    }
    return [row for row in rows if row.rate == best[row.parameters, row.tokens]]


def _check_column(what: str, column: NDArray[np.float64]) -> None:
    for value in column.tolist():
        if not (math.isfinite(value) and value > 0):
            raise PlanError(f"a run has {value:g} {what}. Every run needs a positive number.")
        if not _SMALLEST <= value <= _LARGEST:
            raise PlanError(
                f"a run has {value:g} {what}: the units are off. Write single {what}, such as "
                "7e9 for 7 billion."
            )


def _check_losses(losses: NDArray[np.float64]) -> None:
    for value in losses.tolist():
        if not (math.isfinite(value) and value > 0):
            raise PlanError(
                f"a run has the loss {value:g}. Give the held-out loss in nats per token, above "
                "0, and leave out runs that diverged."
            )
        if value > _HIGHEST:
            raise PlanError(
                f"a run has the loss {value:g}, which is worse than guessing: it may be a "
                "perplexity or a sum. Give nats per token, and leave out runs that diverged."
            )


def _check_ratio(n: NDArray[np.float64], d: NDArray[np.float64]) -> None:
    ratio = float(np.median(d / n))
    if not _RATIO[0] <= ratio <= _RATIO[1]:
        raise PlanError(
            f"the runs have about {ratio:.1g} tokens per parameter: the units of one of them are "
            "off. Write single parameters and single tokens, such as 7e9 and 1.4e11."
        )


def _check_units(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.flops is None or not row.parameters * row.tokens > 0:
            continue
        ratio = row.flops / (6 * row.parameters * row.tokens)
        if not 1 / _UNITS <= ratio <= _UNITS:
            raise PlanError(
                f"{row.name}: C = {row.flops:.3g} is {ratio:.3g} times 6 N D. One of N, D and C "
                "is in other units: give parameters, tokens and FLOPs, or leave C out."
            )


def _check_apart(n: NDArray[np.float64], d: NDArray[np.float64]) -> None:
    x, y = np.log(n), np.log(d)
    slope = float(np.cov(x, y)[0, 1] / x.var(ddof=1))
    rest = float(np.std(y - y.mean() - slope * (x - x.mean())))
    if rest < _APART:
        raise PlanError(
            f"in these runs D follows from N (D ∝ N^{slope:.2f}, to within {rest:.1%}), so that "
            "nobody can tell what parameters and what tokens do. Add runs of the same N with "
            "other D."
        )


def _listed(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{label or 'unnamed'}: {count}" for label, count in labels.items())
