"""What `halfulp plan` prints: the plan, the precisions beside each other, flags and notes."""

from typing import TYPE_CHECKING

from halfulp.cli.show import print_table

if TYPE_CHECKING:
    from halfulp.plan.budget import Plan
    from halfulp.plan.facts import Facts


def print_plan(plan: "Plan", facts: "Facts | None") -> None:
    """Everything but the paragraph for managers."""
    from halfulp.report.plan_tables import columns, plan_rows

    print_table(columns("what"), plan_rows(plan))
    _print_precisions(plan)
    if facts is not None:
        _print_corpus(plan, facts)
    for flag in plan.flags:
        print(f"out of range: {flag}")
    for note in plan.notes:
        print(f"note: {note}")


def _print_precisions(plan: "Plan") -> None:
    from halfulp.report.plan_tables import columns, crossing_sentence, precision_rows

    print(f"\nPrecisions; chosen: {plan.chosen.precision}, {plan.why}")
    print_table(columns("precision_columns"), precision_rows(plan))
    for comparison in plan.comparisons:
        print(crossing_sentence(comparison))
    for why in plan.refused.values():
        print(f"left out: {why}")
    print()


def _print_corpus(plan: "Plan", facts: "Facts") -> None:
    from halfulp.report.plan_tables import corpus_sentences

    for sentence in corpus_sentences(plan, facts):
        print(f"corpus: {sentence}")
