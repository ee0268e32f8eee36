"""The drill: known faults injected into a small run, and what the guard makes of each.

One fault-free run is the reference. Every fault goes on from its checkpoint right before the fault,
so that both have the same past bit by bit.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from halfulp.blocks import BlockMap, Gemm, block_map
from halfulp.data import open_data
from halfulp.errors import ConfigError, NonFiniteError, RunError, StoppedError
from halfulp.guard import faults
from halfulp.guard.attribute import DATA, HARDWARE, PRECISION, STATE
from halfulp.guard.faults import Fault
from halfulp.guard.units import units_of
from halfulp.numerics.kernel import cache_directory
from halfulp.run import Run
from halfulp.train import gates
from halfulp.train.config import GuardSection, TrainConfig, load_config
from halfulp.train.gates import Gate, Judge, Look
from halfulp.train.loop import train
from halfulp.train.model import build_model
from halfulp.train.open import free_directory
from halfulp.train.precision import load_policies
from halfulp.train.session import OnEvent
from halfulp.train.tree import merge, nearest

FAULT_AFTER = 0.6  # share of the run that is over when the fault happens
SETTLED = 150  # steps that the detectors and the ring of snapshots need before that
AFTER = 50  # and after it
CHECK = 25  # steps between two checks, where none are counted
OnRun = Callable[[str, int], None]
_COMMAND = ("halfulp", "guard", "drill")


@dataclass(frozen=True)
class Case:
    """A fault and what is right to say about it; `unit` is "" where no unit is to blame."""

    name: str
    fault: Callable[[int], Fault]  # from its (1-based) step
    verdict: str
    unit: str
    judges: tuple[Judge, ...]


@dataclass(frozen=True)
class Drilled:
    """What the guard made of one fault, by its first incident; costs are of all, in steps.

    `delay` is in steps, None if the fault went unnoticed. Gaps are held out, in nats over the
    fault-free run; nan for a run that was stopped.
    """

    fault: str
    step: int
    expected: str  # verdict
    culprit: str  # the unit that was hit
    path: Path
    reason: str  # how the run ended
    gates: tuple[Gate, ...]
    delay: int | None = None
    trigger: str = ""
    verdict: str = ""
    units: tuple[str, ...] = ()
    margin: float = math.nan
    action: str = ""
    done: tuple[str, ...] = ()
    incidents: int = 0
    loss_gap: float = math.nan
    unguarded_gap: float = math.nan
    withheld: float = 0.0
    replayed: float = 0.0
    passes: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every gate is met; one that could not be told is not."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class DrillReport:
    """The fault-free run and a row per fault; `left_out` says why a fault was not drilled."""

    path: Path
    steps: int
    loss_nats: float  # held out, of the fault-free run
    false_alarms: int  # incidents of the fault-free run
    rows: tuple[Drilled, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every gate of every fault is met."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [asdict(row) | {"path": str(row.path), "passed": row.passed} for row in self.rows]
        return asdict(self) | {"path": str(self.path), "rows": rows, "passed": self.passed}


def config_of_drill(
    overrides: Mapping[str, Any] | None = None, *, quick: bool = False
) -> TrainConfig:
    """A model of 0.1 M parameters with delayed FP8 scales, with `overrides` on top."""
    base = {
        "model": {"preset": "llama-tiny"},
        "data": {"tokenizer": "bytes", "length": 64, "max_tokens": 2_000_000},
        "train": {
            "steps": 260 if quick else 420,
            "rows": 8,
            "lr": 3e-3,
            "eval_every": 20,
            "eval_batches": 4,
            "count_every": 25,
            "threads": 1,
        },
        "policy": {"recipe": "te_delayed"},
        "sharpness": {"every": 0},
    }
    return load_config(merge(base, overrides or {}))


def drill(
    config: TrainConfig,
    names: Sequence[str] | None = None,
    *,
    unguarded: bool = False,
    force: bool = False,
    on_run: OnRun | None = None,
    on_event: OnEvent | None = None,
) -> DrillReport:
    """Train `config` without a fault, then go on from it with each fault, the guard on.

    `names`: which faults; None for all that the recipe can have. `unguarded` trains each once more
    without the guard. The runs lie in `config.run.out`, or a new runs/drill-001. `on_run` receives
    the name and the number of steps of each run before it, `on_event` its events.

    ConfigError for a run too short for a guard, without a guard, or with a fault that does not
    exist or that its recipe cannot have; RunError if the directory is in use.
    """
    config = _checked(config)
    out = Path(config.run.out) if config.run.out else free_directory(Path("runs"), "drill")
    blocks, vocab = _blocks_of(config)
    check = config.train.count_every or CHECK
    chosen, left_out = _choose(_cases(blocks, vocab, check), names, config, blocks)
    bench = _Bench(config, _make_room(out, force), on_run or _silent, on_event)
    clean = bench.train("fault-free")
    rows = tuple(bench.drill(case, clean, unguarded=unguarded) for case in chosen)
    loss = gates.held_out(clean)[config.train.steps]
    return DrillReport(out, config.train.steps, loss, len(_incidents(clean, 0)), rows, left_out)


def faults_of(config: TrainConfig) -> dict[str, Callable[[int], Fault]]:
    """Every fault that `config` can be drilled with by its name, from its (1-based) step."""
    blocks, vocab = _blocks_of(config)
    cases, _ = _choose(_cases(blocks, vocab, CHECK), None, config, blocks)
    return {case.name: case.fault for case in cases}


@dataclass
class _Bench:
    """The runs of one drill."""

    config: TrainConfig
    out: Path
    on_run: OnRun
    on_event: OnEvent | None

    @property
    def before(self) -> int:
        """Finished steps when the fault happens."""
        return self.config.train.checkpoint_every

    def train(self, name: str, **changes: Any) -> Path:
        """A run from the beginning, with other keys of [train] or another [guard]."""
        guard = changes.pop("guard", self.config.guard)
        injected = changes.pop("faults", ())
        section = replace(self.config.train, **changes)
        run = replace(self.config.run, out=str(self.out / name))
        config = replace(self.config, run=run, train=section, guard=guard)
        self.on_run(name, section.steps)
        train(config, command=_COMMAND, on_event=self.on_event, faults=injected)
        return self.out / name

    def skipping(self) -> Path:
        """A run that never sees the batch of the fault."""
        path = self.out / "skipping"
        return path if path.exists() else self.train("skipping", skip=(self.before,))

    def drill(self, case: Case, clean: Path, *, unguarded: bool) -> Drilled:
        """Go on from the fault-free run with one fault, and judge what happened."""
        path, at = self.out / case.name, self.before + 1
        shutil.copytree(clean, path)
        self.on_run(case.name, self.config.train.steps)
        reason = "finished"
        try:
            train(
                self.config,
                resume=path,
                from_step=self.before,
                command=_COMMAND,
                on_event=self.on_event,
                faults=[case.fault(at)],
            )
        except (StoppedError, NonFiniteError):
            reason = Run.open(path, writer=False).summary()["reason"]
        look = Look(
            at, self.config.train.steps, path, reason, _incidents(path, at), clean, self.skipping
        )
        row = _row(case, look)
        return replace(row, unguarded_gap=self._unguarded(case, clean)) if unguarded else row

    def _unguarded(self, case: Case, clean: Path) -> float:
        name = f"{case.name}-unguarded"
        try:
            path = self.train(
                name, guard=GuardSection(on=False), faults=[case.fault(self.before + 1)]
            )
        except NonFiniteError:
            return math.inf
        return _gap(path, clean, self.config.train.steps)


def _row(case: Case, look: Look) -> Drilled:
    first, costs = look.first, [incident["cost"] for incident in look.incidents]
    told: dict[str, Any] = {
        key: sum(cost[key] for cost in costs) for key in ("withheld", "replayed", "passes")
    }
    if first:
        told |= {key: first[key] for key in ("trigger", "verdict", "margin", "action")}
        told |= {"units": tuple(first["units"]), "done": tuple(first["done"])}
    return Drilled(
        fault=case.name,
        step=look.at,
        expected=case.verdict,
        culprit=case.unit,
        path=look.path,
        reason=look.reason,
        gates=tuple(judge(look) for judge in case.judges),
        delay=look.delay,
        incidents=len(look.incidents),
        loss_gap=_gap(look.path, look.clean, look.steps) if look.reason == "finished" else math.nan,
        **told,
    )


def _cases(blocks: BlockMap, vocab: int, check: int) -> tuple[Case, ...]:
    """All faults, each where it is at home in this model; `check` steps are between two counts."""
    late, units = _late(blocks), units_of(blocks)
    unit, weight = units.of[late.block], f"{late.module}.weight"
    hit = tuple(name for name, of in units.parameters.items() if of == unit)
    data = (gates.noticed(0), gates.verdict(DATA), gates.same_as_skipping)
    state = (gates.noticed(1), gates.verdict(STATE), gates.named(unit), gates.recovered_soon(0.02))
    # No gate on the loss: a rate that is lowered and warmed up again costs a short run some of it.
    jump = (gates.noticed(20), gates.verdict(STATE), gates.named(""))
    lost = (gates.noticed(20), gates.verdict(STATE), gates.named(unit), gates.recovered(0.05))
    stale = (
        gates.triggered("numeric"), gates.noticed(check), gates.verdict(PRECISION),
        gates.named(unit), gates.ahead(5.0), gates.unsaturated(late.name, 1e-5),
        gates.recovered(0.01),
    )  # fmt: skip
    once = (gates.noticed(0), gates.verdict(HARDWARE), gates.same_as_clean)
    broken = (
        gates.noticed(0), gates.verdict(HARDWARE), gates.named(unit),
        gates.ended("stopped"),
    )  # fmt: skip
    return (
        Case("bad-batch", lambda at: faults.BadBatch(at, vocab=vocab), DATA, "", data),
        Case("nan-batch", faults.NanBatch, DATA, "", data),
        Case("bit-flip", lambda at: faults.FlippedBit(at, parameter=weight), STATE, unit, state),
        Case("weight-x8", lambda at: faults.ScaledWeight(at, parameter=weight), STATE, unit, state),
        Case(
            "stale-scale", lambda at: faults.StaleScale(at, gemm=late.name),
            PRECISION, unit, stale,
        ),
        Case("lr-jump", faults.RateJump, STATE, "", jump),
        Case("lost-moment", lambda at: faults.LostMoment(at, parameters=hit), STATE, unit, lost),
        Case("noisy-gemm", lambda at: faults.NoisyGemm(at, module=late.module), HARDWARE, "", once),
        Case(
            "broken-gemm", lambda at: faults.NoisyGemm(at, module=late.module, lasting=True),
            HARDWARE, unit, broken,
        ),
    )  # fmt: skip


def _choose(
    cases: Sequence[Case], names: Sequence[str] | None, config: TrainConfig, blocks: BlockMap
) -> tuple[list[Case], dict[str, str]]:
    """The cases to drill, and why others are left out."""
    known = {case.name: case for case in cases}
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"fault {unknown[0]!r} does not exist. {nearest(unknown[0], known)}")
    left_out = {} if _is_delayed(config, blocks) else {"stale-scale": _NO_DELAY}
    if named := [name for name in names or () if name in left_out]:
        raise ConfigError(f"fault {named[0]!r} is not possible: {left_out[named[0]]}")
    return [
        case for case in cases if case.name in (names or known) and case.name not in left_out
    ], left_out


_NO_DELAY = "the input of no ffn has a delayed scale. Use a recipe such as te_delayed."


def _is_delayed(config: TrainConfig, blocks: BlockMap) -> bool:
    resolution = load_policies(config.policy)[-1].resolve(blocks)
    specs = {gemm.name: spec for gemm, _, spec, _ in resolution.gemms}
    return specs[_late(blocks).name].fprop_x.scale == "delayed"


def _late(blocks: BlockMap) -> Gemm:
    """The last linear of the last ffn."""
    linears = [gemm for gemm in blocks.gemms if gemm.role == "linear"]
    return [*linears, *(g for g in linears if g.block.endswith(".ffn"))][-1]


def _checked(config: TrainConfig) -> TrainConfig:
    """With the one checkpoint that all faults go on from."""
    steps = config.train.steps
    before = round(FAULT_AFTER * steps)
    if not config.guard.on:
        raise ConfigError("a drill tests the guard, and guard.on = false. Delete it.")
    if before < SETTLED or steps - before < AFTER:
        least = math.ceil(SETTLED / FAULT_AFTER)
        raise ConfigError(
            f"train.steps = {steps} is too short for a drill: the guard needs {SETTLED} steps "
            f"before the fault and {AFTER} after it. Give {least} or more."
        )
    return replace(config, train=replace(config.train, checkpoint_every=before, keep=2))


def _blocks_of(config: TrainConfig) -> tuple[BlockMap, int]:
    """The block map of the model and the size of its vocabulary."""
    vocab = open_data(config.data.corpus(), cache_directory() / "data").vocab
    length, seed = config.data.length, config.train.seed
    model = build_model(config.model, vocab=vocab, length=length, seed=seed).model
    return block_map(model, config.model.hints), vocab


def _make_room(out: Path, force: bool) -> Path:
    if out.exists() and any(out.iterdir()):
        if not force:
            raise RunError(f"{out} is in use. Give another --out, or --force to replace the drill.")
        _remove_drill(out)
    return out


def _remove_drill(out: Path) -> None:
    strange = [
        p.name
        for p in out.iterdir()
        if not (p / "config.toml").is_file() and p.name != "drill.json"
    ]
    if strange:
        raise RunError(f"{out} holds more than a drill ({strange[0]}). Give another --out.")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _incidents(path: Path, since: int) -> list[dict[str, Any]]:
    events = Run.open(path, writer=False).events("guard")
    return [event for event in events if event["step"] >= since]


def _gap(path: Path, clean: Path, step: int) -> float:
    """Held-out loss over that of the fault-free run."""
    return gates.held_out(path).get(step, math.nan) - gates.held_out(clean)[step]


def _silent(name: str, steps: int) -> None:
    pass
