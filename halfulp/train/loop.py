"""The training loop: steps, what is measured between them, checkpoints, and the end."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfulp.block_names import globbed
from halfulp.errors import NonFiniteError, RunError, StoppedError
from halfulp.guard.faults import Fault
from halfulp.guard.incident import BACK, STOP
from halfulp.interrupt import Interrupt
from halfulp.run import Run
from halfulp.train import checkpoint
from halfulp.train.adapt import adapt, begin, facts_of
from halfulp.train.config import TrainConfig, check, load_config
from halfulp.train.counters import added, counts
from halfulp.train.evaluate import evaluate
from halfulp.train.guard_stop import stopped
from halfulp.train.open import Start, open_session
from halfulp.train.parallel import open_world
from halfulp.train.precision import name_of
from halfulp.train.session import OnEvent, Session
from halfulp.train.sharpness import MONITOR, fields_of, measure
from halfulp.train.state import check_replicas, snapshot
from halfulp.train.step import Outcome, run_step


@dataclass(frozen=True)
class Summary:
    """How a run ended; `reason` is "finished", "interrupted", "nonfinite" or "stopped"."""

    path: Path
    reason: str
    steps: int
    tokens: int
    seconds: float  # spent in training steps
    loss_nats: float  # held out, in the policy's arithmetic; nan before the first evaluation
    loss_nats_fp32: float  # held out, in fp32
    diverged: bool


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    from_step: int | None = None,
    force: bool = False,
    command: tuple[str, ...] | None = None,
    on_event: OnEvent | None = None,
    faults: Sequence[Fault] = (),
) -> Summary:
    """Train as `config` says in its run directory, or go on with the run at `resume`.

    Continues from the newest checkpoint, or from that of `from_step` (0 starts over). `on_event`
    receives every event on process 0, as a dict; `faults` are injected, for drills. Under torchrun
    the processes share the work.

    Raises ConfigError, DataError, PolicyError and RunError before the first step, NonFiniteError
    when the loss or a gradient stops being finite without a guard, and StoppedError when the guard
    can do no more: nothing non-finite reaches a parameter or a checkpoint. A run that has finished
    before is left as it is.
    """
    check(config)
    start = Start(resume, from_step, force, tuple(sys.argv) if command is None else command)
    with open_world(config.train) as world, _threads(config.train.threads):
        if resume is not None:
            _check_same(resume, config)
            if from_step is None and (done := _finished(resume, config.train.steps)):
                return done
        with (
            Interrupt() as interrupt,
            open_session(config, world, start, on_event, faults) as session,
        ):
            return _run(session, interrupt)


def config_of(path: Path) -> TrainConfig:
    """The configuration of the run at `path`, with the guard's budgets of its last start."""
    run = Run.open(path, writer=False)
    budgets = {}
    for start in run.events("start"):
        budgets = start.get("budgets", {})
    return load_config(run.config(), {"guard": budgets})


def _run(s: Session, interrupt: Interrupt) -> Summary:
    steps = s.config.train.steps
    stop = False
    try:
        begin(s)
        if s.guard is not None:
            s.guard.begin()
        while s.step < steps and not stop:
            _announce_stage(s)
            stop = _one_step(s, interrupt)
        finished = s.step == steps
        if finished and s.evaluation.get("step") != steps:
            _evaluate(s)
        _checkpoint(s)
    except (NonFiniteError, StoppedError) as error:
        _end(s, "stopped" if isinstance(error, StoppedError) else "nonfinite")
        raise
    return _end(s, "finished" if finished else "interrupted")


def _one_step(s: Session, interrupt: Interrupt) -> bool:
    """Train one step and do what is due after it; True when the run is asked to stop."""
    train, before = s.config.train, time.perf_counter()
    last = s.step + 1 == train.steps and train.count_every > 0
    counting = last or _due(s.step + 1, train.count_every)
    s.precision.handle.count(counting)
    s.precision.optimizer.count(counting)
    with _eager() if counting and train.compile else nullcontext():
        outcome = run_step(s, interrupted=interrupt.asked)
    s.precision.handle.count(False)
    seconds = time.perf_counter() - before
    if outcome.trigger is not None:
        return _held(s, outcome)
    s.step += 1
    s.cursor.advance()
    s.seconds += seconds
    s.tokens += s.micro_batches * train.rows * s.config.data.length
    if s.first_loss_nats is None:
        s.first_loss_nats = outcome.loss_nats
    _report_step(s, outcome, seconds)
    adapt(s, outcome)
    rows = _report_counters(s) if counting else ([], [])
    if s.guard is not None and not outcome.skipped:
        s.guard.accept(outcome.seen)
        s.guard.check(*rows)
    if _due(s.step, s.config.sharpness.every):
        measured = measure(s, draws=s.config.sharpness.draws, key=MONITOR)
        s.emit("sharpness", step=s.step, **fields_of(measured))
        if s.guard is not None:
            s.guard.see_logits(measured.logits.sharpness_centered)
    if _due(s.step, train.eval_every):
        _evaluate(s)
    if s.guard is not None:
        s.guard.keep()
    if _due(s.step, train.checkpoint_every) and s.step < train.steps:
        _checkpoint(s)
    return outcome.interrupted


def _held(s: Session, outcome: Outcome) -> bool:
    """The guard has held the step: let it act; True when the run is asked to stop."""
    assert s.guard is not None
    assert outcome.trigger is not None
    s.precision.handle.counters()  # those of a step that was not made are forgotten
    incident = s.guard.respond(outcome.trigger, outcome.seen)
    if incident.action == BACK:
        s.saved = None  # the checkpoint of this step, if there is one, is of another course
        if s.step:
            _checkpoint(s)
        else:
            folder = s.run.path / "checkpoints"
            s.world.from_main(lambda: checkpoint.drop_after(folder, 0))
    if incident.action == STOP:
        raise StoppedError(stopped(s, incident))
    return outcome.interrupted


def _eager() -> AbstractContextManager[object]:
    # Compiled graphs hold no counters: a step that counts runs without them.
    import torch

    return torch.compiler.set_stance("force_eager")


def _report_step(s: Session, outcome: Outcome, seconds: float) -> None:
    s.emit(
        "step",
        step=s.step,
        loss_nats=outcome.loss_nats,
        grad_norm=outcome.grad_norm,
        lr=outcome.lr,
        tokens=s.tokens,
        seconds=seconds,
    )
    changed = s.precision.scaler.update(finite=not outcome.skipped)
    if changed or outcome.skipped:
        scale = s.precision.scaler.scale
        s.emit("loss_scale", step=s.step, scale=scale, skipped=outcome.skipped)


def _report_counters(s: Session) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the counters of the step; they are (of GEMM operands, of the optimizer)."""
    gemms = [counts(row) for row in s.precision.handle.counters()]
    optimizer = [counts(row) for row in s.precision.optimizer.counters()]
    gemms = added(s.world.gather(gemms))
    if s.world.mode == "fsdp2":  # otherwise every process has updated the whole parameter
        optimizer = added(s.world.gather(optimizer))
    s.emit("counters", step=s.step, gemms=gemms, optimizer=optimizer)
    return gemms, optimizer


def _announce_stage(s: Session) -> None:
    # The event belongs to the step it precedes, so that a resume writes it anew.
    entered = s.precision.enter(s.step)
    if entered and s.guard is not None:
        s.guard.enter_stage()
    if (entered or s.step == s.precision.starts_at) and s.config.policy.schedule:
        s.emit("schedule", step=s.step + 1, recipe=s.precision.name)


def _evaluate(s: Session) -> None:
    s.evaluation = {"step": s.step, **evaluate(s)}
    s.emit("eval", **s.evaluation)


def _checkpoint(s: Session) -> None:
    """Write a checkpoint of the present step unless there is one."""
    if s.saved == s.step:
        return
    check_replicas(s)
    content = snapshot(s)
    folder, keep = s.run.path / "checkpoints", s.config.train.keep
    path = s.world.from_main(lambda: checkpoint.save(folder, content, keep=keep))
    s.saved = s.step
    s.emit("checkpoint", step=s.step, path=str(path.relative_to(s.run.path)))


def _end(s: Session, reason: str) -> Summary:
    summary = Summary(
        path=s.run.path,
        reason=reason,
        steps=s.step,
        tokens=s.tokens,
        seconds=s.seconds,
        loss_nats=s.evaluation.get("loss_nats", math.nan),
        loss_nats_fp32=s.evaluation.get("loss_nats_fp32", math.nan),
        diverged=reason in ("nonfinite", "stopped") or _worse_than_at_first(s),
    )
    facts = {key: value for key, value in asdict(summary).items() if key != "path"}
    resolution = s.precision.handle.resolution
    s.run.summarize(
        name=s.run.path.name,
        recipe=name_of(s.config.policy),
        **facts,
        tokens_per_second=s.tokens / s.seconds if s.seconds else 0.0,
        parameters=sum(p.numel() for p in s.model.parameters()),
        data=s.data.describe(),
        config_sha256=s.run.environment().get("config_sha256", ""),
        policy=resolution.rows(),
        unquantized=list(dict.fromkeys(map(globbed, resolution.unquantized))),
        **facts_of(s),
        **(s.guard.facts() if s.guard else {}),
    )
    s.emit("end", step=s.step, reason=reason)
    return summary


def _worse_than_at_first(s: Session) -> bool:
    if s.first_loss_nats is None or not s.evaluation:
        return False
    return not s.evaluation["loss_nats"] <= s.first_loss_nats  # nan is worse as well


def _check_same(path: Path, config: TrainConfig) -> None:
    if config.digest() != config_of(path).digest():
        raise RunError(
            f"{path} was started with another configuration. A resumed run keeps its own, but for "
            "the budgets of its guard: give no other option, or start a new run."
        )


def _finished(path: Path, steps: int) -> Summary | None:
    """The summary of the run at `path` if it has ended; RunError if it is to have other `steps`."""
    facts = Run.open(path, writer=False).summary()
    names = ("reason", "steps", "tokens", "seconds", "loss_nats", "loss_nats_fp32", "diverged")
    if facts.get("reason") != "finished" or not facts.keys() >= set(names):
        return None
    if facts["steps"] != steps:
        last = checkpoint.path_of(path / "checkpoints", facts["steps"])
        raise RunError(
            f"{path} has finished its {facts['steps']} steps, and its config.toml asks for {steps} "
            "now. A run keeps its configuration: restore that file. To train on from its weights, "
            f"start a new run with --model {last}"
        )
    return Summary(path=path, **{name: facts[name] for name in names})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
