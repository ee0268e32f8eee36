"""The first scaling laws, for comparison: Kaplan et al. 2020, arXiv:2001.08361.

N counts parameters without embeddings; losses in nats/token of WebText2.
"""

from halfulp.plan.laws import load_law

PF_DAY = 1e15 * 86_400  # FLOPs


def loss(n: float, d: float) -> float:
    """Loss of `n` parameters trained to convergence on `d` tokens (equation 1.5)."""
    c = load_law("kaplan").coefficients
    return ((c["N_j"] / n) ** (c["alpha_N"] / c["alpha_j"]) + c["D_j"] / d) ** c["alpha_j"]


def loss_of_parameters(n: float) -> float:
    """Loss of `n` parameters with unlimited data (equation 1.1)."""
    c = load_law("kaplan").coefficients
    return (c["N_c"] / n) ** c["alpha_N"]


def loss_of_tokens(d: float) -> float:
    """Loss of a large model stopped early on `d` tokens (equation 1.2)."""
    c = load_law("kaplan").coefficients
    return (c["D_c"] / d) ** c["alpha_D"]


def loss_of_compute(flops: float) -> float:
    """Loss for `flops` spent at best and at a small batch (equation 1.3)."""
    c = load_law("kaplan").coefficients
    return (c["C_c"] * PF_DAY / flops) ** c["alpha_C"]


def critical_batch_tokens(loss_nats: float) -> float:
    """The batch at which time and compute trade evenly (equation 1.4)."""
    c = load_law("kaplan").coefficients
    return c["B_star"] / loss_nats ** c["inverse_alpha_B"]
