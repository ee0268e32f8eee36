"""How many of many seeds fail when attention rounds P̄V to bf16, with and without shifted maxima.

`python benchmarks/attention_bias_gpu.py [--seeds 20] [--steps 2000] [--limit S] [--dry]`. A GPT-2
style model of 10.7 M parameters (6 layers of 384 channels, context 256) on the bytes of Python's
standard library, bf16 autocast, AdamW at 1e-3 without decay, 8192 tokens a step: the setting in
which arXiv:2510.04212 finds failures, ten times smaller. Attention is written out as flash
attention computes it: P̄ = exp(S − m) and O = P̄V in bf16, δ = rowsum(dO ∘ O) from the rounded O.
Arms: `bf16`, `shifted` (m = 4 × a positive maximum that ties) and `fp32` (P̄V is not rounded). A
run has failed when the median of its last 5 % of losses is more than 0.3 nats above its smallest
smoothed loss, or not finite. Needs a CUDA device; --dry runs tiny sizes on the CPU.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass

import torch
from common import section, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ARMS = ("bf16", "shifted", "fp32")
LR, BETAS, WARMUP = 1e-3, (0.9, 0.95), 100
TIE, BETA = 1e-3, 4.0  # scores closer than TIE count as tied


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    seed: int
    steps: int
    dry: bool


class Flash(torch.autograd.Function):
    """Causal attention [B, H, T, C] with the roundings of flash attention, per `arm`."""

    @staticmethod
    def forward(ctx, q, k, v, arm):
        scale = 1 / math.sqrt(q.shape[-1])
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        s = (q.float() @ k.float().mT * scale).masked_fill(~causal, -math.inf)
        m = s.amax(-1, keepdim=True)
        if arm == "shifted":
            tied = ((s > m - TIE).sum(-1, keepdim=True) > 1) & (m > 0)
            m = torch.where(tied, BETA * m, m)
        p = torch.exp(s - m)
        total = p.sum(-1, keepdim=True)
        p_low = p.to(torch.bfloat16).float()
        o = p_low @ v.float()
        o = o if arm == "fp32" else o.to(torch.bfloat16).float()
        o = (o / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, p / total)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, o, p = ctx.saved_tensors
        delta = (g.float() * o.float()).sum(-1, keepdim=True)
        low = p.to(torch.bfloat16)
        dv = low.mT @ g.to(torch.bfloat16)
        dp = (g.to(torch.bfloat16) @ v.to(torch.bfloat16).mT).float()
        ds = (p * (dp - delta) * ctx.scale).to(torch.bfloat16)
        return ds @ k.to(torch.bfloat16), ds.mT @ q.to(torch.bfloat16), dv, None


class Block(nn.Module):
    """Pre-norm attention and a GELU feed-forward part."""

    def __init__(self, width: int, heads: int, arm: str) -> None:
        super().__init__()
        self.heads, self.arm = heads, arm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        parts = self.qkv(self.norm1(x_BTD)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = (parts[:, :, i].transpose(1, 2) for i in range(3))
        o = Flash.apply(q, k, v, self.arm).transpose(1, 2).reshape(b, t, d)
        x_BTD = x_BTD + self.out(o)
        return x_BTD + self.down(nn.functional.gelu(self.up(self.norm2(x_BTD))))


class Gpt(nn.Module):
    """GPT-2 as nanoGPT initializes it, embedding and head tied."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, context: int, arm: str):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, arm) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                small = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if small else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.token(ids_BT) + self.place.weight[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD) @ self.token.weight.T


def run(job: Job) -> dict:
    """Losses of one run, its seconds and whether it failed."""
    from halfulp.data import DataConfig, open_data
    from halfulp.numerics.kernel import cache_directory

    device = "cpu" if job.dry else "cuda"
    shape = (32, 2, 2, 16) if job.dry else (384, 6, 6, 256)
    rows, context = (2, 16) if job.dry else (32, 256)
    data = open_data(DataConfig(), cache_directory() / "data")
    torch.manual_seed(job.seed)
    model = Gpt(data.vocab, *shape, job.arm).to(device)
    ids = torch.empty(rows, context + 1, dtype=torch.long, device=device)
    lr = torch.tensor(LR, device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True,
        capturable=not job.dry,
    )  # fmt: skip
    step = _step(model, optimizer, ids)
    losses, start = torch.empty(job.steps, device=device), time.perf_counter()
    for i in range(job.steps):
        ids.copy_(data.batch("train", i, rows=rows, length=context, seed=job.seed))
        lr.fill_(LR * min(1.0, (i + 1) / WARMUP))
        if i == 3 and not job.dry:
            step = _graph(step)
        losses[i] = step()
    found = losses.tolist()
    return {"loss": _tail(found), "failed": _failed(found), "seconds": time.perf_counter() - start}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor):
    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    return step


def _graph(step):
    """The same step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _tail(losses: list[float]) -> float:
    return statistics.median(losses[-max(1, len(losses) // 20) :])


def _failed(losses: list[float]) -> bool:
    if not all(map(math.isfinite, losses)):
        return True
    window = max(1, len(losses) // 40)
    smooth = [statistics.fmean(losses[i : i + window]) for i in range(0, len(losses), window)]
    return _tail(losses) > min(smooth) + 0.3


def main() -> None:
    """A table: failures with their exact 95 % bound, and losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds; then no new run")
    parser.add_argument("--dry", action="store_true")
    a = parser.parse_args()
    from halfulp.tasks import run_tasks

    arms = a.arms.split(",")
    jobs = iter([Job(arm, s, a.steps, a.dry) for s in range(a.seeds) for arm in arms])
    found: dict[str, list[dict]] = {arm: [] for arm in arms}
    end = time.monotonic() + a.limit
    next_job = lambda: next(jobs, None) if time.monotonic() < end else None  # noqa: E731
    for outcome in run_tasks(run, next_job, jobs=a.jobs):
        if outcome.error or outcome.died:
            raise RuntimeError(f"{outcome.task}: {outcome.died or outcome.error}")
        found[outcome.task.arm].append(outcome.value)
    head = ("P̄V", "failed", "95 % bounds", "training loss", "s a run")
    rows = [_row(item) for item in found.items() if item[1]]
    section("Attention that rounds P̄V to bf16: how many seeds fail", table(head, rows))


def _row(item: tuple[str, list[dict]]) -> tuple[str, ...]:
    from halfulp.sweep.failures import Failures

    arm, runs = item
    failed = sum(r["failed"] for r in runs)
    bound = Failures(failed, len(runs))
    losses = [r["loss"] for r in runs]
    spread = f"{statistics.fmean(losses):.3f}"
    if len(losses) > 1:
        spread += f" ± {statistics.stdev(losses):.3f}"
    seconds = f"{statistics.median(r['seconds'] for r in runs):.0f}"
    return arm, f"{failed}/{len(runs)}", f"{bound.lower:.0%} to {bound.upper:.0%}", spread, seconds


if __name__ == "__main__":
    # Workers find functions by their module, and this one is called __main__.
    import attention_bias_gpu

    attention_bias_gpu.main()
