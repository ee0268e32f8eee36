"""From a configuration to a session that is ready for its first or next step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfulp.blocks import block_map
from halfulp.data import Data, open_data
from halfulp.errors import PolicyError, RunError, require
from halfulp.guard.faults import Fault
from halfulp.numerics.kernel import cache_directory
from halfulp.pieces import pieces
from halfulp.run import Run
from halfulp.trackers import open_trackers
from halfulp.train import checkpoint
from halfulp.train.blockwise import open_blockwise
from halfulp.train.checkpoint import load
from halfulp.train.config import TrainConfig, budgets_of
from halfulp.train.cursor import cursor_at_start
from halfulp.train.guard import open_guard
from halfulp.train.model import build_model, checkpoint_activations, config_json, layers_of
from halfulp.train.parallel import World, share
from halfulp.train.precision import Precision, load_policies, name_of
from halfulp.train.session import OnEvent, Session
from halfulp.train.state import restore


@dataclass(frozen=True)
class Start:
    """How a run begins: in a fresh directory, or after a checkpoint of the run at `resume`."""

    resume: Path | None = None
    from_step: int | None = None  # None = the newest checkpoint
    force: bool = False  # replace the run that lies at run.out
    command: tuple[str, ...] = ()


@contextmanager
def open_session(
    config: TrainConfig,
    world: World,
    start: Start,
    on_event: OnEvent | None,
    faults: Sequence[Fault] = (),
) -> Iterator[Session]:
    """A session with data, model, precision, run directory and, on resume, the checkpoint's state.

    Nothing is written before the data, the model and the policy are known to fit. The run is closed
    on exit.
    """
    finished = world.from_main(lambda: _step_to_resume(start))
    loaded = load(start.resume / "checkpoints", finished) if start.resume and finished else None
    micro_batches = _micro_batches(config, world, loaded.state if loaded else {})
    data = _open_data(config, world)
    seed, length = config.train.seed, config.data.length
    built = build_model(config.model, vocab=data.vocab, length=length, seed=seed)
    model = built.model.to(world.device)
    blocks = dict(block_map(model, config.model.hints).parameters)
    parts = pieces(model, config.model.hints)
    shape = config_json(model)  # before quantize, which changes its attention implementation
    blockwise = open_blockwise(config, parts)
    types = blockwise.kinds if blockwise else None
    precision = Precision(model, config, load_policies(config.policy), config.model.hints, types)
    with Session(
        config, world, data, model, precision, blocks, parts, shape, micro_batches, on_event,
        blockwise,
    ) as session:  # fmt: skip
        session.faults = tuple(faults)
        _prepare(session, finished)
        if loaded:
            restore(session, loaded)
        # Only now: a checkpoint that does not fit must leave the run as it was.
        written = loaded.state["events"] if loaded else 0
        session.run = _open_run(config, world, start, finished, written)
        _announce(session, start, built.origin)
        yield session


def _prepare(s: Session, finished: int) -> None:
    """Quantize, compile, shard or wrap, and only then build the optimizer over what is left."""
    # The stage of the last finished step: the loop goes over to the next one itself.
    s.precision.start(max(0, finished - 1))
    if s.world.mode == "fsdp2":
        _check_shardable(s.precision)
    if s.config.train.activation_checkpointing:
        checkpoint_activations(s.model)
    if s.config.train.compile:
        for module in layers_of(s.model) if s.world.mode == "fsdp2" else [s.model]:
            module.compile()
    with s.precision.handle.off():
        s.shared = share(s.model, s.world)
    s.precision.optimize()
    s.cursor = cursor_at_start(s.config.train.skip)
    s.guard = open_guard(s)


def _announce(s: Session, start: Start, origin: str) -> None:
    s.emit(
        "start",
        command=list(start.command),
        run=str(s.run.path),
        parameters=sum(p.numel() for p in s.model.parameters()),
        train_tokens=len(s.data.train),
        tokens_per_step=s.micro_batches * s.config.train.rows * s.config.data.length,
        world=s.world.size,
        step=s.step,
        weights=f"checkpoint of step {s.step}" if s.step else origin,
        parallel=s.world.mode,
        micro_batches=s.micro_batches,
        device=str(s.world.device),
        budgets=budgets_of(s.config.guard),
    )


def _step_to_resume(start: Start) -> int:
    """Step of the checkpoint to go on from, verified; 0 to start over."""
    if start.resume is None:
        return 0
    folder = start.resume / "checkpoints"
    steps = checkpoint.steps_in(folder)
    step = start.from_step if start.from_step is not None else max(steps, default=0)
    if step == 0:
        return 0  # equal seeds make the run that starts over the same run
    if step not in steps:
        raise RunError(
            f"{start.resume} has no checkpoint of step {step}. It has: "
            f"{', '.join(map(str, steps)) or 'none'}; --from-step 0 starts over."
        )
    checkpoint.verify(folder, step)
    return step


def _open_data(config: TrainConfig, world: World) -> Data:
    def open_() -> Data:
        return open_data(config.data.corpus(), cache_directory() / "data")

    # Process 0 fills the cache; the others find it.
    opened = open_() if world.size == 1 else _after_main(world, open_)
    for split in ("train", "val"):
        opened.windows(split, config.data.length)
    return opened


def _after_main(world: World, open_: Callable[[], Data]) -> Data:
    own: list[Data] = []
    world.from_main(lambda: own.append(open_()))
    return own[0] if own else open_()


def _check_shardable(precision: Precision) -> None:
    """Refuse storage formats whose scale or random bits need the whole tensor."""
    recipes = [item for r in precision.resolutions() for item in r.parameters.items()]
    for name, r in recipes:
        weight, moments = r.master or r.weight, (r.moment_m, r.moment_v)
        stored = [("weight", weight, False), ("gradient", r.gradient, r.gradient.stochastic)]
        stored += [("moments", q, q.stochastic) for q in moments]
        for what, q, random in stored:
            if q.granularity != "element" or random:
                raise PolicyError(
                    f"{name}: recipe {r.name!r} stores its {what} as {q}, whose scale or random "
                    "bits need the whole tensor, and fsdp2 leaves each process a part. Use "
                    "train.parallel = 'ddp', or a format without scale, rounded to nearest."
                )


def _micro_batches(config: TrainConfig, world: World, state: dict[str, Any]) -> int:
    count = state.get("micro_batches", world.size * config.train.accumulate)
    if count % world.size:
        raise RunError(
            f"the run takes {count} micro-batches per step, which {world.size} processes cannot "
            "share equally. Resume it with a number of processes that divides them."
        )
    return count


def _open_run(config: TrainConfig, world: World, start: Start, finished: int, written: int) -> Run:
    def make() -> Path:
        for name in config.run.trackers:
            require(name, "track")  # before there is a directory
        resumed = start.resume
        run = _continue(resumed, finished, written) if resumed else _create(config, start)
        run.trackers.extend(open_trackers(config.run.trackers, run.path))
        own.append(run)
        return run.path

    own: list[Run] = []
    path = world.from_main(make)
    return own[0] if own else Run.open(path, writer=False)


def _continue(path: Path, finished: int, written: int) -> Run:
    """The run at `path` after `finished` steps, when it had `written` events."""
    run, folder = Run.open(path), path / "checkpoints"
    if written and not run.written:
        saved = checkpoint.path_of(folder, finished)
        raise RunError(
            f"{path / 'events.jsonl'} is gone or empty; the checkpoint of step {finished} was "
            f"written after {written} events. Put the file back, or start a new run from the "
            f"weights: halfulp train --model {saved}"
        )
    run.truncate(finished, kept=written)
    checkpoint.drop_after(folder, finished)
    if finished and run.written == written:  # it was killed between the checkpoint and its event
        saved = checkpoint.path_of(folder, finished).relative_to(path)
        run.write("checkpoint", step=finished, path=str(saved))
    return run


def _create(config: TrainConfig, start: Start) -> Run:
    path = Path(config.run.out) if config.run.out else _free_directory(config)
    run = Run.create(path, config.to_dict(), force=start.force, command=start.command)
    policy = load_policies(config.policy)[-1]
    (path / "policy.toml").write_text(policy.to_toml(), encoding="utf-8")
    return run


def _free_directory(config: TrainConfig) -> Path:
    name = f"{Path(config.model.preset).stem}-{Path(name_of(config.policy)).stem}"
    return free_directory(Path("runs"), name)


def free_directory(folder: Path, name: str) -> Path:
    """`folder`/`name`-001, or the first number above all that exist."""
    taken = [p.name.removeprefix(f"{name}-") for p in folder.glob(f"{name}-*")]
    number = 1 + max((int(t) for t in taken if t.isdigit()), default=0)
    return folder / f"{name}-{number:03d}"
