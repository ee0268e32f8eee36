"""A batch of any kind run through a model: its logits, and the targets that they predict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.errors import CheckError

Batch = Tensor | Mapping[str, Any]
"""Token ids, or the keyword arguments of the model."""

IGNORED = -100  # the label of a position that does not count, as in transformers


def as_list(batches: Batch | Sequence[Batch] | None) -> list[Batch]:
    """One batch or several as a list, None as an empty one; CheckError for what is neither."""
    if batches is None:
        return []
    if isinstance(batches, Tensor | Mapping):
        return [batches]
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise CheckError(
            f"{describe(batches)} is no batch. Give token ids [B, T], a mapping of the model's "
            "keyword arguments, or a sequence of either."
        )
    return list(batches)


def run(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [..., V] of the model for token ids, or for the keyword arguments in a mapping.

    Raises CheckError when the model returns something else.
    """
    try:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise CheckError(
            f"{type(model).__name__} cannot run on {describe(batch)}: {error}. Give token ids "
            "[B, T], int64 and below the vocabulary, or a mapping of the model's keyword arguments."
        ) from error
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        found = f"{type(out).__name__}" + (
            f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        )
        raise CheckError(
            f"{type(model).__name__} must return logits [..., V] or an object with .logits; "
            f"found {found}. Wrap the model so that it returns its logits."
        )
    return logits


def describe(batch: object) -> str:
    """What a batch is, in words: types and shapes."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    return type(batch).__name__


@dataclass(frozen=True)
class Predictions:
    """Logits of the positions that count, and the true labels there."""

    logits_NV: Tensor
    targets_N: Tensor


def predict(model: nn.Module, batch: Batch) -> Predictions:
    """The predictions of `model` for which `batch` knows the answer.

    * Token ids [B, T]: each position predicts the next token, the last one nothing.
    * A mapping: with `labels` of the logits' sequence length, shifted by one as transformers does;
      with one label per row of logits, as they are. Without labels, `input_ids` are the labels and
      `attention_mask` says which count. Labels of -100 do not count. `labels` are not handed to
      the model.

    Raises CheckError for a batch without a label that counts, and as `run` does.
    """
    given = dict(batch) if isinstance(batch, Mapping) else batch
    labels = given.pop("labels", None) if isinstance(given, dict) else None
    logits = run(model, given)
    if labels is None:
        labels = _own_labels(given, logits)
    if labels.shape != logits.shape[:-1]:
        raise CheckError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}. Give one label per position."
        )
    if logits.ndim > 2:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten().to(logits.device)
    counted = labels != IGNORED
    if not bool(counted.any()):
        raise CheckError(
            f"{describe(batch)} has no label that counts (all are {IGNORED}, or rows are one token "
            "long). Give sequences of two tokens or more."
        )
    if not bool(counted.all()):
        logits, labels = logits[counted], labels[counted]
    low, high, vocab = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= vocab:
        raise CheckError(
            f"labels reach from {low} to {high}, and the model predicts {vocab} tokens. Give "
            f"labels from 0 to {vocab - 1}, or {IGNORED} for positions that do not count."
        )
    return Predictions(logits, labels)


def _own_labels(batch: Batch, logits: Tensor) -> Tensor:
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if not isinstance(ids, Tensor) or logits.ndim < 3:
        raise CheckError(
            f"{describe(batch)} has no labels. Give token ids [B, T], or a mapping with `labels`."
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return ids
    return ids.masked_fill(mask == 0, IGNORED)
