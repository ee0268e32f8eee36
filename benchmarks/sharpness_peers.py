"""Sharpness beside curvlinops and PyHessian: agreement, and the time to a 5 % error.

All on one batch of a trained toy (reproduce/toy.py), block type by block type; peers are given the
parameters of one type at a time, which is how they are asked for a block. Their attention is the
model's own eager code, since they need forward mode or double backward.
"""

import copy
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Absent, section, table
from torch import Tensor, nn

import halfulp
from halfulp.pieces import Piece, pieces
from halfulp.sharpness.hessian import Hessian, twice_differentiable
from halfulp.sharpness.lanczos import eigenvalues

WANTED = 0.05
GOAL_TIME, GOAL_EIGENVALUE = 0.2, 0.01


@dataclass(frozen=True)
class Trace:
    """Trace of one block type, its standard error, and seconds to a relative error of WANTED."""

    value: float
    error: float
    seconds: float

    @staticmethod
    def of(samples: Tensor, seconds: float) -> "Trace":
        """From estimates that took `seconds` in all."""
        std, mean = samples.std().item(), samples.mean().item()
        needed = max(2.0, (std / mean / WANTED) ** 2)
        return Trace(mean, std / len(samples) ** 0.5, seconds / len(samples) * needed)


Found = dict[str, Trace] | Absent


@dataclass(frozen=True)
class Subject:
    """A trained model, one batch [B, T], and its pieces by block type."""

    model: nn.Module
    ids: Tensor

    def by_type(self) -> dict[str, list[Piece]]:
        parts = pieces(self.model)
        return {k: [p for p in parts if p.kind == k] for k in dict.fromkeys(p.kind for p in parts)}


class Flat(nn.Module):
    """Logits [B (T−1), V] of the positions that predict something, for the peers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits[:, :-1].flatten(0, 1)


def clock(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `work` returns, and its CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def ours(s: Subject, estimator: str, draws: int) -> Found:
    """One measurement for all types: each takes the time of all of it."""
    halfulp.sharpness(s.model, s.ids, estimator=estimator, draws=2)
    start = time.process_time()
    report = halfulp.sharpness(s.model, s.ids, estimator=estimator, draws=draws)
    taken = time.process_time() - start
    found = {}
    for kind in s.by_type():
        members = [i for i, p in enumerate(report.pieces) if p.kind == kind]
        found[kind] = Trace.of(report.traces[:, members].sum(1), taken)
    return found


def curvlinops(s: Subject, operator: str, probes: int) -> Found:
    """Hutchinson's estimate by curvlinops' operator of that name, one per block type."""
    try:
        library = importlib.import_module("curvlinops")
    except ImportError as error:
        return Absent(f"not installed (pip install curvlinops-for-pytorch): {error}")
    flat, targets = Flat(s.model), s.ids[:, 1:].flatten()
    named = dict(flat.model.named_parameters())
    found = {}
    for kind, members in s.by_type().items():
        made = getattr(library, operator)(
            flat, nn.CrossEntropyLoss(), [named[p.parameter] for p in members],
            [(s.ids, targets)], check_deterministic=False,
            num_data=len(targets), batch_size_fn=lambda _: len(targets),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        v = torch.randint(0, 2, (made.shape[1], probes), generator=generator) * 2.0 - 1
        try:
            _ = made @ v[:, 0]
        except RuntimeError as error:
            return Absent(f"fails: {str(error).splitlines()[0]}")
        samples, taken = clock(lambda a=made, v=v: (v * (a @ v)).sum(0))
        found[kind] = Trace.of(samples.double(), taken)
    return found


def pyhessian(s: Subject, probes: int) -> tuple[Found, dict[str, float]]:
    """(traces, top eigenvalues by power iteration) by PyHessian, one block type after another."""
    try:
        library = importlib.import_module("pyhessian")
    except ImportError as error:
        return Absent(f"not installed (pip install pyhessian): {error}"), {}
    traces, tops = {}, {}
    for kind, members in s.by_type().items():
        flat, wanted = Flat(s.model), {p.parameter for p in members}
        for name, p in flat.model.named_parameters():
            p.requires_grad_(name in wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # backward() with create_graph
            made = library.hessian(
                flat, nn.CrossEntropyLoss(), data=(s.ids, s.ids[:, 1:].flatten()), cuda=False
            )
        torch.manual_seed(0)
        samples, taken = clock(lambda h=made: torch.tensor(h.trace(maxIter=probes, tol=0.0)))
        traces[kind] = Trace.of(samples.double(), taken)
        tops[kind] = made.eigenvalues(maxIter=500, tol=1e-5)[0][0]
    return traces, tops


def largest(s: Subject) -> dict[str, float]:
    """Our largest eigenvalue of each type."""
    with twice_differentiable(s.model):
        hessian = Hessian(s.model, s.ids, pieces(s.model))
        found = eigenvalues(hessian, generator=torch.Generator().manual_seed(0))
    return {kind: e.value for kind, e in found.items()}


def cells(found: Found, kind: str, numel: int) -> list[str]:
    if isinstance(found, Absent):
        return [found.why.split(":")[0], ""]  # the reason stands below the table
    t = found[kind]
    return [f"{t.value / numel:.3e} ± {abs(t.error / t.value):.1%}", f"{t.seconds:.2f}"]


def compare(family: str, *, quick: bool) -> None:
    """Tables of traces, of the time to WANTED, and of eigenvalues."""
    sys.path.append(str(Path(__file__).parents[1]))
    from reproduce.toy import toy

    made = toy(family)
    s = Subject(made.model, made.batch(4))
    probes = 16 if quick else 64
    gnb, probed = ours(s, "gnb", 4 * probes), ours(s, "hutchinson", probes)
    ggn = curvlinops(s, "GGNLinearOperator", probes)
    hessian = curvlinops(s, "HessianLinearOperator", probes)
    power, tops = pyhessian(s, probes)
    columns = {
        "GNB": gnb, "curvlinops GGN": ggn,
        "Hutchinson": probed, "curvlinops Hessian": hessian, "PyHessian": power,
    }  # fmt: skip
    lines = []
    for kind, members in s.by_type().items():
        numel = sum(p.numel for p in members)
        lines.append([kind, *(c for found in columns.values() for c in cells(found, kind, numel))])
    head = ["block type", *(h for name in columns for h in (name, "s to 5 %"))]
    text = (
        f"Sharpness ± its standard error, and CPU seconds to a relative error of {WANTED:.0%} "
        f"({4 * probes} draws of GNB, {probes} probes of the others, 1 thread, one batch of "
        f"{s.ids[:, 1:].numel()} predictions). A draw of ours measures all types, a probe of the "
        f"peers one.\n\n{table(head, lines)}"
    )
    for name, found in columns.items():
        if isinstance(found, Absent):
            text += f"\n\n{name} {found.why.rstrip('.')}."
    for name, peer, mine in (
        ("curvlinops GGN", ggn, gnb), ("curvlinops Hessian", hessian, probed),
        ("PyHessian", power, probed),
    ):  # fmt: skip
        text += agreement(name, mine, peer)
    section(f"{made.name}: agreement with curvlinops and PyHessian", text)
    if tops:
        spectrum(made.name, largest(s), tops)


def agreement(name: str, mine: Found, peer: Found) -> str:
    """A sentence: how far apart, in per cent and in standard errors, and who is faster."""
    if isinstance(mine, Absent) or isinstance(peer, Absent):
        return ""
    apart = {k: mine[k].value / peer[k].value - 1 for k in mine}
    sigmas = {
        k: abs(mine[k].value - peer[k].value) / (mine[k].error ** 2 + peer[k].error ** 2) ** 0.5
        for k in mine
    }
    far, sigma = max(apart, key=lambda k: abs(apart[k])), max(sigmas, key=lambda k: sigmas[k])
    ratio = max(t.seconds for t in mine.values()) / sum(t.seconds for t in peer.values())
    met = f" (goal {GOAL_TIME:g}, {'met' if ratio <= GOAL_TIME else 'missed'})"
    return (
        f"\n\nOurs against {name}: at most {abs(apart[far]):.1%} apart ({far}) and "
        f"{sigmas[sigma]:.1f} combined standard errors ({sigma}); all types to {WANTED:.0%} in "
        f"{ratio:.2f} of its time{met if name == 'curvlinops GGN' else ''}."
    )


def spectrum(name: str, mine: dict[str, float], tops: dict[str, float]) -> None:
    """The table of largest eigenvalues."""
    lines = [[k, f"{mine[k]:.4g}", f"{tops[k]:.4g}", f"{mine[k] / tops[k] - 1:+.2%}"] for k in mine]
    worst = max(abs(mine[k] / tops[k] - 1) for k in mine)
    met = "met" if worst <= GOAL_EIGENVALUE else "missed"
    head = ["block type", "Lanczos", "PyHessian, power iteration", "ours over theirs"]
    section(
        f"{name}: largest eigenvalue of the Hessian",
        f"{table(head, lines)}\n\nWithin {GOAL_EIGENVALUE:.0%} is the goal: {met}.",
    )
