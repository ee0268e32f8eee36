"""Cost of one AdamW update per parameter: stochastic bf16 weights against torch's fused fp32.

    python benchmarks/optimizer.py [--quick] [--threads N]

4.2 M parameters in four matrices. torchao is optional: pip install torchao.
"""

from collections.abc import Callable

import torch
from common import (
    Absent,
    Time,
    how,
    interleave,
    machine,
    parser,
    per_threads,
    section,
    table,
    use_threads,
    verdict,
)

from halfulp.optim import AdamW

SHAPE, MATRICES = (1024, 1024), 4
COUNT = MATRICES * SHAPE[0] * SHAPE[1]
BASE = "torch AdamW fp32, fused"
GOALS = {
    "halfulp, bf16 weights and gradients, stochastic": 0.8,
    "halfulp, bf16 weights, fp32 gradients, stochastic": 0.8,
}
Run = Callable[[], object]


def parameters(dtype: torch.dtype, gradient: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    """Random matrices with gradients; `gradient`: another dtype than that of the weights."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(MATRICES):
        weight, grad = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        p = torch.nn.Parameter(weight.to(dtype))
        if gradient is not None and gradient is not dtype:
            p.grad_dtype = gradient
        p.grad = grad.to(gradient or dtype)
        made.append(p)
    return made


def halfulp_runs() -> dict[str, Run]:
    bf16, fp32 = torch.bfloat16, torch.float32
    stochastic = {"weight": "bf16", "update_rounding": "stochastic"}
    rounded = "bf16:stochastic"  # the moments are bf16 numbers that fp32 tensors carry
    optimizers = {
        "halfulp, bf16 weights and gradients, stochastic": AdamW(parameters(bf16), **stochastic),
        "halfulp, bf16 weights, fp32 gradients, stochastic": AdamW(
            parameters(bf16, fp32), **stochastic
        ),
        "halfulp, bf16 weights and moments, stochastic": AdamW(
            parameters(bf16), **stochastic, moment_m=rounded, moment_v=rounded
        ),
        "halfulp, bf16 values carried in fp32, stochastic": AdamW(parameters(fp32), **stochastic),
        "halfulp, bf16 weights and gradients, nearest": AdamW(parameters(bf16), weight="bf16"),
        "halfulp, fp32": AdamW(parameters(fp32)),
    }
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def torch_runs() -> dict[str, Run]:
    fp32, bf16 = (parameters(dtype) for dtype in (torch.float32, torch.bfloat16))
    return {
        BASE: torch.optim.AdamW(fp32, fused=True).step,
        "torch AdamW fp32, foreach": torch.optim.AdamW(
            parameters(torch.float32), foreach=True
        ).step,
        "torch AdamW bf16, fused (nearest)": torch.optim.AdamW(bf16, fused=True).step,
    }


def torchao_runs(compiled: bool) -> dict[str, Run | Absent]:
    """torchao compiles its update by itself; eager is what it does where that is not possible."""
    try:
        from torchao.optim import _AdamW
    except (ImportError, OSError) as error:
        return {"torchao": Absent(f"not installed (pip install torchao): {error}")}
    name = "torchao _AdamW bf16, stochastic"
    one = _AdamW(parameters(torch.bfloat16), bf16_stochastic_round=True)

    def eager() -> None:
        with torch.compiler.set_stance("force_eager"):
            one.step()

    runs: dict[str, Run | Absent] = {f"{name}, eager": eager}
    if compiled:
        other = _AdamW(parameters(torch.bfloat16), bf16_stochastic_round=True)
        runs[f"{name}, compiled"] = other.step
    return runs


def rows(runs: dict[str, Run | Absent], times: dict[str, Time], threads: int) -> list[list[str]]:
    lines = []
    for name, run in runs.items():
        if isinstance(run, Absent):
            lines.append([name, run.why.splitlines()[0], "", ""])
            continue
        ratio = times[name].best / times[BASE].best
        ns = f"{times[name].best / COUNT * 1e9:.2f}"
        lines.append([name, ns, f"{ratio:.2f}", verdict(ratio, GOALS.get(name))])
    return lines


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    if not args.threads:
        print(f"## Optimizer\n\n{machine()}", flush=True)
        per_threads(__file__, args)
        return
    use_threads(args.threads)
    runs: dict[str, Run | Absent] = {**torch_runs(), **halfulp_runs()}
    runs |= torchao_runs(compiled=not args.quick)
    present = {name: run for name, run in runs.items() if not isinstance(run, Absent)}
    seconds = 0.5 if args.quick else 3.0
    times = interleave(present, threads=args.threads, seconds=seconds)
    head = ["update", "ns/parameter", "× torch fused fp32", "goal"]
    section(how(args.threads), table(head, rows(runs, times, args.threads)))


if __name__ == "__main__":
    main()
