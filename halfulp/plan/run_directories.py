"""Runs to fit a law to, from where they lie: tables, run directories, sweeps, folders of them.

N is the summary's `parameters`: all of them, the embedding included, a tied one once. D is the
tokens trained on, and the loss is the held-out one in the run's own arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfulp.errors import PlanError
from halfulp.plan.runs_table import Row, Runs, read_csv, runs_of


def read_runs(paths: Sequence[Path], *, precision: str = "") -> Runs:
    """The finished runs in `paths`: CSV files, run directories, sweeps, or folders that hold them.

    Runs that did not finish or diverged are left out, and a note says how many. PlanError where
    there is none, where runs were evaluated on different text, and as `runs_of` and `read_csv` do.
    """
    found = _Found()
    for path in paths:
        _read(path, found)
    if not found.rows:
        out = "; ".join(found.notes()) or "no row of a table, no run directory and no sweep"
        raise PlanError(
            f"no finished run in {', '.join(map(str, paths))} ({out}). Give a CSV file with "
            "N, D and loss, run directories, or sweeps."
        )
    if len(found.texts) > 1:
        raise PlanError(
            f"the runs were evaluated on {len(found.texts)} different texts "
            f"({'; '.join(sorted(found.texts))}): their losses do not compare. Give runs of one "
            "corpus and tokenizer."
        )
    return runs_of(found.rows, precision=precision, notes=found.notes())


@dataclass
class _Found:
    rows: list[Row] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # what the losses are about
    unfinished: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        pairs = (("not finished", self.unfinished), ("diverged", self.diverged))
        return [f"{len(n)} runs {what}: {_some(n)}." for what, n in pairs if n]

    def add(self, row: Row, *, finished: bool, diverged: bool, text: str) -> None:
        if diverged or not finished:
            (self.diverged if diverged else self.unfinished).append(row.name)
            return
        self.rows.append(row)
        if text:
            self.texts.add(text)


def _read(path: Path, found: _Found) -> None:
    from halfulp.sweep.store import is_sweep

    if path.exists() and not path.is_dir():
        found.rows += read_csv(path)
    elif is_sweep(path):
        _read_sweep(path, found)
    elif (path / "config.toml").is_file():
        _read_run(path, found)
    elif path.is_dir():
        for inner in _inside(path):
            _read(inner, found)
    else:
        raise PlanError(f"{path} does not exist. Give a CSV file, a run directory or a sweep.")


def _inside(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if (p / "config.toml").is_file())


def _read_run(path: Path, found: _Found) -> None:
    from halfulp.run import Run

    run = Run.open(path, writer=False)
    facts, train = run.summary(), run.config().get("train", {})
    batch = train.get("rows", 0) * train.get("accumulate", 1)
    row = Row(
        name=path.name,
        parameters=float(facts.get("parameters") or 0),
        tokens=float(facts.get("tokens") or 0),
        loss_nats=float(facts.get("loss_nats") or 0),
        rate=(f"{train.get('lr')}", f"{batch}"),
        precision=str(facts.get("recipe", "")),
    )
    reason = facts.get("reason")
    found.add(
        row, finished=reason == "finished", text=_text(facts.get("data") or {}),
        diverged=bool(facts.get("diverged")) or reason in ("nonfinite", "stopped"),
    )  # fmt: skip


def _read_sweep(path: Path, found: _Found) -> None:
    from halfulp.run import Run
    from halfulp.sweep.store import read_sweep

    stored = read_sweep(path)
    found.unfinished += [cell.id for cell in stored.missing()]
    for result in stored.results:
        row = Row(
            name=result.id, parameters=float(result.parameters), tokens=float(result.tokens),
            loss_nats=result.loss_nats, rate=(f"{result.lr}", ""), precision=result.recipe,
        )  # fmt: skip
        inner = Run(path / "runs" / result.id, writer=False)
        text = _text(inner.summary().get("data") or {}) or f"data set {result.data}"
        found.add(
            row, finished=result.status == "finished", text=text,
            diverged=result.status in ("nonfinite", "stopped"),
        )  # fmt: skip


def _text(data: dict[str, Any]) -> str:
    """What a held-out loss is about, as far as it decides whether losses compare."""
    if not data:
        return ""
    digest = (data.get("tokenizer") or {}).get("sha256") or "of the files"
    return (
        f"{data.get('tokens')} tokens, {data.get('val_tokens')} held out, vocabulary "
        f"{data.get('vocab')}, tokenizer {digest[:12]}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
