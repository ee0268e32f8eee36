"""Between a training session and its checkpoint: whole tensors out, sharded ones back in."""

import shlex
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from halfulp.errors import NonFiniteError, RunError, StoppedError
from halfulp.processes import local
from halfulp.train.checkpoint import Checkpoint
from halfulp.train.parallel import differing, part_of, sharded_like, whole
from halfulp.train.precision import digest_of
from halfulp.train.session import Session

_READ = {
    "guard", "cursor", "loss_scale", "blockwise", "tokens", "seconds", "evaluation",
    "first_loss_nats", "faults", "events",
}  # fmt: skip


def snapshot(s: Session) -> Checkpoint:
    """Everything that continues the run bit by bit; a collective call, content on process 0 only.

    NonFiniteError, on every process, if a weight or an optimizer state is not finite: such a
    checkpoint is never written.
    """
    keep = s.world.main
    optimizer = {key: _host(t, keep=keep) for key, t in optimizer_tensors(s)}
    tensors = {
        "model": {name: _host(t, keep=keep) for name, t in model_tensors(s)},
        "optimizer": optimizer,
        "quantizers": {k: _host(t, keep=keep) for k, t in s.precision.handle.state_dict().items()},
        "snapshots": {n: _host(t, keep=keep, copy=False) for n, t in _snapshot_tensors(s)},
    }
    s.world.from_main(lambda: _refuse_nonfinite(s, tensors))
    return Checkpoint(s.step, _facts(s), tensors, s.shape)


def restore(s: Session, content: Checkpoint) -> None:
    """Put `content` into the freshly built session; RunError if it belongs to another run."""
    _check_belongs(s, content.state)
    if s.guard is not None:
        s.guard.load(content.state["guard"])
    s.cursor.load(content.state["cursor"])
    with torch.no_grad():
        for name, tensor in model_tensors(s):
            saved = _saved(content, "model", name)
            local(tensor).copy_(local(sharded_like(saved, tensor)))
    _restore_optimizer(s, content)
    s.precision.handle.load_state_dict(dict(content.tensors["quantizers"]))
    s.precision.scaler.load(content.state["loss_scale"])
    if s.guard is not None:
        s.guard.load_tensors(content.state["guard"], dict(_own_parts(s, content)))
    if s.blockwise is not None:
        s.blockwise.load(content.state["blockwise"])
    s.step, s.tokens = content.step, content.state["tokens"]
    s.seconds, s.evaluation = content.state["seconds"], content.state["evaluation"]
    s.first_loss_nats, s.saved = content.state["first_loss_nats"], content.step
    for fault, state in zip(s.faults, content.state["faults"], strict=False):
        fault.load(state)


def check_replicas(s: Session) -> None:
    """StoppedError, on every process, if the processes of ddp do not hold the same model.

    Called before anything is kept of the run: checkpoints and snapshots are of equal replicas.
    """
    named = chain(model_tensors(s), optimizer_tensors(s))
    if differ := differing(named, s.world):
        raise StoppedError(
            f"after step {s.step} {differ[0]} is not the same on all processes, and {len(differ)} "
            "tensors in all: a replica was damaged by its memory or its processor. Nothing of it "
            "was saved. To go on from the last checkpoint, on another machine: "
            f"{shlex.join(['halfulp', 'train', '--resume', str(s.run.path)])}"
        )


def model_tensors(s: Session) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the Hugging Face model, tied ones once."""
    seen: set[int] = set()
    for name, tensor in s.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def optimizer_tensors(s: Session) -> Iterator[tuple[str, Tensor]]:
    """States of the optimizer by "parameter/state"."""
    for name, parameter in _optimized(s):
        for key, value in s.precision.optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", torch.as_tensor(value)


def _optimized(s: Session) -> Iterator[tuple[str, Tensor]]:
    for group in s.precision.optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _snapshot_tensors(s: Session) -> Iterator[tuple[str, Tensor]]:
    """What the guard holds by "step/name", as sharded as the tensors that it has copied."""
    if s.guard is None:
        return
    examples = _examples(s)
    for path, part in s.guard.tensors():
        yield path, part_of(part, examples.get(path.partition("/")[2]))


def _own_parts(s: Session, content: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `_snapshot_tensors`: this process's part of everything."""
    examples = _examples(s)
    for path, whole_one in content.tensors["snapshots"].items():
        example = examples.get(path.partition("/")[2])
        saved = whole_one if example is None else local(sharded_like(whole_one, example)).cpu()
        yield path, saved.clone()


def _examples(s: Session) -> dict[str, Tensor]:
    """Tensors that say how those of a snapshot are shared out; the whole ones are left out."""
    named = {f"model/{name}": t for name, t in model_tensors(s)}
    named |= {f"optimizer/{name}": t for name, t in optimizer_tensors(s)}
    return {name: t for name, t in named.items() if isinstance(t, DTensor)}


def _restore_optimizer(s: Session, content: Checkpoint) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for path, tensor in content.tensors["optimizer"].items():
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = tensor
    for name, parameter in _optimized(s):
        saved = states.get(name, {})
        s.precision.optimizer.state[parameter] = {
            key: sharded_like(t, parameter) if t.shape == parameter.shape else t
            for key, t in saved.items()
        }


def _host(tensor: Tensor, *, keep: bool, copy: bool = True) -> Tensor:
    """The whole tensor on the CPU where it is kept; its own memory unless `copy` is False."""
    full = whole(tensor.detach())
    return full.to("cpu", copy=copy) if keep else torch.empty(0)


def _refuse_nonfinite(s: Session, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part in ("model", "optimizer"):
        for name, tensor in tensors[part].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"step {s.step}: {name} of the {part} is not finite after the update, so no "
                    f"checkpoint is written. The last good one is of step {s.saved or 'none'}. "
                    "Give its block a format with a wider range for weights or moments, or "
                    f"lower train.lr (it is {s.config.train.lr:g})."
                )


def _facts(s: Session) -> dict[str, Any]:
    return {
        "tokens": s.tokens,
        "seconds": s.seconds,
        "micro_batches": s.micro_batches,
        "loss_scale": s.precision.scaler.state(),
        "blockwise": s.blockwise.state() if s.blockwise else None,
        "cursor": s.cursor.state(),
        "guard": s.guard.state() if s.guard else None,
        "evaluation": s.evaluation,
        "first_loss_nats": s.first_loss_nats,
        "events": s.run.written,
        "faults": [fault.state() for fault in s.faults],
        "random": "no state: every random number is a function of (seed, step, micro-batch, name)",
        "seed": s.config.train.seed,
        **_digests(s),
    }


def _digests(s: Session) -> dict[str, str]:
    """What decides the run: equal digests make a checkpoint one of this run."""
    return {
        "config_digest": s.config.digest(),
        "policy_digest": digest_of(s.precision.policies),
        "data_digest": s.data.digest,
    }


def _check_belongs(s: Session, state: Mapping[str, Any]) -> None:
    mine = _digests(s)
    told = {
        "config_digest": "configuration; restore config.toml of the run",
        "policy_digest": "policy or recipe; restore it, or the version of halfulp",
        "data_digest": "corpus; restore its files (stdlib belongs to one Python version)",
    }
    if absent := sorted((mine.keys() | _READ) - state.keys()):
        raise RunError(
            f"the checkpoint of step {state.get('step', 'unknown')} says nothing of "
            f"{', '.join(absent)}: another version of halfulp wrote it. Resume with the version in "
            "environment.json of the run."
        )
    for key, digest in mine.items():
        if state[key] != digest:
            what = told[key]
            raise RunError(
                f"the run cannot be continued: its checkpoint of step {state['step']} was written "
                f"with another {what}, or start a new run."
            )


def _saved(content: Checkpoint, part: str, name: str) -> Tensor:
    if name not in content.tensors[part]:
        raise RunError(
            f"the checkpoint of step {content.step} has no {part} tensor {name!r}. It was written "
            "by another version of the model; resume with the versions in environment.json."
        )
    return content.tensors[part][name]
