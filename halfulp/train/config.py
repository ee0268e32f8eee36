"""The configuration of one training run: every option, its default and what it must satisfy."""

import dataclasses
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfulp.data import DataConfig
from halfulp.errors import ConfigError
from halfulp.guard.ladder import RUNGS
from halfulp.train import tree
from halfulp.train.presets import PRESETS

SCHEDULES = ("cosine", "wsd", "constant")
FLOORS = ("shared", "scaled")
PARALLEL = ("ddp", "fsdp2")
DEVICES = ("auto", "cpu", "cuda")
CARRIERS = ("fp32", "exact")
TRACKERS = ("tensorboard", "trackio")
MOST_THREADS = 1024  # many more and the thread pool crashes
BUDGETS = ("rollbacks", "wasted", "raised", "attribution")  # of [guard]: may grow on a resume


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and from which weights."""

    preset: str = "llama-3m"  # a preset's name, or a local Hugging Face directory or config.json
    layers: int = 0  # 0 = as the preset says
    hidden: int = 0  # 0 = as the preset says
    hints: Mapping[str, str] = field(default_factory=dict)  # name pattern -> block, where unknown


@dataclass(frozen=True, kw_only=True)
class DataSection(DataConfig):
    """The corpus, and how many tokens of it make one sequence."""

    length: int = 256

    def corpus(self) -> DataConfig:
        """The part that decides the token files, without the sequence length."""
        names = [f.name for f in dataclasses.fields(DataConfig)]
        return DataConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The optimization: how many steps of which size, and what is measured on the way."""

    steps: int = 1000
    rows: int = 8  # sequences per micro-batch
    accumulate: int = 1  # micro-batches per process and step
    lr: float = 1e-3
    warmup: float = 0.05  # below 1: share of the run; from 1 on: steps
    schedule: str = "cosine"
    min_lr: float = 0.1  # last learning rate as a share of `lr`
    decay: float = 0.2  # wsd: share of the run that decays
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    seed: int = 0
    eval_every: int = 100  # 0 = only after the last step
    eval_batches: int = 8
    checkpoint_every: int = 500  # 0 = only after the last step
    keep: int = 2  # newest checkpoints kept
    count_every: int = 50  # and in the last step; 0 = no counters
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: str = "ddp"  # how the processes of torchrun share the work
    device: str = "auto"
    threads: int = 0  # 0 = torch's choice
    skip: tuple[int, ...] = ()  # batches, counted from 0, that are never trained on


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The precision until this share of the run."""

    until: float
    recipe: str = ""
    file: str = ""

    def last_step(self, steps: int) -> int:
        """The last (1-based) step of the stage in a run of `steps`."""
        return round(self.until * steps) if math.isfinite(self.until) else 0


@dataclass(frozen=True, kw_only=True)
class PolicySection:
    """The precision: one recipe or policy file, after any number of earlier stages."""

    recipe: str = ""  # neither recipe nor file: fp32
    file: str = ""
    schedule: tuple[Stage, ...] = ()
    carrier: str = "fp32"
    allow_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class SharpnessSection:
    """How often the sharpness of every block is measured; nothing else of the run depends on it."""

    every: int = 100  # steps; 0 = never
    draws: int = 1  # labels, each of a micro-batch of its own; one costs about a micro-batch


@dataclass(frozen=True, kw_only=True)
class BlockwiseSection:
    """A learning rate per block type: a ratio of each to `train.lr`."""

    ratios: str = ""  # a preset, "auto", or "emb=10,qk=8,ffn=6,vo=4"; empty: one rate for all
    stretch_warmup: bool = True  # a block's warm-up is longer by its ratio; not of auto's
    floor: str = "shared"  # all blocks end at one rate, or each "scaled" by its ratio
    anchor: str = "norm"  # what keeps the rate: the norms, or the "geomean" of the ratios
    power: float = 0.5  # of auto: ratio = (largest sharpness / sharpness) ** power
    cap: float = 10.0  # of auto: the largest ratio
    guard: bool = True  # halve ratios when the loss spikes or a gradient norm runs away


@dataclass(frozen=True, kw_only=True)
class GuardSection:
    """What keeps the run alive: halfulp/guard. Without an incident the run is the same without it.

    Budgets are shares of `train.steps`, but for the number of rollbacks.
    """

    on: bool = True
    ladder: tuple[str, ...] = RUNGS  # recipes, from the lowest up, that a block climbs
    snapshot_every: int = 50  # steps
    snapshots: int = 4  # newest ones in memory, beside up to three older
    save_snapshots: bool = True  # in checkpoints, so that a resumed run can go back as far
    rollbacks: int = 8  # within 10 000 steps
    wasted: float = 0.05  # steps withheld or rolled back; the first rollback is free
    raised: float = 0.3  # blocks raised to 16 bits or more; above it all fall back to bf16_amp
    attribution: float = 0.02  # passes that look for the culprit


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where the run is written."""

    out: str = ""  # empty: runs/<preset>-<recipe>-001, the first number that is free
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run; equal configurations give equal runs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    policy: PolicySection = field(default_factory=PolicySection)
    sharpness: SharpnessSection = field(default_factory=SharpnessSection)
    blockwise: BlockwiseSection = field(default_factory=BlockwiseSection)
    guard: GuardSection = field(default_factory=GuardSection)
    run: RunSection = field(default_factory=RunSection)

    def to_dict(self) -> dict[str, Any]:
        """Sections as plain dicts, ready for TOML."""
        return tree.plain(self)

    def digest(self) -> str:
        """sha256 of what the run is: of everything but where it lies and what its guard may spend.

        [run] and the budgets of [guard] are left out.
        """
        decisive = {key: value for key, value in self.to_dict().items() if key != "run"}
        decisive["guard"] = {k: v for k, v in decisive["guard"].items() if k not in BUDGETS}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def budgets_of(guard: GuardSection) -> dict[str, Any]:
    """What the guard may spend; {} where it is off."""
    return {name: getattr(guard, name) for name in BUDGETS} if guard.on else {}


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration in a TOML file or nested dict, with `overrides` on top; checked.

    Relative paths are made absolute, so that a run can be resumed from any directory.
    ConfigError for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    raw = source if isinstance(source, Mapping) else _read(Path(source))
    config = _anchored(tree.build(TrainConfig, tree.merge(raw, overrides or {})))
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """ConfigError for the first value that cannot be used."""
    _check_train(config.train)
    _check_policy(config)
    _check_blockwise(config)
    _check_guard(config.guard)
    _at_least("data.length", config.data.length, 1)
    _at_least("model.layers", config.model.layers, 0)
    _at_least("model.hidden", config.model.hidden, 0)
    _at_least("sharpness.every", config.sharpness.every, 0)
    _at_least("sharpness.draws", config.sharpness.draws, 1)
    if not config.sharpness.every and config.sharpness.draws != SharpnessSection().draws:
        raise ConfigError(
            "sharpness.draws has no effect with sharpness.every = 0. Give the steps between two "
            "measurements, or delete it."
        )
    for tracker in config.run.trackers:
        _one_of("run.trackers", tracker, TRACKERS)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors may begin with a BOM
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}. Give the path of a TOML file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Fix that line.") from error


def _anchored(config: TrainConfig) -> TrainConfig:
    data, model, policy = config.data, config.model, config.policy
    source = tuple(item if item == "stdlib" else _absolute(item) for item in data.source)
    named = data.tokenizer == "bytes" or data.tokenizer.startswith("bpe")
    tokenizer = data.tokenizer if named else _absolute(data.tokenizer)
    local = model.preset not in PRESETS and os.path.exists(os.path.expanduser(model.preset))
    stages = tuple(replace(stage, file=_absolute(stage.file)) for stage in policy.schedule)
    return replace(
        config,
        data=replace(data, source=source, tokenizer=tokenizer),
        model=replace(model, preset=_absolute(model.preset)) if local else model,
        policy=replace(policy, file=_absolute(policy.file), schedule=stages),
        run=replace(config.run, out=os.path.expanduser(config.run.out)),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def _check_train(train: TrainSection) -> None:
    for name in ("steps", "rows", "accumulate", "eval_batches", "keep"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("eval_every", "checkpoint_every", "count_every", "threads", "seed"):
        _at_least(f"train.{name}", getattr(train, name), 0)
    if train.threads > MOST_THREADS:
        raise ConfigError(
            f"train.threads = {train.threads} is more than {MOST_THREADS}. Give the number of "
            "processors, or 0 for torch's choice."
        )
    for name in ("warmup", "weight_decay", "clip"):
        _between(f"train.{name}", getattr(train, name), 0.0, math.inf)
    for name in ("min_lr", "decay"):
        _between(f"train.{name}", getattr(train, name), 0.0, 1.0)
    _check_skip(train)
    for beta in train.betas:
        if not 0.0 <= beta < 1.0:
            raise ConfigError(
                f"train.betas = {beta:g} cannot be used: each is at least 0 and below 1."
            )
    smallest = math.ulp(0.0)
    _between("train.lr", train.lr, smallest, math.inf)
    _between("train.eps", train.eps, smallest, math.inf)
    _one_of("train.schedule", train.schedule, SCHEDULES)
    _one_of("train.parallel", train.parallel, PARALLEL)
    _one_of("train.device", train.device, DEVICES)
    if train.warmup >= 1 and train.warmup > train.steps:
        raise ConfigError(
            f"train.warmup = {train.warmup:g} steps is longer than the run of {train.steps} steps. "
            "Give fewer steps, or a share of the run below 1."
        )


def _check_skip(train: TrainSection) -> None:
    if train.skip and min(train.skip) < 0:
        raise ConfigError(
            f"train.skip = {min(train.skip)} is no batch: they are counted from 0. Give positions "
            "of the event `guard`, or delete it."
        )
    if len(train.skip) > train.steps:
        raise ConfigError(
            f"train.skip names {len(train.skip)} batches, more than the {train.steps} that the run "
            "trains on. Leave bad documents out of data.source instead."
        )


def _check_policy(config: TrainConfig) -> None:
    policy = config.policy
    _one_of("policy.carrier", policy.carrier, CARRIERS)
    if policy.recipe and policy.file:
        raise ConfigError(
            f"policy.recipe = {policy.recipe!r} and policy.file = {policy.file!r} are both given. "
            "Delete one of them."
        )
    before, steps = 0, config.train.steps
    for i, stage in enumerate(policy.schedule):
        where = f"policy.schedule[{i}]"
        if bool(stage.recipe) == bool(stage.file):
            raise ConfigError(f"{where} needs a recipe or a file, and not both. Give exactly one.")
        end = stage.last_step(steps)
        if not before < end < steps:
            raise ConfigError(
                f"{where}.until = {stage.until:g} ends the stage at step {end}, and it must end "
                f"after step {before} and before step {steps}. Order the stages by `until`; the "
                "rest of the run uses policy.recipe or policy.file."
            )
        before = end


def _check_blockwise(config: TrainConfig) -> None:
    from halfulp.sharpness.ratios import ANCHORS, check_written

    section = config.blockwise
    _one_of("blockwise.floor", section.floor, FLOORS)
    _one_of("blockwise.anchor", section.anchor, ANCHORS)
    if not 0 < section.power <= 1 or not 1 <= section.cap < math.inf:
        raise ConfigError(
            f"blockwise.power = {section.power:g} and blockwise.cap = {section.cap:g} cannot be "
            "used. Give a power in (0, 1] and a cap of at least 1."
        )
    auto = section.ratios == "auto"
    if section.ratios and not auto:
        check_written(section.ratios)
    if section.floor == "scaled" and config.train.schedule == "constant":
        raise ConfigError(
            "blockwise.floor = 'scaled' has no effect with train.schedule = 'constant', which has "
            "no floor. Use cosine or wsd, or delete it."
        )
    default = BlockwiseSection()
    idle = {"stretch_warmup"} if auto else {"power", "cap"}
    if not section.ratios:
        idle |= {"stretch_warmup", "floor", "anchor", "guard"}
    for name in sorted(idle):
        if getattr(section, name) != getattr(default, name):
            wanted = "'auto'" if name in ("power", "cap") else "other ratios" if auto else "ratios"
            raise ConfigError(
                f"blockwise.{name} has no effect with blockwise.ratios = {section.ratios!r}. "
                f"Give {wanted}, or delete it."
            )


def _check_guard(guard: GuardSection) -> None:
    default = GuardSection()
    for name in ("snapshot_every", "snapshots", "rollbacks"):
        _at_least(f"guard.{name}", getattr(guard, name), 1)
    for name in ("wasted", "raised", "attribution"):
        _between(f"guard.{name}", getattr(guard, name), math.ulp(0.0), 1.0)
    for field_ in dataclasses.fields(guard):
        name, value = field_.name, getattr(guard, field_.name)
        if not guard.on and name != "on" and value != getattr(default, name):
            raise ConfigError(
                f"guard.{name} has no effect with guard.on = false. Switch the guard on, or "
                "delete it."
            )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} = {value} is too small. Give {least} or more.")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        above = "" if math.isinf(high) else f" and at most {high:g}"
        least = "above 0" if 0 < low < 1e-300 else f"at least {low:g}"
        raise ConfigError(
            f"{name} = {value:g} cannot be used. Give a finite number {least}{above}."
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r} does not exist. {tree.nearest(value, choices)}")
