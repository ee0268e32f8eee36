"""The numeric signals of low-precision training: their rules as data, and who breaks them.

Failure modes F1 to F15 are those of specs/stability.md §2. docs/signals.md shows the rules as a
table, and why some thresholds are not those of §2: these would fire on healthy runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfulp.blocks import block_type
from halfulp.errors import RunError
from halfulp.numerics.quantizer import parse_quantizer


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A signal is abnormal when it is above a threshold in `needs` of `window` looks.

    `look` says when one looks: every "step", every "check", or in a "replay" by the guard. Above
    `warn` the finding is a warning. Above `act` it asks for more precision where `raises` says that
    this is a cure, and is a warning otherwise. None: there is no such threshold.
    """

    name: str
    failure: str
    signal: str
    unit: str
    look: str
    window: int
    needs: int
    warn: float | None
    act: float | None
    raises: bool
    remedy: str
    source: str

    def threshold(self, value: float) -> float | None:
        """The highest threshold that `value` is above; None for NaN, a failure of its own."""
        passed = [t for t in (self.warn, self.act) if t is not None and value > t]
        return max(passed, default=None)


STORAGE = ("lost_updates", "v_underflow")  # rules on how weights and moments are stored
YOUNG = 20  # steps before which the rules say nothing: histories and moments still fill
_CLIPPED = "current scaling, finer blocks or a wider format"
RULES = (
    Rule(
        name="saturation",
        failure="F3",
        signal="elements of a GEMM operand beyond the largest value of a scale that is delayed, "
        "static or absent",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=0.05,
        raises=True,
        remedy=_CLIPPED,
        source="FP8-LM (arXiv:2310.18313) halves its scale above 1e-5",
    ),
    Rule(
        name="stale",
        failure="F4",
        signal="amax of a GEMM operand over the amax that its delayed scale is for",
        unit="ratio",
        look="step",
        window=5,
        needs=5,
        warn=None,
        act=1.5,
        raises=True,
        remedy="current scaling, another amax history or a margin",
        source="Transformer Engine's delayed scaling, issue 1278",
    ),
    Rule(
        name="underflow",
        failure="F2",
        signal="nonzero elements of a GEMM operand that become zero",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=0.5,
        act=None,
        raises=True,
        remedy="a scale, finer blocks, or E5M2 for gradients",
        source="derived",
    ),
    Rule(
        name="underflow_energy",
        failure="F2",
        signal="share of the sum of squares of a GEMM operand in the elements that become zero",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=0.01,
        raises=True,
        remedy="a scale, finer blocks, or E5M2 for gradients",
        source="derived",
    ),
    Rule(
        name="lost_updates",
        failure="F1",
        signal="weights with a nonzero update that rounding to nearest leaves unchanged",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=0.1,
        act=0.5,
        raises=True,
        remedy="stochastic rounding of the update, or fp32 master weights",
        source="arXiv:2502.20566",
    ),
    Rule(
        name="v_underflow",
        failure="F12",
        signal="elements, not of embeddings or biases, whose stored second moment is 0 under a "
        "nonzero gradient",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=0.0,
        raises=True,
        remedy="the second moment in bf16 or fp32, or with range expansion",
        source="FP8-LM (arXiv:2310.18313); COAT (arXiv:2410.19313)",
    ),
    Rule(
        name="flip_back",
        failure="F15",
        signal="sampled codes of a quantized weight that left and came back within three steps",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=0.25,
        act=None,
        raises=True,
        remedy="a lower learning rate, or a finer grid for the weight",
        source="TetraJet-v2",
    ),
    Rule(
        name="swiglu",
        failure="F5",
        signal="largest over median of the channel amaxes of the input of a down-projection",
        unit="ratio",
        look="check",
        window=3,
        needs=2,
        warn=100.0,
        act=None,
        raises=False,
        remedy="Smooth-SwiGLU, a clamp, or the down-projection in bf16",
        source="arXiv:2409.12517",
    ),
    Rule(
        name="swiglu_scaled",
        failure="F5",
        signal="the same where one scale is shared by all channels of that input",
        unit="ratio",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=100.0,
        raises=True,
        remedy="the down-projection in bf16, or in blocks; Smooth-SwiGLU",
        source="arXiv:2409.12517",
    ),
    Rule(
        name="ln_clamp",
        failure="F6",
        signal="gains of a norm beyond the largest code of their block, where they are quantized",
        unit="share",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=0.1,
        raises=True,
        remedy="norm parameters in fp32, or a scale that is rounded up",
        source="arXiv:2506.20752; arXiv:2506.08027",
    ),
    Rule(
        name="ln_bias",
        failure="F6",
        signal="absolute sum of the rounding errors of a norm's gains over the sum of their "
        "magnitudes",
        unit="ratio",
        look="check",
        window=3,
        needs=2,
        warn=None,
        act=0.02,
        raises=True,
        remedy="norm parameters in fp32: a rounded-up scale has this bias too",
        source="arXiv:2506.20752; derived",
    ),
    Rule(
        name="attention_logits",
        failure="F7",
        signal="largest scaled product of a query and a key in one sequence",
        unit="nats",
        look="check",
        window=1,
        needs=1,
        warn=100.0,
        act=1e4,
        raises=False,
        remedy="norms on queries and keys, QK-Clip, a soft cap, a lower learning rate of qk",
        source="Kimi K2 (arXiv:2507.20534): 100; arXiv:2309.14322: 1e4",
    ),
    Rule(
        name="logz",
        failure="F8",
        signal="absolute mean log Z of the output logits above the logarithm of the vocabulary",
        unit="nats",
        look="check",
        window=1,
        needs=1,
        warn=5.0,
        act=None,
        raises=False,
        remedy="z-loss, 1e-4 log² Z; centered logits",
        source="PaLM (arXiv:2204.02311)",
    ),
    Rule(
        name="logits_sharpness",
        failure="F8",
        signal="logarithm of the centered sharpness of the logits above its own history",
        unit="robust deviations",
        look="measurement",
        window=3,
        needs=3,
        warn=6.0,
        act=None,
        raises=False,
        remedy="a lower learning rate, or more precision where the counters point",
        source="arXiv:2405.18710",
    ),
    Rule(
        name="gradient_noise",
        failure="F14",
        signal="norm of the difference of a block's gradient from the reference one, over the "
        "norm of that",
        unit="ratio",
        look="replay",
        window=3,
        needs=2,
        warn=1 / math.sqrt(3),
        act=None,
        raises=False,
        remedy="the backward pass in bf16",
        source="arXiv:2505.19115",
    ),
)
RULE: Mapping[str, Rule] = {rule.name: rule for rule in RULES}


@dataclass(frozen=True)
class Reading:
    """One signal of one block; `place` names the GEMM operand, the parameter or the module."""

    rule: str
    block: str
    place: str
    value: float
    backward: bool = False  # the operand belongs to dgrad or wgrad


@dataclass(frozen=True)
class Finding:
    """A broken rule, with the value and the place of the look that broke it."""

    rule: str
    block: str
    place: str
    value: float
    threshold: float
    level: str  # warn | act
    backward: bool = False


class Numeric:
    """The last looks at every signal of every block; says which rules they break.

    A block's forward and backward operands are judged apart. A warning is given once, until a whole
    window has been below the threshold; after an `act` the window starts anew.
    """

    def __init__(self) -> None:
        self._looks: dict[tuple[str, str, bool], list[tuple[int, float]]] = {}
        self._warned: set[tuple[str, str, bool]] = set()

    def observe(self, step: int, readings: Iterable[Reading]) -> list[Finding]:
        """The rules that are broken with the readings of `step`, the worst of each block.

        Looks at `step` or later are forgotten first: the run has gone back behind them.
        """
        found = (self._judge(step, reading) for reading in worst(readings))
        return [finding for finding in found if finding is not None]

    def forget(self, block: str) -> None:
        """Drop the looks at `block`, whose precision has changed."""
        self._looks = {key: looks for key, looks in self._looks.items() if key[1] != block}
        self._warned = {key for key in self._warned if key[1] != block}

    def state_dict(self) -> dict[str, Any]:
        """Everything it knows, as lists of plain values."""
        looks = [[*key, [list(look) for look in looks]] for key, looks in self._looks.items()]
        return {"looks": looks, "warned": sorted(map(list, self._warned))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises RunError for a rule that does not exist."""
        keys = [*(look[:3] for look in state["looks"]), *state["warned"]]
        if unknown := sorted({key[0] for key in keys} - RULE.keys()):
            raise RunError(
                f"the saved guard has looks at {', '.join(unknown)}, and there are rules for "
                f"{', '.join(RULE)} only. Resume with the version of halfulp that wrote it."
            )
        self._looks = {
            (rule, block, backward): [(step, value) for step, value in looks]
            for rule, block, backward, looks in state["looks"]
        }
        self._warned = {(rule, block, backward) for rule, block, backward in state["warned"]}

    def _judge(self, step: int, reading: Reading) -> Finding | None:
        rule, key = RULE[reading.rule], (reading.rule, reading.block, reading.backward)
        before = [look for look in self._looks.pop(key, []) if look[0] < step]
        looks = [*before, (step, reading.value)][-rule.window :]
        passed = [rule.threshold(value) for _, value in looks]
        over = [t for t in passed if t is not None]
        if not over:
            self._warned.discard(key)
            return None
        self._looks[key] = looks
        now = passed[-1]
        if now is None or len(over) < rule.needs:
            return None
        if rule.raises and sum(t == rule.act for t in over) >= rule.needs and now == rule.act:
            del self._looks[key]
            return _finding(reading, now, "act")
        if key in self._warned:
            return None
        self._warned.add(key)
        return _finding(reading, now, "warn")


def worst(readings: Iterable[Reading]) -> list[Reading]:
    """Of each rule, block and direction the reading with the largest value."""
    found: dict[tuple[str, str, bool], Reading] = {}
    for reading in readings:
        key = (reading.rule, reading.block, reading.backward)
        if key not in found or reading.value > found[key].value:
            found[key] = reading
    return list(found.values())


def readings_of(
    gemm_rows: Iterable[Mapping[str, Any]], optimizer_rows: Iterable[Mapping[str, Any]] = ()
) -> list[Reading]:
    """The counters of GEMM operands and of the optimizer as readings, the worst of each block.

    Takes rows of `Quantized.counters()` or `Quantized.stale()`, and of `AdamW.counters()`.
    """
    found = [reading for row in gemm_rows for reading in _of_operand(row)]
    found += [reading for row in optimizer_rows for reading in _of_parameter(row)]
    return worst(found)


def _of_operand(row: Mapping[str, Any]) -> list[Reading]:
    values: dict[str, float] = {key: row[key] for key in _SAME_NAME if key in row}
    if "saturated" in row and _can_clip(row["format"]):
        values["saturation"] = row["saturated"]
    place, backward = f"{row['gemm']} {row['operand']}", not row["operand"].startswith("fprop")
    return [Reading(rule, row["block"], place, v, backward) for rule, v in values.items()]


_SAME_NAME = ("stale", "underflow", "underflow_energy")


def _can_clip(quantizer: str) -> bool:
    """Whether elements can lie far beyond a scale; one that is made for them is off by rounding."""
    return parse_quantizer(quantizer).scale in ("none", "delayed", "static")


def _of_parameter(row: Mapping[str, Any]) -> list[Reading]:
    names, biased = ["lost_updates"], row["parameter"].rpartition(".")[2] == "bias"
    # The loss does not depend on a key's bias: its gradient is rounding noise and underflows.
    if block_type(row["block"]) != "emb" and not biased:
        names.append("v_underflow")
    return [
        Reading(name, row["block"], row["parameter"], row[name]) for name in names if name in row
    ]


def _finding(reading: Reading, threshold: float, level: str) -> Finding:
    return Finding(
        reading.rule, reading.block, reading.place, reading.value, threshold, level,
        reading.backward,
    )  # fmt: skip


def table(rules: Sequence[Rule] = RULES) -> str:
    """The rules as a Markdown table, as it stands in docs/signals.md."""
    head = ("rule", "mode", "signal", "unit", "window", "warn", "act", "remedy", "source")
    rows = [head, ("---",) * len(head), *map(_cells, rules)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(rule: Rule) -> tuple[str, ...]:
    return (
        f"`{rule.name}`",
        rule.failure,
        rule.signal,
        rule.unit,
        _window(rule),
        _limits(rule.warn, None if rule.raises else rule.act),
        _limits(rule.act if rule.raises else None),
        rule.remedy,
        rule.source,
    )


def _limits(*thresholds: float | None) -> str:
    return ", ".join(f"> {t:.3g}" for t in thresholds if t is not None) or "–"


def _window(rule: Rule) -> str:
    if rule.window == 1:
        return f"every {rule.look}"
    return f"{rule.needs} of {rule.window} {rule.look}s"
