"""Layers and width for a number of parameters, and the plan as a configuration of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfulp.errors import PlanError

PRESET = "llama-20m"  # heads of 64 channels; the head shares the embedding table
HEAD = 64
PER_LAYER = 4 + 3 * 1376 / 512  # parameters of a layer of that preset over its width squared
ASPECT = 100.0  # width over layers that large models have
ROWS = 8  # sequences per micro-batch
_WIDTHS = 256  # tried up to the ideal one


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer of about the parameters asked for."""

    layers: int
    width: int
    parameters: float


def shape_of(parameters: float, vocabulary: int = 0) -> Shape:
    """The shape of a number of parameters within 5 %, with width / layers as near 100 as allows.

    The embeddings of `vocabulary` tokens, which the head shares, are among the parameters; 0: they
    are not counted. Raises PlanError below 100,000 parameters, and for embeddings that leave none
    for a layer.
    """
    if parameters < 1e5:
        raise PlanError(
            f"{parameters:.3g} parameters are fewer than a transformer is planned with. "
            "Give a larger budget, or a smaller target loss."
        )
    least = _with_width(1.0, HEAD, vocabulary).parameters
    if vocabulary and least > parameters:
        raise PlanError(
            f"{parameters:.3g} parameters are fewer than a layer and the embeddings of "
            f"{vocabulary:,} tokens have at width {HEAD}: {least:.3g}. Give a tokenizer with a "
            "smaller vocabulary, or a larger budget."
        )
    ideal = (parameters * ASPECT / PER_LAYER) ** (1 / 3)
    step = HEAD * max(1, int(ideal / (_WIDTHS * HEAD)))
    widths = range(step, int(4 * ideal) + 2 * step, step)
    shapes = [_with_width(parameters, width, vocabulary) for width in widths]
    off = [abs(math.log(shape.parameters / parameters)) for shape in shapes]
    near = [shape for shape, e in zip(shapes, off, strict=True) if e <= max(0.05, min(off))]
    return min(near, key=lambda s: abs(math.log(s.width / s.layers / ASPECT)))


def _with_width(parameters: float, width: int, vocabulary: int) -> Shape:
    layer, embeddings = PER_LAYER * width**2, vocabulary * width
    layers = max(1, round((parameters - embeddings) / layer))
    return Shape(layers=layers, width=width, parameters=layer * layers + embeddings)


def run_config(
    shape: Shape,
    *,
    tokens: float,
    lr: float,
    batch_tokens: float,
    recipe: str,
    length: int,
    gpus: int,
    data: Sequence[str],
    tokenizer: str,
) -> dict[str, Any]:
    """The sections of a run.toml of `halfulp train`, with whole steps and micro-batches.

    The batch is rounded to at least one sequence per GPU.
    """  # fmt: skip
    sequences = max(1, round(batch_tokens / (length * gpus)))
    rows = min(ROWS, sequences)
    accumulate = max(1, round(sequences / rows))
    steps = max(1, round(tokens / (rows * accumulate * length * gpus)))
    return {
        "model": {"preset": PRESET, "layers": shape.layers, "hidden": shape.width},
        "data": {"source": list(data), "tokenizer": tokenizer, "length": length},
        "train": {"steps": steps, "rows": rows, "accumulate": accumulate, "lr": float(f"{lr:.3g}")},
        "policy": {"recipe": recipe},
    }
