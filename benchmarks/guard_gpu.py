"""halfulp.Guard on a GPU: what a healthy step costs, that nothing waits, and a drill of faults.

`python benchmarks/guard_gpu.py [--quick]`. Model: Llama shape of transformers, bf16 autocast, fused
AdamW. The loop with and without a guard take turns, so that a ratio is of one moment.
"""

import statistics
import sys
import time

import torch
from torch import Tensor, nn

import halfulp

QUICK = "--quick" in sys.argv
STEPS, TURNS = (10, 3) if QUICK else (20, 7)
VOCAB, ROWS, LENGTH = 4096, 8, 512


def build(hidden: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, vocab_size=VOCAB, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda().train()


def batches(count: int, rows: int = ROWS, length: int = LENGTH) -> list[Tensor]:
    """A language in which one of four tokens follows each token."""
    chance = torch.Generator().manual_seed(1)
    follow = torch.randint(0, VOCAB, (VOCAB, 4), generator=chance)
    tokens = torch.empty(count * rows, length, dtype=torch.long)
    tokens[:, 0] = torch.randint(0, 64, (count * rows,), generator=chance)
    for i in range(1, length):
        turn = torch.randint(0, 4, (count * rows,), generator=chance)
        tokens[:, i] = follow[tokens[:, i - 1], turn] % 64
    return list(tokens.cuda().split(rows))


class Loop:
    """A model that is trained; `step` is one step of the user's loop."""

    def __init__(
        self,
        guarded: bool,
        *,
        hidden: int,
        layers: int,
        policy: str | None = None,
        lr: float = 3e-4,
    ) -> None:
        self.model = build(hidden, layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        self.events: list[dict] = []
        self.guard = None
        if guarded:
            self.guard = halfulp.Guard(
                self.model,
                self.optimizer,
                policy=policy,
                log=self.events.append,
                snapshot_every=50 if layers == 2 else 10_000,
            )

    def step(self, batch: Tensor) -> bool:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        answer = self.guard is None or self.guard.step(loss)
        if answer:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return answer


def seconds(loop: Loop, data: list[Tensor]) -> float:
    """Of one step; the mean over `data`."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    for batch in data:
        loop.step(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - before) / len(data)


def overhead(hidden: int, layers: int) -> str:
    """A row of the table: parameters, milliseconds without, the ratio with a guard, a snapshot."""
    data, loops = batches(STEPS), [Loop(g, hidden=hidden, layers=layers) for g in (False, True)]
    for loop in loops:
        seconds(loop, data[:5])  # the rehearsal, the first snapshot, the allocator
    ratios, plain = [], []
    for _ in range(TURNS):
        a, b, c = (seconds(loops[i], data) for i in (0, 1, 0))
        plain.append((a + c) / 2)
        ratios.append(b / plain[-1])
    keeper, took = loops[1].guard._keeper, []
    for _ in range(keeper.ring.most + 2):  # later ones use the memory of those that were dropped
        torch.cuda.synchronize()
        start = time.perf_counter()
        keeper.snapshot(keeper.ring.snapshots[-1].step + 1)
        torch.cuda.synchronize()
        took.append((time.perf_counter() - start) * 1000)
    parameters = sum(p.numel() for p in loops[0].model.parameters())
    middle = statistics.median(ratios)
    spread = f"{min(ratios):.3f} … {max(ratios):.3f}"
    ms = statistics.median(plain) * 1000
    goal = "met" if middle <= 1.02 else "missed"
    return (
        f"| {parameters / 1e6:.0f} M | {ms:.1f} | {middle:.3f} ({spread}) | ≤ 1.02, {goal} | "
        f"{took[-1]:.0f}, {took[0]:.0f} |"
    )


def waits(guarded: bool) -> str:
    """Whether a healthy step makes the host wait for the device."""
    loop, data = Loop(guarded, hidden=256, layers=2), batches(12, 2, 64)
    for batch in data[:4]:
        loop.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data[4:]:
            loop.step(batch)
    except RuntimeError as error:
        return f"yes ({error})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no (`torch.cuda.set_sync_debug_mode('error')`)"


def identical(policy: str | None) -> str:
    """Whether weights and moments are those of the loop without a guard, bit by bit."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    plain, again, watched = (_trained(policy, guarded) for guarded in (False, False, True))
    if all(map(torch.equal, plain, watched)):
        return "yes"
    repeats = all(map(torch.equal, plain, again))
    return "no" if repeats else "no, nor are two loops without a guard identical to each other"


def _trained(policy: str | None, guarded: bool) -> list[Tensor]:
    loop = Loop(guarded, hidden=256, layers=2, policy=policy)
    if policy and not guarded:
        halfulp.quantize(loop.model, policy)
    for batch in batches(40, 2, 64):
        loop.step(batch)
    assert not loop.events, loop.events
    parameters = list(loop.model.parameters())
    return [*parameters, *(loop.optimizer.state[p]["exp_avg_sq"] for p in parameters)]


def drill(fault: str) -> str:
    """A row: the fault, and what the guard has made of it."""
    loop, data = Loop(True, hidden=256, layers=2, lr=1e-3), batches(420, 8, 64)
    at, before = 380, None
    for i, batch in enumerate(data):
        if i == at and fault == "bad batch":
            chance = torch.Generator().manual_seed(2)
            batch = torch.randint(0, VOCAB, batch.shape, generator=chance).cuda()
        if i == at and fault == "weight × 8":
            with torch.no_grad():
                loop.model.get_parameter("lm_head.weight").mul_(8)
        if i == at:
            before = [p.detach().clone() for p in loop.model.parameters()]
        loop.step(batch)
        if i == at and fault == "bad batch":
            same = [torch.equal(p, q) for p, q in zip(loop.model.parameters(), before, strict=True)]
            held = "weights unmoved" if all(same) else "weights moved"
    if not loop.events:
        return f"| {fault} | not seen | | | |"
    event = loop.events[0]
    said = "; ".join(event["done"])
    if fault == "bad batch":
        said += f"; {held}"
    return (
        f"| {fault} | {event['trigger']}, {event['step'] - at - 1} | {event['verdict']} | {said} | "
        f"{len(loop.events)} |"
    )


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("guard_gpu measures on a GPU, and this PyTorch sees none.")
    print("## Guard on a GPU\n")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16 autocast, fused AdamW, "
    )
    print(f"{ROWS} × {LENGTH} tokens a step; median of {TURNS} ratios of {STEPS} steps (range).\n")
    print("| parameters | ms a step without | with, ratio | goal | ms a snapshot, first |")
    print("| ---: | ---: | --- | --- | ---: |")
    for hidden, layers in ((512, 8), (1024, 16)):
        print(overhead(hidden, layers), flush=True)
    print(f"\nA healthy step waits for the device: {waits(True)}; without a guard: {waits(False)}.")
    for policy in (None, "te_current", "te_delayed"):
        words = identical(policy)
        print(f"\n40 steps bit-identical to the loop without a guard, {policy or 'bf16'}: {words}.")
    print("\n| fault in step 381 | seen as, delay | verdict | done | incidents |")
    print("| --- | --- | --- | --- | ---: |")
    for fault in ("bad batch", "weight × 8"):
        print(drill(fault), flush=True)


if __name__ == "__main__":
    main()
