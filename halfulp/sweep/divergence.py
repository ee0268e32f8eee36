"""Whether a run has failed, and why.

Most runs of a small model that diverge never reach a loss that is not finite: they stay on a
plateau. Divergence is therefore a matter of the loss.
"""

import math

from halfulp.sweep.result import Result

RECOVERY_NATS = 0.3  # b: how far the end may lie above the best that the run has reached
MARGIN_NATS = 0.5  # c: how far the held-out loss may lie above the reference's best

NONFINITE, STOPPED = "not finite", "stopped by the guard"
UNRECOVERED, FAR, UNIGRAM = "not recovered", "far above the reference", "no better than unigrams"
REASONS = (NONFINITE, STOPPED, UNRECOVERED, FAR, UNIGRAM)


def reason_of(result: Result, *, reference_nats: float = math.nan) -> str:
    """Why the run counts as failed: one of REASONS, or "" if it does not.

    The first that holds of:

    * `not finite`: the loss or a gradient stopped being finite (a);
    * `stopped by the guard`: it could do no more;
    * `not recovered`: the median of the last training losses is more than 0.3 nat above the
      smallest smoothed one (b; halfulp.sweep.measure says over how many steps);
    * `far above the reference`: the held-out loss is more than 0.5 nat above `reference_nats`, the
      reference's mean at its best learning rate (c);
    * `no better than unigrams`: the held-out loss is not below that of the best model without
      context (d).

    What is nan cannot be compared, and gives no reason. Lost and refused runs have none: they are
    counted apart.
    """
    if result.status == "stopped":
        return STOPPED
    if result.status == "nonfinite":
        return NONFINITE
    if result.status != "finished":
        return ""
    if not math.isfinite(result.loss_nats):
        return NONFINITE
    if result.tail_nats > result.best_nats + RECOVERY_NATS:
        return UNRECOVERED
    if result.loss_nats > reference_nats + MARGIN_NATS:
        return FAR
    return UNIGRAM if result.loss_nats >= result.unigram_nats else ""


def score_nats(result: Result, *, initial_nats: float = math.nan) -> float:
    """The loss that the run counts with: min(held-out loss, loss at initialization).

    As in Wortsman et al. (arXiv:2309.14322), a run without a loss counts as one that has learned
    nothing. `initial_nats` stands in where the run has not recorded its own. nan for runs that are
    lost or refused.
    """
    if result.status not in ("finished", "nonfinite", "stopped"):
        return math.nan
    start = result.initial_nats if math.isfinite(result.initial_nats) else initial_nats
    if result.status != "finished" or not math.isfinite(result.loss_nats):
        return start
    return min(result.loss_nats, start) if math.isfinite(start) else result.loss_nats
