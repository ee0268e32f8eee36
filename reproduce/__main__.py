"""Run every script, print its results and write reproduce/RESULTS.md."""

from pathlib import Path

from reproduce import bit_reduction, roundoff, roundoff_models, stochastic_rounding
from reproduce.common import show
from reproduce.results import Section, render
from reproduce.runs import open_runs

SCRIPTS = (stochastic_rounding, bit_reduction)  # a part of each trains in the pool
MEASURED = (roundoff, roundoff_models)
PAGE = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    """The exit status says that everything ran, not what came out."""
    with open_runs() as runs:
        for script in SCRIPTS:
            runs.start(script.trained)
        sections = [
            Section(script, show(script.quick()) + show(script.trained(runs))) for script in SCRIPTS
        ]
    sections += [Section(script, show(script.claims())) for script in MEASURED]
    PAGE.write_text(render(sections), encoding="utf-8")
    print(f"written: {PAGE.name}")


if __name__ == "__main__":
    main()
