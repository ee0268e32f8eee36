"""Simulated formats on a GPU, and the real FP8 GEMM beside the simulated one.

    python benchmarks/gpu.py [--quick] [--part NAME …]

Parts: rounding, training, compiled, optimizer, agreement, gemm, run. Times are CUDA events around
several calls in a row, variants in turns. Needs a CUDA device; --dry runs the script on the CPU
with tiny sizes, where its figures mean nothing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from common import Absent, section, table
from gpu_bench import Bench, Run
from gpu_fp8 import agreement, gemm_speed
from torch import Tensor, nn
from training import (
    COUNT_EVERY,
    FP8,
    FP8_POWER_OF_TWO,
    INT8,
    LENGTH,
    ROWS,
    VOCAB,
    Variant,
    ratios,
    variant,
    with_naive_torch,
)

from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.optim import AdamW
from halfulp.policy import Policy
from halfulp.train.config import ModelConfig, load_config
from halfulp.train.loop import train
from halfulp.train.model import build_model

KEY = Key.of(0, "benchmark")
QUANTIZERS = (
    "e4m3",
    "e4m3:stochastic",
    "e4m3@tensor:current",
    "e5m2@tensor:current:stochastic",
    "e4m3@1x32:e8m0_up",
    "e2m1@1x16:nvfp4",
)


def rounding(b: Bench) -> None:
    """Fake quantization of a tensor beside a copy into an existing one."""
    sizes = (1 << 12, 1 << 14) if b.dry else (1 << 24, 1 << 26)
    results = []
    for size in sizes:
        x = torch.randn(size // 1024, 1024, generator=torch.manual_seed(0)).to(b.device)
        y = torch.zeros_like(x)
        runs: dict[str, Run] = {"copy_": lambda x=x, y=y: y.copy_(x)}
        for text in QUANTIZERS:
            runs |= _quantizer_runs(text, x, compiled=not b.dry)
        runs |= _casts(x, compiled=not b.dry)
        results.append(b.times(runs, calls=1 if b.dry else 20))
    lines = []
    for name in results[0]:
        values = [r[name].best / r["copy_"].best for r in results]
        lines.append([name, *(f"{v:.2f}" if v < 100 else f"{v:.0f}" for v in values)])
    rates = " and ".join(
        f"{8 * s / r['copy_'].best / 1e12:.2f}" for s, r in zip(sizes, results, strict=True)
    )
    head = ["what", *(f"2^{s.bit_length() - 1} × copy" for s in sizes)]
    text = f"`copy_` into an existing tensor moves {rates} TB/s, read and written.\n\n"
    section("Rounding", text + table(head, lines))


def _quantizer_runs(text: str, x: Tensor, *, compiled: bool) -> dict[str, Run]:
    q = parse_quantizer(text)
    key = KEY if q.stochastic else None
    runs: dict[str, Run] = {f"{text}, eager": lambda: apply_quantizer(x, q, key=key)}
    if compiled:
        traced = torch.compile(lambda x, key: apply_quantizer(x, q, key=key), dynamic=False)
        words = KEY.tensor() if q.stochastic else None
        runs[f"{text}, compiled"] = lambda: traced(x, words)
    return runs


def _casts(x: Tensor, *, compiled: bool) -> dict[str, Run]:
    """torch's own way there and back: nearest, and only to the formats it has."""

    def cast(x: Tensor) -> Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def scaled(x: Tensor) -> Tensor:
        scale = 448 / x.abs().amax()
        return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale

    runs: dict[str, Run] = {}
    for name, f in (("e4m3", cast), ("e4m3@tensor:current", scaled)):
        runs[f"torch .to(float8_e4m3fn).float(), {name}, eager"] = lambda f=f: f(x)
        if compiled:
            fused = torch.compile(f, dynamic=False)
            runs[f"torch .to(float8_e4m3fn).float(), {name}, compiled"] = lambda f=fused: f(x)
    return runs


def training(b: Bench) -> None:
    """The simulated step over the fp32 step of the same model."""
    small = build_model(ModelConfig(preset="llama-3m"), vocab=VOCAB, length=LENGTH, seed=0).model
    _compare_steps(b, "2.9 M parameters, 8 × 128 tokens", small, ROWS, LENGTH, naive=True)
    rows, length = (1, 16) if b.dry else (8, 1024)
    _compare_steps(b, "GPT-2 small, 8 × 1024 tokens", _gpt2(b), rows, length, naive=False)


def _gpt2(b: Bench) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": 1, "n_embd": 64, "n_head": 2} if b.dry else {}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **none, **shape))


def _compare_steps(
    b: Bench, title: str, model: nn.Module, rows: int, length: int, *, naive: bool
) -> None:
    model = model.to(b.device)

    def made(rules: Policy | str | None, **options: str) -> Variant:
        return variant(model, rules, rows=rows, length=length, **options)

    variants: dict[str, Variant | Absent] = {
        "fp32": made(None),
        "FP8": made(FP8),
        "FP8, exact carrier (bf16)": made(FP8_POWER_OF_TWO, carrier="exact"),
        "int8, exact carrier": made(INT8, carrier="exact"),
        "mxfp8": made("mxfp8"),
    }
    if naive or not b.quick:
        variants["te_current (split and fast accumulators)"] = made("te_current")
    if naive:  # it knows the linears of a Llama
        variants["naive torch"] = variant(with_naive_torch(model), rows=rows, length=length)
    times = b.times({n: v.step for n, v in variants.items() if isinstance(v, Variant)})
    count = sum(p.numel() for p in model.parameters()) / 1e6
    text = ratios(variants, times, {}) + f"\n\n{count:.1f} M parameters. {_counting(b, variants)}"
    section(f"Training step, {title}, eager", text)


def _counting(b: Bench, variants: dict[str, Variant | Absent]) -> str:
    made = variants["FP8"]
    assert isinstance(made, Variant)
    handle = made.handle
    assert handle is not None

    def counted() -> None:
        handle.count(True)
        made.step()
        handle.counters()
        handle.count(False)

    times = b.times({"plain": made.step, "counted": counted})
    extra = times["counted"].best / times["plain"].best - 1
    share = extra / COUNT_EVERY * 100
    return (
        f"A step of FP8 with counters costs {extra:+.0%}: every {COUNT_EVERY} steps, {share:.2f} % "
        "of the run (goal ≤ 2)."
    )


def compiled(b: Bench) -> None:
    """The same with torch.compile, which fuses the quantizers."""
    model = build_model(ModelConfig(preset="llama-3m"), vocab=VOCAB, length=LENGTH, seed=0).model
    model = model.to(b.device)
    variants: dict[str, Variant | Absent] = {"fp32, compiled": variant(model)}
    variants["FP8, compiled"] = variant(model, FP8)
    seconds = []
    for made in variants.values():
        assert isinstance(made, Variant)
        made.model.compile(backend="aot_eager" if b.dry else "inductor")
        start = time.perf_counter()
        made.step()
        seconds.append(time.perf_counter() - start)
    times = b.times({n: v.step for n, v in variants.items() if isinstance(v, Variant)}, least=20)
    first = " and ".join(f"{s:.0f}" for s in seconds)
    text = ratios(variants, times, {"FP8, compiled": 1.08})
    text += f"\n\nTheir first steps, with compilation, took {first} s."
    section("Training step, 2.9 M parameters, 8 × 128 tokens, torch.compile", text)


def optimizer(b: Bench) -> None:
    """One AdamW update of about 100 M parameters."""
    matrices, size = (2, 64) if b.dry else (25, 2048)
    fp32, bf16 = torch.float32, torch.bfloat16

    def made(dtype: torch.dtype) -> list[nn.Parameter]:
        parameters = [
            nn.Parameter(torch.randn(size, size, device=b.device)) for _ in range(matrices)
        ]
        for p in parameters:
            p.data = p.data.to(dtype)
            p.grad = torch.randn_like(p)
        return parameters

    stochastic = {"weight": "bf16", "update_rounding": "stochastic"}
    runs: dict[str, Run] = {
        "torch AdamW fp32, fused": torch.optim.AdamW(made(fp32), fused=True).step,
        "torch AdamW fp32, foreach": torch.optim.AdamW(made(fp32), foreach=True).step,
        "torch AdamW bf16, fused (nearest)": torch.optim.AdamW(made(bf16), fused=True).step,
        "halfulp, bf16 weights and gradients, stochastic": AdamW(made(bf16), **stochastic).step,
        "halfulp, fp32": AdamW(made(fp32)).step,
    }
    times = b.times(runs, calls=3)
    base, count = next(iter(times.values())).best, matrices * size**2
    lines = [
        [name, f"{t.best / count * 1e12:.1f}", f"{t.best / base:.2f}"] for name, t in times.items()
    ]
    section(
        f"AdamW, {count / 1e6:.0f} M parameters in {matrices} matrices",
        table(["update", "ps/parameter", "× torch fused fp32"], lines),
    )


def run(b: Bench) -> None:
    """The same training run, of the same seed, on the CPU and on the GPU."""
    steps = 4 if b.dry else 50 if b.quick else 200
    lines = []
    for recipe in ("fp32", "te_current"):
        cpu, gpu = (_losses(recipe, steps, device) for device in ("cpu", b.device))
        apart = [abs(x - y) for x, y in zip(cpu, gpu, strict=True)]
        cells = (apart[0], max(apart[:10]), max(apart), sum(apart) / steps)
        lines.append([recipe, *(f"{c:.1e}" for c in cells), f"{cpu[-1]:.4f}", f"{gpu[-1]:.4f}"])
    head = [
        "recipe",
        "step 1",
        "steps 1–10, max",
        "all, max",
        "all, mean",
        "last, CPU",
        "last, GPU",
    ]
    text = f"Training losses in nats, CPU minus GPU, {steps} steps of 8 × 128 tokens.\n\n"
    section("The same run on CPU and GPU, llama-3m", text + table(head, lines))


def _losses(recipe: str, steps: int, device: str) -> list[float]:
    losses: list[float] = []

    def note(event: dict) -> None:
        if event["event"] == "step":
            losses.append(event["loss_nats"])

    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "data": {"length": LENGTH, "max_tokens": 200_000},
            "train": {"rows": ROWS, "steps": steps, "device": device, "eval_every": 0},
            "policy": {"recipe": recipe},
            "run": {"out": f"{folder}/run"},
        }
        train(load_config(tables), on_event=note, command=("benchmark",))
    return losses


PARTS: dict[str, Callable[[Bench], None]] = {
    "rounding": rounding,
    "training": training,
    "compiled": compiled,
    "optimizer": optimizer,
    "agreement": agreement,
    "gemm": gemm_speed,
    "run": run,
}


def _heading(b: Bench) -> str:
    import transformers

    device = "dry run on the CPU" if b.dry else torch.cuda.get_device_name()
    return f"## GPU\n\n{device}; torch {torch.__version__}; transformers {transformers.__version__}"


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    cli.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to try the script")
    cli.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    args = cli.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        print("benchmarks/gpu.py needs a CUDA device; this PyTorch sees none.", file=sys.stderr)
        raise SystemExit(2)
    b = Bench(args.quick, args.dry)
    if args.part:
        for name in args.part:
            PARTS[name](b)
        return
    print(_heading(b), flush=True)
    for name in PARTS:  # each in its own process: memory and compiled code do not add up
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name], check=True)


if __name__ == "__main__":
    main()
