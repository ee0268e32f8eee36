"""`halfulp check`: cost and memory in forward passes, and prices beside other scores.

    python benchmarks/check.py [--quick] [--size small|full]

One thread, CPU time. The cost is that of models with random weights and 512 tokens: a Llama-style
one of 20 M parameters (6 layers, width 512, vocabulary 2048) and a GPT-2-style one of the same
size. The comparison is on byte models trained on the standard library (reproduce/toy.py), 512
tokens of held-out text; `--size full` takes those of 6 layers, and trains them if need be.
"""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from check_peers import compare_toys, plain_forward
from common import (
    Time,
    how,
    interleave,
    machine,
    parser,
    section,
    table,
    use_threads,
    verdict,
)
from torch import Tensor, nn
from training import FP8

from halfulp.batch import run
from halfulp.check.measure import measure, measure_policy, reference, uniform
from halfulp.check.prices import price
from halfulp.check.setup import prepare
from halfulp.check.trace import trace
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model

VOCAB, TOKENS, LENGTH = 2048, 512, 128
FIVE = ("bf16", "fp16", "e4m3", "e5m2", "e2m1")
FORWARD, STEP, PLAIN = "fp32 forward pass", "forward and backward pass", "1 + 3 passes, no sums"
PRICED, QUARTER = "pricing, K = 2 and margins", "pricing, rows = 0.25"
RUNS = ("measured run, uniform bf16", "measured run, uniform e4m3", "measured run, FP8 policy")
Work = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """A model in eval mode and token ids [B, T] for it."""

    model: nn.Module
    ids: Tensor


def subject(preset: str, *, length: int = LENGTH, **shape: Any) -> Subject:
    """A model with random weights and TOKENS random tokens in rows of `length`."""
    config = ModelConfig(preset=preset, **shape)
    model = build_model(config, vocab=VOCAB, length=length, seed=0).model.eval()
    generator = torch.Generator().manual_seed(0)
    return Subject(model, torch.randint(0, VOCAB, (TOKENS // length, length), generator=generator))


def gpt2() -> Subject:
    return subject("gpt2-3m", hidden=512, layers=6)


def probe(s: Subject, backward: int) -> None:
    """One forward pass and as many backward passes as pricing needs, and nothing else."""
    with prepare(s.model):
        logits = run(s.model, s.ids)
        v = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        for left in reversed(range(backward)):
            logits.backward(v, retain_graph=left > 0)
            for p in s.model.parameters():
                p.grad = None


def fused_forward(s: Subject) -> None:
    with prepare(s.model, attention="sdpa"), torch.no_grad():
        s.model(s.ids)


def check_works(s: Subject) -> tuple[dict[str, Work], int]:
    """What a check of five formats is made of, and the number of its sites."""
    stored = [site.name for site in price(s.model, s.ids, formats=("bf16",), probes=1).sites]
    ref = reference(s.model, s.ids)
    asked: dict[str, Any] = {"formats": FIVE, "probes": 2}
    works: dict[str, Work] = {
        FORWARD: lambda: plain_forward(s.model, s.ids),
        "fp32 forward pass, fused attention": lambda: fused_forward(s),
        STEP: lambda: probe(s, 1),
        PLAIN: lambda: probe(s, 3),
        PRICED: lambda: price(s.model, s.ids, **asked),
        QUARTER: lambda: price(s.model, s.ids, rows=0.25, **asked),
        RUNS[0]: lambda: measure(s.model, s.ids, uniform(stored, "bf16"), ref),
        RUNS[1]: lambda: measure(s.model, s.ids, uniform(stored, "e4m3"), ref),
        RUNS[2]: lambda: measure_policy(s.model, s.ids, FP8, ref),
    }
    return works, len(stored)


def cost(title: str, s: Subject, seconds: float, least: int) -> None:
    """The table of a check: pricing, three verification runs, and their sum."""
    works, sites = check_works(s)
    times = interleave(works, threads=1, seconds=seconds, least=least)
    base = times[FORWARD]
    lines = [_line(name, base, [t]) for name, t in times.items()]
    runs = [times[name] for name in RUNS]
    lines.append(_line("verification: the three runs", base, runs))
    for name in (PRICED, QUARTER):
        what = name.replace("pricing", "check: pricing") + ", verification"
        lines.append(_line(what, base, [times[name], *runs], 25.0))
    best = times[PRICED].best
    sums = (best - times[PLAIN].best) / best
    each = fmean(t.best for t in runs[:2]) / base.best * sites * len(FIVE)
    section(
        f"{title}, {sites} stored sites × {len(FIVE)} formats, {how(1)}",
        f"{_table(lines)}\n\nOf the pricing, {sums:.0%} is sums over rounding errors, hooks and "
        f"bookkeeping, the rest the passes. One run per site and format would take {each:.0f} "
        "forward passes.",
    )


def single_probe(seconds: float, least: int) -> None:
    """K = 1 and four formats on a GPT-2-style model (A14)."""
    s = gpt2()
    names = trace(s.model, s.ids, "bf16").names
    four: dict[str, Any] = {"formats": FIVE[:4], "probes": 1, "margins": False}
    works: dict[str, Work] = {
        FORWARD: lambda: plain_forward(s.model, s.ids),
        "forward and backward pass": lambda: probe(s, 1),
        "pricing, sites of a bf16 program": lambda: price(s.model, s.ids, sites=names, **four),
        "pricing, all stored sites": lambda: price(s.model, s.ids, **four),
    }
    times = interleave(works, threads=1, seconds=seconds, least=least)
    goals = {name: 12.0 for name in works if name.startswith("pricing")}
    lines = [_line(n, times[FORWARD], [t], goals.get(n)) for n, t in times.items()]
    section(f"One probe, 4 formats, no margins, GPT-2 style, {how(1)}", _table(lines))


def _line(name: str, base: Time, parts: list[Time], goal: float | None = None) -> list[str]:
    best, median = sum(t.best for t in parts), sum(t.median for t in parts)
    ratio = best / base.best
    return [name, f"{best * 1e3:.0f}", f"{ratio:.2f}", f"{median / base.median:.2f}",
            verdict(ratio, goal)]  # fmt: skip


def _table(lines: list[list[str]]) -> str:
    return table(["what", "ms", "× forward (min)", "× forward (median)", "goal"], lines)


MEMORY: dict[str, Callable[[Subject], object]] = {
    "training step without optimizer": lambda s: step(s),
    PRICED: lambda s: price(s.model, s.ids, formats=FIVE, probes=2),
    QUARTER: lambda s: price(s.model, s.ids, formats=FIVE, probes=2, rows=0.25),
    FORWARD: lambda s: plain_forward(s.model, s.ids),
    RUNS[1]: lambda s: _uniform_run(s),
}


def step(s: Subject) -> None:
    """Loss, backward pass, and the gradients of all weights at the end of it."""
    with prepare(s.model):
        logits = run(s.model, s.ids)[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, s.ids[:, 1:].flatten()).backward()


def _uniform_run(s: Subject) -> None:
    ref = reference(s.model, s.ids)
    names = trace(s.model, s.ids, "bf16").names
    measure(s.model, s.ids, uniform(names, "e4m3"), ref)


def memory_of(what: str, length: int) -> None:
    """Print by how many bytes the resident set grows at its peak, in this process."""
    MEMORY[what](subject("llama-tiny"))  # imports, kernels, thread pools
    s = subject("llama-20m", length=length)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    MEMORY[what](s)
    print(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def memory(length: int, works: Sequence[str]) -> None:
    """Peak memory of each work in a process of its own, beside a training step.

    The allocator is told to give every tensor from 128 KiB on back when it is freed: otherwise the
    peak depends by a third on what it keeps.
    """
    if sys.platform != "linux":
        section("Peak memory", "Not measured: it takes /proc/self/clear_refs of Linux.")
        return
    peaks, environment = {}, os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    for what in works:
        command = [sys.executable, __file__, "--memory", what, "--length", str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        peaks[what] = int(done.stdout)
    base = next(iter(peaks.values()))
    lines = [[what, f"{peak / 2**20:.0f}", f"{peak / base:.2f}",
              verdict(peak / base, 1.0 if what == PRICED else None)]
             for what, peak in peaks.items()]  # fmt: skip
    section(
        f"Peak memory beyond the fp32 weights, llama-20m, {TOKENS // length} × {length} tokens",
        table(["what", "MiB", "× training step", "goal"], lines),
    )


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--size", choices=("small", "full"), default="small", help="trained models")
    cli.add_argument("--memory", choices=tuple(MEMORY), help="only print the peak of one work")
    cli.add_argument("--length", type=int, default=LENGTH, help="tokens of a row, with --memory")
    args = cli.parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    use_threads(1)
    if args.memory:
        memory_of(args.memory, args.length)
        return
    print(f"## Check\n\n{machine()}", flush=True)
    seconds, least = (0.5, 1) if args.quick else (3.0, 3)
    for length in (LENGTH,) if args.quick else (LENGTH, TOKENS):
        s = subject("llama-20m", length=length)
        cost(f"llama-20m, {TOKENS // length} × {length} tokens", s, seconds, least)
        memory(length, tuple(MEMORY)[: 2 if args.quick else None])
    single_probe(seconds, least)
    compare_toys(args.size, seeds=2 if args.quick else 5, random=not args.quick)


if __name__ == "__main__":
    main()
