"""How near healthy runs come to each threshold of the guard's numeric rules, as a Markdown table.

    python benchmarks/signals.py [--steps 300] [--seeds 3] [--lr 0.003] [--every 25] [RECIPE …]
    python benchmarks/signals.py --cost [RECIPE …]
    python benchmarks/signals.py --stuck [--steps 300] [--seeds 3] [--every 25]

Trains llama-tiny and gpt2-tiny (64 channels, 2 layers) with 256 bytes of the standard library's
source per step. For each rule: the largest threshold at which it would still have fired, window and
all, with a check every `--every` steps. Bold: above the threshold in force. `--stuck` holds one
delayed scale of each te_delayed run at 3 times what it should be, from the middle of the run on.
`--cost` times llama-3m with 1024 tokens per step, in seconds of the processor, one thread.
"""

import argparse
import math
import random
import statistics
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import halfulp
from halfulp.blocks import BlockMap, block_map
from halfulp.guard.flip_back import FlipBack
from halfulp.guard.numeric import Numeric
from halfulp.guard.probes import probes
from halfulp.guard.readings import Reading, readings_of, worst
from halfulp.guard.rules import Rule, rules
from halfulp.optim import AdamW, param_groups
from halfulp.policy import Policy
from halfulp.quantization import Quantized
from halfulp.site import histories
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model, next_token_loss

RECIPES = ("te_current", "te_delayed", "mxfp8", "nvfp4_all", "bf16_amp", "bf16_weights_sr")
LOSSY = ("bf16_weights", "fp8_unscaled", "mx_ocp", "coat", "intel_fp8_2t")
MODELS = ("llama-tiny", "gpt2-tiny")
ROWS, LENGTH = 8, 32
CHECK = 50  # train.count_every
Series = dict[tuple[str, str, bool], list[float]]  # rule, block, backward → one value per look


def main() -> None:
    """Train every recipe, and print a row for each."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("recipes", nargs="*", default=[*RECIPES, *LOSSY])
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--every", type=int, default=25)
    made.add_argument("--lr", type=float, default=3e-3)
    made.add_argument("--stuck", action="store_true", help="a fault instead of clean runs")
    made.add_argument("--cost", action="store_true", help="what looking costs")
    args = made.parse_args()
    torch.set_num_threads(1)
    if args.cost:
        for recipe in args.recipes:
            _cost(recipe)
        return
    if args.stuck:
        for seed in range(args.seeds):
            for model in MODELS:
                _stuck(model, args.steps, args.every, args.lr, seed)
        return
    looked = [rule for rule in rules().values() if rule.look != "replay"]
    print("| recipe | loss | " + " | ".join(rule.name for rule in looked) + " |")
    print("|---" * (len(looked) + 2) + "|")
    limits = ["/".join(f"{t:.3g}" for t in (r.warn, r.act) if t is not None) for r in looked]
    print("| *threshold* | | " + " | ".join(limits) + " |")
    for recipe in args.recipes:
        runs = [
            run(model, recipe, args.steps, args.every, args.lr, seed)
            for model in MODELS
            for seed in range(args.seeds)
        ]
        peaks = [max(peak(rule, series) for _, series in runs) for rule in looked]
        cells = [_cell(rule, value) for rule, value in zip(looked, peaks, strict=True)]
        loss = sum(loss for loss, _ in runs) / len(runs)
        print(f"| {recipe} | {loss:.3f} | " + " | ".join(cells) + " |", flush=True)


def _cost(recipe: str, repeats: int = 12) -> None:
    """Print the share of a step that each look costs, in the step where it is made."""
    model = build_model(ModelConfig(preset="llama-3m"), vocab=257, length=256, seed=0).model
    blocks, flips, numeric = block_map(model), FlipBack(), Numeric()
    handle = halfulp.quantize(model, _plain_sums(recipe), allow_partial=True)
    optimizer = AdamW(param_groups(model, handle.resolution, 0.1), lr=1e-3)
    batch, kinds = torch.randint(257, (4, 257)), ("plain", "stale", "codes", "check")
    times, step = {kind: [] for kind in kinds}, 0
    for _ in range(repeats):
        for kind in random.sample(kinds, len(kinds)):
            start = time.process_time()
            left = {"check": 0, "codes": 1}.get(kind, 9)
            _, readings = _step(model, blocks, optimizer, flips, batch, step, left, kind != "plain")
            numeric.observe(step, readings)
            times[kind].append(time.process_time() - start)
            step += 1
    base = statistics.median(times["plain"])
    more = {kind: statistics.median(values) / base - 1 for kind, values in times.items()}
    total = (more["check"] + 2 * more["codes"]) / CHECK + more["stale"] * bool(handle.stale())
    shown = ", ".join(f"{kind} {more[kind]:+.1%}" for kind in kinds[1:])
    print(f"{recipe}: {shown}; with a check every {CHECK} steps {total:.1%}", flush=True)


def _stuck(model: str, steps: int, every: int, lr: float, seed: int) -> None:
    """Print what the rules find of a scale that is too large from the middle of the run on."""
    numeric, first, shares = Numeric(), {}, []

    def fault(step: int, handle: Quantized, readings: list[Reading]) -> None:
        for found in numeric.observe(step, readings):
            first.setdefault((found.rule, found.level, found.place), step - steps // 2)
        shares.extend(r.value for r in readings if r.rule == "saturation" and step > steps // 2)
        if step >= steps // 2:  # from the next step on
            name = next(n for n in histories(handle.sites) if n.startswith("layers.1.ffn"))
            history, q = histories(handle.sites)[name]
            history.restore(q, history.amaxes)
            history.scale = 3 * history.scale

    loss, _ = run(model, "te_delayed", steps, every, lr, seed, fault)
    found = ", ".join(
        f"{rule} {level} after {n} steps ({p})" for (rule, level, p), n in first.items()
    )
    print(
        f"{model}, seed {seed}: saturated {max(shares):.0%}; {found}; loss {loss:.3f}", flush=True
    )


def run(
    preset: str, recipe: str, steps: int, every: int, lr: float, seed: int,
    after: Callable[[int, Quantized, list[Reading]], None] = lambda *_: None,
) -> tuple[float, Series]:  # fmt: skip
    """(mean loss of the last 20 steps, every look of the run); `after` is called after each."""
    model = build_model(ModelConfig(preset=preset), vocab=256, length=LENGTH, seed=seed).model
    blocks, flips, text = block_map(model), FlipBack(), _text()
    # The width of the sums is nothing that the signals depend on, and costs most of the time.
    handle = halfulp.quantize(model, _plain_sums(recipe), seed=seed, allow_partial=True)
    optimizer = AdamW(param_groups(model, handle.resolution, 0.1), lr=lr, seed=seed)
    chance, looks, losses = random.Random(seed), defaultdict(list), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            group["lr"] = lr * min(step / (0.05 * steps), cosine)
        starts = [chance.randrange(len(text) - LENGTH - 1) for _ in range(ROWS)]
        batch = torch.stack([text[i : i + LENGTH + 1] for i in starts]).long()
        left = -step % every  # steps to the next check
        loss, readings = _step(model, blocks, optimizer, flips, batch, step, left)
        losses.append(loss)
        after(step, handle, readings)
        for reading in worst(readings):
            looks[reading.rule, reading.block, reading.backward].append(reading.value)
    return sum(losses[-20:]) / 20, looks


def _step(
    model: torch.nn.Module, blocks: BlockMap, optimizer: AdamW, flips: FlipBack,
    batch: torch.Tensor, step: int, left: int, stale: bool = True,
) -> tuple[float, list[Reading]]:  # fmt: skip
    handle, check = model.__dict__["halfulp"], left == 0
    handle.set_step(step)
    handle.count(check)
    optimizer.count(check)
    with ExitStack() as stack:
        if left < 3:
            stack.enter_context(flips.look(model, step))
        seen = stack.enter_context(probes(model, blocks)) if check else []
        loss = next_token_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    handle.end_step()
    readings = readings_of(handle.stale()) if stale else []
    if check:
        counted = readings_of(handle.counters(), optimizer.counters())
        readings += [*seen, *flips.readings(), *(r for r in counted if r.rule != "stale")]
    return loss.item(), readings


def peak(rule: Rule, series: Series) -> float:
    """The largest threshold that the rule would still have broken; -inf without a look."""
    found = -math.inf
    for (name, *_), values in series.items():
        if name == rule.name:
            for end in range(1, len(values) + 1):
                window = sorted(values[max(0, end - rule.window) : end], reverse=True)
                if len(window) >= rule.needs:
                    found = max(found, window[rule.needs - 1])
    return found


def _cell(rule: Rule, value: float) -> str:
    if value == -math.inf:
        return "–"
    return f"**{value:.2g}**" if rule.threshold(value) is not None else f"{value:.2g}"


def _plain_sums(recipe: str) -> Policy:
    text = f'[recipes.plain]\nextends = "{recipe}"\n[recipes.plain.linear]\naccumulate = "fp32"\n'
    text += 'fprop_accumulate = "fp32"\n[[rule]]\nmatch = "*"\nrecipe = "plain"\n'
    with TemporaryDirectory() as folder:
        path = Path(folder) / "policy.toml"
        path.write_text(text)
        return Policy.load(path)


def _text() -> torch.Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


if __name__ == "__main__":
    main()
