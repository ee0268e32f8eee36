"""Cost of blockwise sharpness in training steps, and its figures beside those of other libraries.

    python benchmarks/sharpness.py [--quick]

One thread, CPU time. The cost is that of models with random weights and 512 tokens: GPT-2 style,
vocabulary 2048, and Llama style, vocabulary 32000. Peers are optional, and measured on small
models trained on the standard library (reproduce/toy.py): pip install curvlinops-for-pytorch
pyhessian.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Time, how, interleave, machine, parser, section, table, use_threads, verdict
from sharpness_peers import compare
from torch import Tensor, nn

from halfulp.batch import predict
from halfulp.pieces import pieces
from halfulp.sharpness.first_order import (
    gradients,
    log_probabilities,
    mean_loss,
    sampled_labels,
    traces,
)
from halfulp.sharpness.hessian import Hessian, twice_differentiable
from halfulp.sharpness.hutchinson import probe, probe_groups
from halfulp.sharpness.lanczos import largest_eigenvalue, on_vectors
from halfulp.sharpness.sampling import LabelSampler
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model

TOKENS, LENGTH, SHARED, STEPS = 512, 128, 8, 12
STEP = "forward and backward pass"
GOALS = {"GNB, one draw": 1.35}
Work = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """A model in eval mode and token ids [B, T] for it."""

    title: str
    model: nn.Module
    ids: Tensor


def subject(title: str, preset: str, *, vocab: int, **shape: int) -> Subject:
    config = ModelConfig(preset=preset, **shape)
    model = build_model(config, vocab=vocab, length=LENGTH, seed=0).model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (TOKENS // LENGTH, LENGTH), generator=generator)
    count = sum(p.numel() for p in model.parameters())
    return Subject(f"{title}, {count / 1e6:.1f} M parameters, vocabulary {vocab}", model, ids)


def first_order(s: Subject) -> dict[str, tuple[Work, int]]:
    """What is timed, and of how many draws it is."""
    parts, generator = pieces(s.model), torch.Generator().manual_seed(0)
    named = dict(s.model.named_parameters())
    parameters = [named[p.parameter] for p in parts]

    def step() -> None:
        found = predict(s.model, s.ids)
        loss = mean_loss(log_probabilities(found.logits_NV), found.targets_N)
        torch.autograd.grad(loss, list(s.model.parameters()))

    def draw(draws: int, sampled: bool) -> None:
        for found, positions in gradients(
            s.model, [s.ids], parameters, draws=draws, generator=generator, sampled=sampled
        ):
            traces(found, positions, parts)

    return {
        STEP: (step, 1),
        "GNB, one draw": (lambda: draw(1, True), 1),
        f"GNB, each of {SHARED} draws on one forward pass": (lambda: draw(SHARED, True), SHARED),
        "empirical Fisher": (lambda: draw(1, False), 1),
    }


def second_order(s: Subject) -> dict[str, tuple[Work, int]]:
    """The same for the exact Hessian, which keeps its graph for all draws."""
    parts, generator = pieces(s.model), torch.Generator().manual_seed(0)
    kinds = list(dict.fromkeys(p.kind for p in parts))
    with twice_differentiable(s.model):
        hessian = Hessian(s.model, s.ids, parts)
    everything = list(range(len(parts)))

    def draw() -> None:
        for members in probe_groups(parts):
            probe(hessian, members, generator)

    def lanczos() -> None:
        for kind in kinds:
            top(hessian, [i for i, p in enumerate(parts) if p.kind == kind])

    return {
        "gradient with its graph, once": (lambda: differentiate(s), 1),
        "Hutchinson, one probe for all blocks": (lambda: probe(hessian, everything, generator), 1),
        f"Hutchinson, a draw: {len(probe_groups(parts))} probes": (draw, 1),
        f"Lanczos, {STEPS} steps for each of {len(kinds)} types": (lanczos, 1),
    }


def differentiate(s: Subject) -> None:
    with twice_differentiable(s.model):
        Hessian(s.model, s.ids, pieces(s.model))


def top(hessian: Hessian, members: list[int]) -> None:
    """STEPS steps of Lanczos in the block of these pieces."""
    size = sum(hessian.pieces[i].numel for i in members)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0))
    largest_eigenvalue(on_vectors(hessian, members), start, steps=STEPS, tolerance=0.0)


def cost(s: Subject, seconds: float, made: dict[str, tuple[Work, int]]) -> None:
    """The table of one model."""
    times = interleave({k: w for k, (w, _) in made.items()}, threads=1, seconds=seconds, least=2)
    base = times[STEP].best
    lines = []
    for name, (_, draws) in made.items():
        value = times[name].best / draws / base
        lines.append([name, f"{value:.2f}", verdict(value, GOALS.get(name))])
    text = f"One {STEP} takes {base * 1e3:.0f} ms.\n\n"
    section(f"{s.title}, {how(1)}", text + table(["estimator", "× the pass", "goal"], lines))


def flat(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """The textbook inversion of a whole row."""
    below_NV = logits_NV.softmax(-1).cumsum(-1)
    at = torch.rand(len(below_NV), 1, generator=generator) * below_NV[:, -1:]
    return torch.searchsorted(below_NV, at, right=True)


def gumbel(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(logits_NV).exponential_(generator=generator)
    return (logits_NV - noise.log_()).argmax(-1)


def sampling(seconds: float) -> None:
    """The table of ways to draw 1024 labels."""
    lines: dict[str, list[str]] = {}
    for vocab in (4096, 32000):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1024, vocab, generator=generator) * 2
        sampler = LabelSampler(logits.log_softmax(-1))
        times: dict[str, Time] = interleave(
            {
                "log softmax, which the loss needs anyway": lambda x=logits: x.log_softmax(-1),
                "ours: log softmax, sums of runs, a draw": lambda x=logits, g=generator: (
                    sampled_labels(x, g)
                ),
                "ours: a further draw": lambda s=sampler, g=generator: s.draw(g),
                "softmax, running sum, search; log softmax extra": lambda x=logits, g=generator: (
                    flat(x, g)
                ),
                "torch.multinomial": lambda x=logits, g=generator: torch.multinomial(
                    x.softmax(-1), 1, generator=g
                ),
                "Gumbel and argmax": lambda x=logits, g=generator: gumbel(x, g),
            },
            threads=1,
            seconds=seconds,
        )
        for name, t in times.items():
            lines.setdefault(name, []).append(f"{t.best * 1e3:.2f}")
    head = ["1024 labels", "V = 4096, ms", "V = 32000, ms"]
    section(
        f"labels drawn from the model, {how(1)}", table(head, [[k, *v] for k, v in lines.items()])
    )


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    use_threads(1)
    print(f"## Sharpness\n\n{machine()}", flush=True)
    seconds = 1.0 if args.quick else 4.0
    small = subject("GPT-2 style", "gpt2-3m", vocab=2048, hidden=128, layers=4)
    cost(small, seconds, first_order(small) | second_order(small))
    wide = subject("Llama style", "llama-3m", vocab=32000)
    cost(wide, seconds, first_order(wide))
    sampling(seconds / 4)
    compare("llama", quick=args.quick)


if __name__ == "__main__":
    main()
