"""BF16 attention rounds one way when scores tie at the row's maximum, and how to stop it.

Set-up. Rows of 64 scores, `ties` of them equal to the maximum 8, the rest about 16 below; values
are bf16 and negative on average (-2 ± 0.5), as in the channels that failed in arXiv:2510.04212.
P̄ = exp(score − m) is rounded to bf16, P̄V is summed exactly and rounded to bf16 once: what is left
is the last rounding, in units of the last place, over 32 768 rows. With m the maximum, tied P̄ are
exactly 1: the sum of two values of equal exponent has one bit too many and often lies half way
between two bf16 numbers, and the small terms of the other tokens, all of one sign, push it the same
way every time. The cure of that paper, m = β times the maximum for β > 1, makes P̄ a number with
digits of its own. Whether training fails of it takes a GPU: benchmarks/attention_bias_gpu.py.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfulp.numerics.rounding import round_to
from reproduce.common import Interval, Result, interval, judge, show, together

PAPER = "arXiv:2510.04212"
SAMPLES, ROWS, TOKENS = 8, 4096, 64
TOP, REST = 8.0, -8.0  # scores at the maximum and mean of the others


def claims() -> Iterator[Result]:
    """The rounding error of P̄V with and without ties and shift."""
    for ties in (2, 3):
        yield _bias_claim(ties)
    yield _single_claim()
    for beta in (2.0, 8.0):
        yield _shift_claim(beta)
    yield _sign_claim()


def error_ulp(ties: int, *, beta: float = 1.0, mean: float = -2.0) -> tuple[Interval, Interval]:
    """(mean error, mean |error|) of the last rounding of P̄V, in ulp of the result."""
    found = [_errors(ties, beta, mean, seed) for seed in range(SAMPLES)]
    return interval([e.mean().item() for e in found]), interval(
        [e.abs().mean().item() for e in found]
    )


def _errors(ties: int, beta: float, mean: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = round_to(mean + 0.5 * torch.randn(ROWS, TOKENS, generator=generator), "bf16")
    scores = REST + torch.randn(ROWS, TOKENS, generator=generator)
    scores[:, :ties] = TOP
    p = round_to(torch.exp(scores.double() - beta * TOP).float(), "bf16")
    exact = (p.double() * v.double()).sum(1)
    # fp64 to fp32 before bf16: twice rounded, but the sum has few enough digits to survive it.
    rounded = round_to(exact.float(), "bf16").double()
    return (rounded - exact) / torch.exp2(exact.abs().log2().floor() - 7)


def _bias_claim(ties: int) -> Result:
    bias, size = error_ulp(ties)
    return Result(
        f"{ties} tied scores: the rounding of P̄V is biased towards the sign of the values, by at "
        "least 0.1 ulp",
        PAPER,
        f"mean {bias.text('+.3f')} ulp, mean size {size.mean:.3f} ulp",
        judge(bias, below=-0.1),
    )


def _single_claim() -> Result:
    bias, size = error_ulp(1)
    return Result(
        "One maximum, no tie: the value itself is a bf16 number, and only the small terms are lost "
        "(at most 0.01 ulp)",
        "derived",
        f"mean {bias.text('+.4f')} ulp, mean size {size.mean:.4f} ulp",
        together(judge(bias, above=-0.01, below=0.01), judge(size, below=0.01)),
    )


def _shift_claim(beta: float) -> Result:
    bias, size = error_ulp(2, beta=beta)
    before = error_ulp(2)[0]
    return Result(
        f"m = {beta:g} × the maximum removes at least 90% of the bias of two ties, and nothing of "
        "the error's size",
        PAPER,
        f"mean {bias.text('+.4f')} ulp (without {before.mean:+.3f}), mean size {size.mean:.3f} ulp",
        together(
            judge(bias, above=0.1 * before.mean, below=-0.1 * before.mean),
            judge(size, above=0.2, below=0.3),
        ),
    )


def _sign_claim() -> Result:
    bias, _ = error_ulp(2, mean=2.0)
    return Result(
        "The bias has the sign of the values: positive ones are rounded up by at least 0.1 ulp",
        "derived",
        f"mean {bias.text('+.3f')} ulp",
        judge(bias, above=0.1, below=math.inf),
    )


if __name__ == "__main__":
    show(claims())
