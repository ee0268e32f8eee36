"""Run every script, or those that are named, print the results and write reproduce/RESULTS.md."""

import sys
from pathlib import Path
from types import ModuleType

from reproduce import (
    attention_bias,
    bit_reduction,
    blockwise_lr,
    guarded_run,
    lr_window,
    roundoff,
    roundoff_models,
    scaling,
    sharpness,
    stochastic_rounding,
)
from reproduce.common import show
from reproduce.results import Section, render
from reproduce.runs import open_runs

SCRIPTS = (stochastic_rounding, bit_reduction)  # a part of each trains in the pool
MEASURED = (
    roundoff,
    roundoff_models,
    sharpness,
    blockwise_lr,
    guarded_run,
    attention_bias,
    lr_window,
    scaling,
)
PAGE = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    """The exit status says that everything ran, not what came out."""
    chosen = _chosen(sys.argv[1:])
    sections = []
    with open_runs() as runs:
        pooled = [script for script in SCRIPTS if script in chosen]
        for script in pooled:
            runs.start(script.trained)
        for script in pooled:
            rows = show(script.quick()) + show(script.trained(runs))
            sections.append(Section(script, rows))
    sections += [Section(s, show(s.claims())) for s in MEASURED if s in chosen]
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(render(sections, page), encoding="utf-8")
    print(f"written: {PAGE.name}")


def _chosen(names: list[str]) -> list[ModuleType]:
    """The scripts called `names`, all without any; SystemExit 2 for a name that is none."""
    scripts = {script.__name__.rpartition(".")[2]: script for script in (*SCRIPTS, *MEASURED)}
    for name in names:
        if name not in scripts:
            print(f"there is no script {name!r}; there are: {', '.join(scripts)}", file=sys.stderr)
            raise SystemExit(2)
    return [scripts[name] for name in names] or list(scripts.values())


if __name__ == "__main__":
    main()
