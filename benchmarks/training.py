"""Cost of a simulated low-precision training step, as a multiple of the fp32 step.

    python benchmarks/training.py [--quick] [--threads N]

A Llama-style model of 2.9 M parameters (3 layers, width 256, vocabulary 2048), 8 × 128 tokens a
step, torch's fused AdamW. In the simulated ones every linear of every block multiplies E4M3 values
in the forward pass (nearest, scaled per tensor) and E5M2 gradients in the backward pass
(stochastic). QPyTorch is optional: pip install qtorch ninja.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from torch import Tensor, nn

import halfulp
from halfulp.optim import AdamW, param_groups
from halfulp.policy import Policy
from halfulp.quantization import Quantized
from halfulp.train import checkpoint
from halfulp.train.config import ModelConfig, load_config
from halfulp.train.model import build_model, next_token_loss
from halfulp.train.open import Start, open_session
from halfulp.train.parallel import open_world
from halfulp.train.session import Session
from halfulp.train.sharpness import MONITOR, measure
from halfulp.train.state import snapshot
from halfulp.train.step import run_step

VOCAB, ROWS, LENGTH = 2048, 8, 128
COUNT_EVERY = load_config({}).train.count_every
GOALS = {
    "FP8": 1.05,
    "FP8, exact carrier (bf16)": 0.8,
    "int8, exact carrier": 0.8,
}
Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """A model with its training step."""

    model: nn.Module
    step: Callable[[], object]
    handle: Quantized | None = None
    optimizer: torch.optim.Optimizer | None = None


def policy(forward: str, gradient: str, out: str = "fp32") -> Policy:
    """Every linear of every block with these operands; head and attention in fp32."""
    linear = {"fprop": forward, "dgrad_g": gradient, "dgrad_w": forward}
    linear |= {"wgrad_g": gradient, "wgrad_x": forward, "out": out}
    recipe = {"extends": "fp32", "linear": linear}
    rules = [{"match": "*", "recipe": "simulated"}]
    return Policy.from_table({"recipes": {"simulated": recipe}, "rule": rules})


FP8 = policy("e4m3@tensor:current", "e5m2@tensor:current:stochastic")
FP8_POWER_OF_TWO = policy("e4m3@tensor:current:p2", "e5m2@tensor:current:p2:stochastic", "bf16")
INT8 = policy("int8@row:current", "int8@row:current:stochastic", "bf16")


def variant(
    model: nn.Module, rules: Policy | str | None = None, *, carrier: str = "fp32",
    own: bool = False, rows: int = ROWS, length: int = LENGTH,
) -> Variant:  # fmt: skip
    """The step of a copy of `model` under a policy; `own`: with halfulp's optimizer."""
    model = copy.deepcopy(model)
    handle = halfulp.quantize(model, rules, carrier=carrier) if rules else None
    if own and handle is not None:
        optimizer: torch.optim.Optimizer = AdamW(param_groups(model, handle.resolution))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)
    batch_BT = torch.randint(0, VOCAB, (rows, length + 1), generator=generator)
    batch_BT = batch_BT.to(next(model.parameters()).device)

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(model, batch_BT).backward()
        optimizer.step()

    return Variant(model, step, handle, optimizer)


class FakeQuantized(torch.autograd.Function):
    """y = x wᵀ as simulations usually write it: quantizers are plain functions of a tensor."""

    @staticmethod
    def forward(ctx, x, w, forward_quantizer: Quantize, gradient_quantizer: Quantize):
        ctx.quantizer = gradient_quantizer
        x, w = forward_quantizer(x), forward_quantizer(w)
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = ctx.quantizer(g)
        return g @ w, g.flatten(0, 1).T @ x.flatten(0, 1), None, None


def fake_quantized(model: nn.Module, forward: Quantize, gradient: Quantize) -> nn.Module:
    """A copy of `model` whose block linears are `FakeQuantized`."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            module.forward = lambda x, m=module: FakeQuantized.apply(x, m.weight, forward, gradient)
    return model


def naive(x: Tensor, mantissa: int, smallest: int, largest: float, stochastic: bool) -> Tensor:
    """Fake quantization per tensor in the torch ops that first come to mind."""
    scale = largest / x.abs().max()
    y = x * scale
    step = torch.exp2(torch.floor(torch.log2(y.abs().clamp_min(2.0**smallest))) - mantissa)
    steps = y / step
    steps = torch.floor(steps + torch.rand_like(steps)) if stochastic else torch.round(steps)
    return (steps * step).clamp(-largest, largest) / scale


def with_naive_torch(model: nn.Module) -> nn.Module:
    return fake_quantized(
        model,
        lambda x: naive(x, 3, -6, 448.0, False),
        lambda g: naive(g, 2, -14, 57344.0, True),
    )


def with_qtorch(model: nn.Module) -> nn.Module:
    """QPyTorch's rounding between our scales: it has none of its own."""
    from qtorch.quant import float_quantize

    def quantizer(exp: int, man: int, largest: float, rounding: str) -> Quantize:
        def run(x: Tensor) -> Tensor:
            scale = largest / x.abs().max()
            return float_quantize(x * scale, exp=exp, man=man, rounding=rounding) / scale

        return run

    gradient = quantizer(5, 2, 57344.0, "stochastic")
    return fake_quantized(model, quantizer(4, 3, 448.0, "nearest"), gradient)


def eager(model: nn.Module) -> dict[str, Variant | Absent]:
    variants: dict[str, Variant | Absent] = {
        "fp32": variant(model),
        "FP8": variant(model, FP8),
        "FP8, exact carrier (bf16)": variant(model, FP8_POWER_OF_TWO, carrier="exact"),
        "int8, exact carrier": variant(model, INT8, carrier="exact"),
        "te_current (split and fast accumulators)": variant(model, "te_current"),
        "naive torch": variant(with_naive_torch(model)),
    }
    try:
        variants["QPyTorch"] = variant(with_qtorch(model))
    except (ImportError, RuntimeError, OSError) as error:
        variants["QPyTorch"] = Absent(f"not installed (pip install qtorch ninja): {error}")
    return variants


def compiled(model: nn.Module) -> dict[str, Variant | Absent]:
    variants: dict[str, Variant | Absent] = {
        "fp32, compiled": variant(model),
        "FP8, compiled": variant(model, FP8),
    }
    for made in variants.values():
        assert isinstance(made, Variant)
        made.model.compile()
    return variants


def ratios(
    variants: dict[str, Variant | Absent], times: dict[str, Time], goals: dict[str, float]
) -> str:
    """Milliseconds, multiples of the first variant (by minimum and by median), and the goals."""
    base = times[next(iter(variants))]
    lines = []
    for name, made in variants.items():
        if isinstance(made, Absent):
            lines.append([name, made.why.splitlines()[0], "", "", ""])
            continue
        time = times[name]
        best, median = time.best / base.best, time.median / base.median
        ms = f"{time.best * 1e3:.1f}"
        lines.append([name, ms, f"{best:.3f}", f"{median:.3f}", verdict(best, goals.get(name))])
    return table(["step", "ms", "× first (min)", "× first (median)", "goal"], lines)


def compare(
    title: str, variants: dict[str, Variant | Absent], goals: dict[str, float], threads: int,
    seconds: float,
) -> None:  # fmt: skip
    steps = {name: v.step for name, v in variants.items() if isinstance(v, Variant)}
    times = interleave(steps, threads=threads, seconds=seconds)
    section(f"{title}, {how(threads)}", ratios(variants, times, goals))


def counters(model: nn.Module, threads: int, seconds: float) -> list[list[str]]:
    """What a step with counters costs beyond a step, spread over the default interval."""
    lines = []
    for name, rules in (("FP8", FP8), ("nvfp4", "nvfp4_all")):
        made = variant(model, rules, own=True)

        def counted(made: Variant = made) -> None:
            assert made.handle is not None
            assert isinstance(made.optimizer, AdamW)
            made.handle.count(True)
            made.optimizer.count(True)
            made.step()
            made.handle.counters()
            made.optimizer.counters()
            made.handle.count(False)
            made.optimizer.count(False)

        steps = {"plain": made.step, "counted": counted}
        times = interleave(steps, threads=threads, seconds=seconds)
        share = (times["counted"].best / times["plain"].best - 1) / COUNT_EVERY * 100
        what = f"counters every {COUNT_EVERY} steps, {name}, % of a step"
        lines.append([what, f"{share:.2f}", verdict(share, 2.0)])
    return lines


@contextmanager
def run_in(
    folder: str, policy: dict[str, str] | None = None, *, guard: bool = False
) -> Iterator[Session]:
    """A run of the model and step of this benchmark, about to begin."""
    config = load_config(
        {
            "data": {"length": LENGTH, "max_tokens": 200_000},
            "train": {"rows": ROWS, "device": "cpu"},
            "policy": policy or {},
            "guard": {"on": guard},
            "run": {"out": f"{folder}/run"},
        }
    )
    start = Start(command=("benchmark",))
    with open_world(config.train) as world, open_session(config, world, start, None) as session:
        yield session


def checkpoints(threads: int, seconds: float) -> list[list[str]]:
    """Taking a snapshot of a run, and writing it to disk, in training steps of that run."""
    with tempfile.TemporaryDirectory() as folder, run_in(folder) as session:
        steps = {
            "step": lambda: run_step(session, interrupted=False),
            "snapshot": lambda: snapshot(session),
            "save": lambda: checkpoint.save(Path(folder), snapshot(session), keep=1),
        }
        times = interleave(steps, threads=threads, seconds=seconds)
    copied, saved = (times[name].best / times["step"].best for name in ("snapshot", "save"))
    return [
        ["snapshot of weights and optimizer, steps", f"{copied:.2f}", verdict(copied, 1.0)],
        ["snapshot, sha256 and write to disk, steps", f"{saved:.2f}", ""],
    ]


def sharpness(threads: int, seconds: float) -> list[list[str]]:
    """What measuring the sharpness of every block at the default interval adds to a run."""
    lines = []
    for recipe in ("fp32", "te_delayed"):
        with tempfile.TemporaryDirectory() as folder, run_in(folder, {"recipe": recipe}) as s:
            every, draws = s.config.sharpness.every, s.config.sharpness.draws
            steps = {
                "step": lambda s=s: run_step(s, interrupted=False),
                "measured": lambda s=s, d=draws: measure(s, draws=d, key=MONITOR),
            }
            times = interleave(steps, threads=threads, seconds=seconds)
        draw = times["measured"].best / times["step"].best
        lines.append([f"sharpness of every block, {recipe}, steps", f"{draw:.2f}", ""])
        share = draw / every * 100
        what = f"the same every {every} steps, % of the run"
        lines.append([what, f"{share:.2f}", verdict(share, 2.0)])
    return lines


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--no-compile", action="store_true", help="leave out the compiled steps")
    args = cli.parse_args()
    if not args.threads:
        print(f"## Training step\n\n{machine()}", flush=True)
        per_threads(__file__, args)
        return
    use_threads(args.threads)
    seconds = 3.0 if args.quick else 15.0
    model = build_model(ModelConfig(preset="llama-3m"), vocab=VOCAB, length=LENGTH, seed=0).model
    compare("Eager", eager(model), GOALS, args.threads, seconds)
    lines = [*counters(model, args.threads, seconds), *checkpoints(args.threads, seconds / 3)]
    lines += sharpness(args.threads, seconds / 3)
    section(f"Around the step, {how(args.threads)}", table(["what", "figure", "goal"], lines))
    if not (args.no_compile or args.quick):
        goals = {"FP8, compiled": 1.08}
        compare("torch.compile", compiled(model), goals, args.threads, seconds)


if __name__ == "__main__":
    main()
