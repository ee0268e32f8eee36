"""The guard around an own loop on a GPU: does anything wait, what does it cost, what does it catch.

    python benchmarks/guard_gpu.py [--quick]

A GPT-2 on the bytes of this Python's library, torch's fused AdamW, te_current simulated in every
linear. Measured with CUDA events, guarded and unguarded stretches in turns.
"""

import argparse
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from common import section, table

import halfulp

RECIPE = "te_current"
SIZES = {
    "3 M, 8 × 256 tokens": (256, 3, 4, 8, 256),
    "86 M, 8 × 1024 tokens": (768, 12, 12, 8, 1024),
}


def model_of(hidden: int, layers: int, heads: int, length: int) -> torch.nn.Module:
    """A GPT-2 over bytes, without dropout, with weights that depend on nothing but its shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length, vocab_size=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().train()
    model.config.use_cache = False
    return model


def batches(rows: int, length: int) -> Iterator[torch.Tensor]:
    """Batches of consecutive text, on the device, without end."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    chance = torch.Generator().manual_seed(1)
    held = text.long().cuda()
    while True:
        starts = torch.randint(len(text) - length, (rows,), generator=chance)
        yield torch.stack([held[s : s + length] for s in starts.tolist()])


class Loop:
    """An own loop, with or without the guard."""

    def __init__(self, size: tuple[int, int, int, int, int], *, guarded: bool) -> None:
        hidden, layers, heads, rows, length = size
        self.model = model_of(hidden, layers, heads, length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.guard = None
        if guarded:
            self.guard = halfulp.Guard(self.model, self.optimizer, policy=RECIPE, steps=10_000)
        else:
            halfulp.quantize(self.model, RECIPE)
        self.data = batches(rows, length)

    def step(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        batch = next(self.data)
        self.train(batch if change is None else change(batch))

    def train(self, batch: torch.Tensor) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        if self.guard is None or self.guard.step(loss):
            self.optimizer.step()
        self.optimizer.zero_grad()


def waits(size: tuple[int, int, int, int, int], steps: int) -> str:
    """What a healthy guarded step waits for the device at, as torch reports it."""
    loop = Loop(size, guarded=True)
    for _ in range(steps):
        loop.step()
    held = list(islice(loop.data, 60))
    found: list[str] = []
    for batch in held:
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.train(batch)
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
            break
        finally:
            torch.cuda.set_sync_debug_mode("default")
    notes = f"; {'; '.join(loop.guard.notes)}" if loop.guard and loop.guard.notes else ""
    return (found[0] if found else f"none in {len(held)} healthy steps") + notes


def milliseconds(loop: Loop, steps: int) -> float:
    """Of one step, over a stretch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(steps):
        loop.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


def cost(size: tuple[int, int, int, int, int], turns: int, steps: int) -> list[object]:
    """Milliseconds of an unguarded and a guarded step, their ratio, and whether bits agree."""
    loops = {on: Loop(size, guarded=on) for on in (False, True)}
    taken: dict[bool, list[float]] = {False: [], True: []}
    for loop in loops.values():
        milliseconds(loop, 10)
    for _ in range(turns):
        for on, loop in loops.items():
            taken[on].append(milliseconds(loop, steps))
    off, on = (sorted(taken[key])[turns // 2] for key in (False, True))
    pairs = zip(loops[False].model.parameters(), loops[True].model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    incidents = len(loops[True].guard.incidents)  # pyright: ignore[reportOptionalMemberAccess]
    done = 10 + turns * steps
    return [f"{off:.2f}", f"{on:.2f}", f"{on / off:.3f}", f"{'equal' if same else 'differ'} "
            f"after {done} steps, {incidents} incidents"]  # fmt: skip


def drills(size: tuple[int, int, int, int, int]) -> list[list[object]]:
    """What the guard makes of three faults at step 150."""
    rows = []
    for name in ("bad batch", "weight × 8", "NaN in an embedding"):
        loop = Loop(size, guarded=True)
        for _ in range(150):
            loop.step()
        if name == "bad batch":
            loop.step(lambda batch: torch.randint_like(batch, 256))
        else:
            with torch.no_grad():
                weight = loop.model.transformer.h[1].mlp.c_proj.weight
                if name == "weight × 8":
                    weight.mul_(8)
                else:
                    loop.model.transformer.wte.weight[32].fill_(float("nan"))
            loop.step()
        for _ in range(5):
            loop.step()
        assert loop.guard is not None
        first = next(iter(loop.guard.incidents), None)
        said = [first.trigger.kind, first.verdict.kind, ", ".join(first.verdict.units) or "–",
                "; ".join(first.done)] if first else ["–"] * 4  # fmt: skip
        rows.append([name, *said, len(loop.guard.incidents)])
    return rows


def main() -> None:
    cli = argparse.ArgumentParser(description="The guard around an own loop on a GPU.")
    cli.add_argument("--quick", action="store_true", help="the small model only")
    args = cli.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none.", file=sys.stderr)
        raise SystemExit(2)
    sizes = dict(list(SIZES.items())[:1]) if args.quick else SIZES
    small = SIZES["3 M, 8 × 256 tokens"]
    print(f"## Guard on a GPU\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}.")
    section("Waiting for the device", f"3 M parameters: {waits(small, 80)}.")
    head = ["what is caught", "trigger", "verdict", "units", "done", "incidents"]
    section("Faults after 150 steps", table(head, drills(small)))
    for name, size in sizes.items():
        turns, steps = (4, 100) if name.startswith("3") else (3, 50)
        head = ["model", "ms a step", "guarded", "ratio", "weights with and without"]
        section(f"Cost, {name}", table(head, [[name, *cost(size, turns, steps)]]))


if __name__ == "__main__":
    main()
