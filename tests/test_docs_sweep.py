"""docs/sweep.md says what the code does: statuses, reasons and their signs."""

from pathlib import Path

from halfulp.report.sweep_plots import SIGNS
from halfulp.sweep.divergence import MARGIN_NATS, REASONS, RECOVERY_NATS
from halfulp.sweep.failures import Failures
from halfulp.sweep.interval import FEW
from halfulp.sweep.result import LOST, STATUSES
from halfulp.sweep.run import TRIES
from halfulp.sweep.spikes import CONVENTIONS
from halfulp.sweep.window import SHARE

DOC = (Path(__file__).parent.parent / "docs" / "sweep.md").read_text(encoding="utf-8")


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first column is called `head`."""
    table = DOC.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table]


def test_every_status_is_explained():
    found = {name: said for name, _, said in rows("status")}
    assert list(found) == list(STATUSES)
    assert {name for name, said in found.items() if said == "lost"} == set(LOST)
    assert TRIES == 2
    assert "is tried once more" in DOC


def test_every_reason_has_its_sign_and_its_threshold():
    found = rows("reason")
    assert {name: sign for name, sign, _ in found} == SIGNS
    assert [name for name, _, _ in found] == list(REASONS)
    assert f"{RECOVERY_NATS} nats above the best smoothed" in DOC
    assert f"{MARGIN_NATS} nats above the reference" in DOC


def test_constants_are_those_of_the_code():
    assert f"within {100 * SHARE:g} % of the reference's best" in DOC
    assert f"fewer than {FEW} seeds" in DOC
    for k, window in CONVENTIONS.values():
        assert f"{k:g} σ of {window}" in DOC
    assert f"0 of 3 leaves p ≤ {100 * Failures(0, 3).upper:.0f} %" in DOC
