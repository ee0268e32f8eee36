"""Products of the exact Hessian with vectors, by differentiating the gradient once more.

Double backward asks more of a model than training does: fused attention kernels and compiled
graphs have no second derivative, and half precision leaves no digits of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfulp.attention import PREFIX
from halfulp.batch import Batch, predict
from halfulp.errors import CheckError
from halfulp.pieces import Piece
from halfulp.sharpness.first_order import log_probabilities, mean_loss
from halfulp.sharpness.setup import is_compiled

_OWN = ("eager", PREFIX)  # begins the names of attention in differentiable torch operations
_STEP = 3e-3  # of the finite difference, in root mean squares of each parameter
_MOST_OFF = 0.05  # in fp32 it is 1e-4 off


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[list[str]]:
    """Attention by its MATH kernel, no autocast, compiled modules eager; yields notes that say so.

    Raises CheckError for parameters in half precision.
    """
    for name, p in model.named_parameters():
        if p.dtype not in (torch.float32, torch.float64):
            raise CheckError(
                f"{name} is {p.dtype}, too coarse for second derivatives. Give an fp32 copy "
                '(copy.deepcopy(model).float()), or use the estimator "gnb".'
            )
    notes = [_attention_note(model)]
    device = next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.is_autocast_enabled(device):
            notes.append("Autocast was left out: second derivatives need fp32.")
        stack.enter_context(torch.autocast(device, enabled=False))
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            notes.append("The model is compiled; its eager modules were measured.")
        yield notes


def _attention_names(model: nn.Module) -> list[str]:
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    names = {getattr(c, "_attn_implementation", None) for c in configs}
    return sorted(name for name in names if name)


def _attention_note(model: nn.Module) -> str:
    names = _attention_names(model)
    if names and all(name.startswith(_OWN) for name in names):
        return f"Attention ran as the model's own operations ({', '.join(names)})."
    asked = f" ({', '.join(names)})" if names else ""
    return (
        f"scaled_dot_product_attention{asked} ran as its MATH kernel, which can be differentiated "
        "twice."
    )


class Hessian:
    """The Hessian of the mean loss of one batch, on the true labels; keeps its graph in memory.

    Make and use it within `twice_differentiable`. Raises CheckError for operations without a
    second derivative, NonFiniteError for a loss that is not finite.
    """

    def __init__(self, model: nn.Module, batch: Batch, pieces: Sequence[Piece]):
        named = dict(model.named_parameters())
        self.pieces = tuple(pieces)
        self.parameters = {p.parameter: named[p.parameter] for p in pieces}
        self._model, self._batch = model, batch
        grads, self.positions = self._gradients(create_graph=True)
        self._gradient = dict(zip(self.parameters, grads, strict=True))
        if not any(g.requires_grad for g in grads):
            raise self._no_second_derivative("the gradient is a constant of the parameters")

    def product(self, members: Sequence[int], vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v at the pieces `members`, where v is `vectors` at these pieces and zero elsewhere."""
        directions: dict[str, Tensor] = {}
        for i, vector in zip(members, vectors, strict=True):
            name = self.pieces[i].parameter
            if name not in directions:
                directions[name] = torch.zeros_like(self.parameters[name])
            self.pieces[i].of(directions[name]).copy_(vector)
        found = self._products(directions)
        return [self.pieces[i].of(found[self.pieces[i].parameter]) for i in members]

    def check(self, generator: torch.Generator) -> None:
        """CheckError unless one product agrees with a difference of gradients.

        A backward pass written by hand can hide its inputs from autograd, and then its second
        derivative is wrong without an error. The parameters are the same afterwards.
        """
        signs = {n: signs_like(p, generator) for n, p in self.parameters.items()}
        scale = {n: p.detach().square().mean().sqrt() for n, p in self.parameters.items()}
        directions = {n: s * scale[n] for n, s in signs.items()}
        exact = torch.cat([t.flatten() for t in self._products(directions).values()])
        ends = []
        for sign in (1.0, -1.0):
            with _moved(self.parameters, directions, sign * _STEP):
                grads, _ = self._gradients(create_graph=False)
            ends.append(torch.cat([g.flatten() for g in grads]))
        rough = (ends[0] - ends[1]) / (2 * _STEP)
        off = torch.linalg.vector_norm(exact - rough) / torch.linalg.vector_norm(rough)
        if bool(off > _MOST_OFF):
            raise self._no_second_derivative(
                f"a Hessian-vector product is {off.item():.0%} off a difference of gradients"
            )

    def _gradients(self, *, create_graph: bool) -> tuple[tuple[Tensor, ...], int]:
        predictions = predict(self._model, self._batch)
        loss = mean_loss(log_probabilities(predictions.logits_NV), predictions.targets_N)
        grads = torch.autograd.grad(
            loss, list(self.parameters.values()), create_graph=create_graph,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return grads, len(predictions.targets_N)

    def _products(self, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        names = list(directions)
        curved = [name for name in names if self._gradient[name].requires_grad]
        if not curved:
            return {name: torch.zeros_like(d) for name, d in directions.items()}
        try:
            found = torch.autograd.grad(
                [self._gradient[name] for name in curved],
                [self.parameters[name] for name in names],
                [directions[name] for name in curved],
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            raise self._no_second_derivative(str(error).splitlines()[0]) from error
        return dict(zip(names, found, strict=True))

    def _no_second_derivative(self, why: str) -> CheckError:
        names = ", ".join(_attention_names(self._model))
        attention = f" (its attention: {names})" if names else ""
        return CheckError(
            f"{type(self._model).__name__}{attention} cannot be differentiated twice: {why}. Use "
            'attention that can, such as model.set_attn_implementation("eager"), and no autograd '
            'functions or kernels of your own; or the estimator "gnb", which differentiates once.'
        )


def signs_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Rademacher numbers: +1 or -1 with equal probability, of the shape and type of `tensor`."""
    bits = torch.randint(0, 2, tensor.shape, generator=generator, device=generator.device)
    return (bits * 2 - 1).to(tensor)


@contextmanager
def _moved(
    parameters: dict[str, nn.Parameter], directions: dict[str, Tensor], step: float
) -> Iterator[None]:
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data.add_(directions[name], alpha=step)
        yield
    finally:
        for name, p in parameters.items():
            p.data.copy_(before[name])
