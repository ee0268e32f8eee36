"""Learning-rate ratios per block type: the published ones, written ones, and measured ones.

The rate of a block is its ratio times that of the run (Wang et al., arXiv:2502.19002, §5): the
sharpest blocks, the norms, keep the tuned rate, and flatter ones learn faster.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from halfulp.errors import ConfigError
from halfulp.pieces import PIECE_TYPES, Piece
from halfulp.recipe_reader import nearest
from halfulp.sharpness.report import PAPER_TYPES, SharpnessReport

_PAPER = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0}
PRESETS: Mapping[str, Mapping[str, float]] = {
    # Wang et al. tuned them once, on a Llama of 0.25B, and used them for every model. Positions
    # and an untied head have knobs of their own in the official code; both follow the embedding.
    "paper": _PAPER | {"pos": 10.0, "head": 10.0},
    "paper-gpt2": _PAPER | {"pos": 10.0},  # learned positions, tied head
    "paper-llama": _PAPER | {"head": 10.0},  # no position table, untied head
    "uniform": dict.fromkeys((*_PAPER, "pos", "head"), 1.0),
}
ANCHORS = ("norm", "geomean")
FUSED = "qk+vo"
"""The type of a parameter that holds queries, keys and values: one rate, the lower of the two."""

_NAMED = tuple(kind for kind in PIECE_TYPES if kind != "qkvo")
_REQUIRED = ("emb", "qk", "ffn", "vo")
_FOLLOW_EMB = ("pos", "head")


@dataclass(frozen=True)
class Ratios:
    """The ratio of every block type of a model, and what it rests on.

    `by_type` has a ratio for each type that is trained; `notes` say what the reader must know.
    """

    by_type: Mapping[str, float]
    source: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, kind: str) -> float:
        return self.by_type[kind]


RatiosLike = str | Mapping[str, float] | SharpnessReport | Ratios


def lr_types(parts: Iterable[Piece]) -> dict[str, str]:
    """Parameter → the type that decides its rate: one of PIECE_TYPES, or FUSED."""
    kinds: dict[str, str] = {}
    for piece in parts:
        sliced = piece.parameter in kinds or piece.kind == "qkvo"
        kinds[piece.parameter] = FUSED if sliced else piece.kind
    return kinds


def resolve(
    ratios: RatiosLike, trained: Iterable[str], frozen: Iterable[str] = (), *, anchor: str = "norm"
) -> Ratios:
    """The ratio of each type in `trained` (of lr_types; `frozen`: types that are not trained).

    * a preset: "paper" (positions and an untied head follow the embedding), "paper-gpt2",
      "paper-llama" or "uniform";
    * "emb=10,qk=8,ffn=6,vo=4" or a mapping: names each of emb, qk, ffn and vo that is trained.
      Left out, `norm` is 1, `pos` and `head` are as emb, and `qk_norm`, `bias` and `router` are 1;
    * a SharpnessReport, by the rule of `measured`.

    A fused projection gets the lower ratio of qk and vo, and a note. `anchor`: "norm" leaves the
    ratios as they are; "geomean" divides all by the geometric mean of the paper's types.

    Raises ConfigError for an unknown preset or type, one left out, one that is frozen or absent,
    and a ratio that is not positive.
    """
    kinds = list(dict.fromkeys(trained))
    has = set(kinds) | ({"qk", "vo"} if FUSED in kinds else set())
    if isinstance(ratios, Ratios):
        if missing := [name for name in _REQUIRED if name in has and name not in ratios.by_type]:
            raise ConfigError(
                f"the {ratios.source} ratios have none for {', '.join(missing)}, which this model "
                "trains. Measure this model."
            )
        found = _completed(ratios.by_type, has)
        source, notes = ratios.source, ratios.notes
    elif isinstance(ratios, SharpnessReport):
        return resolve(measured(ratios), kinds, frozen, anchor=anchor)
    else:
        found, source = _asked(ratios, has, set(frozen) - has)
        notes = ()
    if FUSED in kinds:
        found[FUSED] = min(found["qk"], found["vo"])
        notes += (
            f"Fused projections of queries, keys and values learn at one rate, the lower of "
            f"qk = {found['qk']:g} and vo = {found['vo']:g}.",
        )
    notes += _out_of_order(found, has) if source != "measured" else ()
    anchored, more = _anchored(found, anchor)
    return Ratios({kind: anchored[kind] for kind in kinds}, source, (*notes, *more))


def measured(report: SharpnessReport, *, power: float = 0.5, cap: float = 10.0) -> Ratios:
    """Ratios from measured sharpness: (S_ref / S)^power within [1, cap], S_ref the sharpest type.

    Adam's steps are of one size, so the best rate of a block goes with S^(-1/2); power = 2/3 comes
    closest to the published ratios. Each is shrunk towards the square root of the published one by
    its standard error. S(emb) and S(head) go with 1/vocabulary, which says nothing of the rate:
    the published ratio has at least half the weight. Positions have the published ratio alone.
    """
    if not 0 < power <= 1 or not 1 <= cap < math.inf:
        raise ConfigError(
            f"power = {power:g} and cap = {cap:g} cannot be used. Give a power in (0, 1] and a "
            "cap of at least 1."
        )
    rows = report.by_type
    names = [k for k in (*PAPER_TYPES, "head") if k in rows]
    found = rule(
        {k: rows[k].sharpness for k in names}, {k: rows[k].rel_se for k in names}, power, cap
    )
    found |= {k: 1.0 for k in ("qk_norm", "bias", "router") if k in rows}
    if "pos" in rows:
        found["pos"] = _PAPER["emb"]
    if "qkvo" in rows:
        raise ConfigError(
            "the report has fused projections whose layout is unknown (qkvo), so qk and vo were "
            "not measured apart. Give ratios that name them, or 'paper'."
        )
    sharpest = max((k for k in names if k in PAPER_TYPES), key=lambda k: rows[k].sharpness)
    note = f"Measured ratios: (S({sharpest}) / S)^{power:g}, at most {cap:g}; {report.draws} draws."
    return Ratios(found, "measured", (note,))


def rule(
    sharpness: Mapping[str, float], rel_se: Mapping[str, float], power: float, cap: float
) -> dict[str, float]:
    """The rule of `measured` on numbers alone. ConfigError where a sharpness is not positive."""
    for kind, value in sharpness.items():
        if not 0 < value < math.inf:
            raise ConfigError(
                f"the measured sharpness of {kind} is {value:g}: no ratio follows. Measure with "
                "the estimator 'gnb', which is never negative, or give ratios."
            )
    reference = max(value for kind, value in sharpness.items() if kind in PAPER_TYPES)
    ratios = {}
    for kind, value in sharpness.items():
        ratio = min(cap, max(1.0, (reference / value) ** power))
        noise = rel_se[kind]
        weight = 1 / (1 + (noise / 0.25) ** 2) if math.isfinite(noise) else 0.0
        prior = math.sqrt(_PAPER.get(kind, 1.0))
        if kind in ("emb", "head"):
            weight, prior = min(weight, 0.5), _PAPER["emb"]
        ratios[kind] = math.exp(weight * math.log(ratio) + (1 - weight) * math.log(prior))
    return ratios


def parse(text: str) -> dict[str, float]:
    """ "emb=10,qk=8,ffn=6,vo=4" as a dict; ConfigError for what cannot be read."""
    found: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or math.isnan(number):
            raise ConfigError(
                f"ratios {text!r}: {item.strip()!r} is not understood. Give one of "
                f"{', '.join(PRESETS)}, or ratios such as 'emb=10,qk=8,ffn=6,vo=4'."
            )
        if name in found:
            raise ConfigError(f"ratios {text!r} name {name!r} twice. Delete one of them.")
        found[name] = number
    return found


def check_names(ratios: Mapping[str, float]) -> None:
    """ConfigError for a type that does not exist, or a ratio that is not positive and finite."""
    for name, value in ratios.items():
        if name not in _NAMED:
            raise ConfigError(
                f"ratios name the block type {name!r}, which does not exist. "
                f"Nearest: {nearest(str(name), _NAMED)}."
            )
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(
                f"the ratio {name} = {value!r} is no positive number. Give one above 0."
            )


def check_written(text: str) -> None:
    """ConfigError for a string that no model could use: an unknown preset, type or number."""
    if "=" in text:
        check_names(parse(text))
    elif text not in PRESETS:
        raise ConfigError(
            f"ratios = {text!r} does not exist. Nearest: {nearest(text, PRESETS)}. Or write them: "
            "'emb=10,qk=8,ffn=6,vo=4'."
        )


def _asked(
    ratios: str | Mapping[str, float], has: set[str], frozen: set[str]
) -> tuple[dict[str, float], str]:
    if isinstance(ratios, str) and "=" not in ratios:
        check_written(ratios)
        return _preset(ratios, has, frozen), ratios
    if not isinstance(ratios, str | Mapping):
        raise ConfigError(
            f"ratios = {ratios!r} cannot be used. Give one of {', '.join(PRESETS)}, "
            "'emb=10,qk=8,ffn=6,vo=4', a mapping, or a report of halfulp.sharpness."
        )
    given = parse(ratios) if isinstance(ratios, str) else dict(ratios)
    check_names(given)
    if absent := [name for name in given if name not in has]:
        _refuse_absent(absent[0], frozen, _written({k: v for k, v in given.items() if k in has}))
    if missing := [name for name in _REQUIRED if name in has and name not in given]:
        raise ConfigError(
            f"ratios {_written(given)!r} leave out {', '.join(missing)}. Name each of "
            f"{', '.join(n for n in _REQUIRED if n in has)}; 1 keeps the learning rate."
        )
    return _completed(given, has), _written(given)


def _preset(name: str, has: set[str], frozen: set[str]) -> dict[str, float]:
    preset = PRESETS[name]
    optional = _FOLLOW_EMB if name in ("paper", "uniform") else ()
    for kind in preset:
        if kind not in has and kind not in optional and name != "uniform":
            rest = _written({k: v for k, v in preset.items() if k in has})
            _refuse_absent(kind, frozen, rest, f"{name!r} has a ratio for ")
    if missing := [kind for kind in _FOLLOW_EMB if kind in has and kind not in preset]:
        raise ConfigError(
            f"{name!r} has no ratio for {missing[0]}, which this model has. Use 'paper', or write "
            f"the ratios: '{_written(preset)},{missing[0]}=10'."
        )
    return _completed(preset, has)


def _refuse_absent(kind: str, frozen: set[str], rest: str, lead: str = "the ratios name ") -> None:
    if kind in frozen:
        raise ConfigError(
            f"{lead}{kind}, whose parameters are all frozen. Unfreeze them with "
            f"requires_grad_(True), or give the other ratios: {rest!r}."
        )
    raise ConfigError(f"{lead}{kind}, and the model has none. Give the other ratios: {rest!r}.")


def _completed(ratios: Mapping[str, float], has: set[str]) -> dict[str, float]:
    """`ratios` with the defaults of what they do not name."""
    emb = ratios.get("emb", 1.0)
    return {kind: ratios.get(kind, emb if kind in _FOLLOW_EMB else 1.0) for kind in (*has, *ratios)}


def _out_of_order(ratios: Mapping[str, float], has: set[str]) -> tuple[str, ...]:
    """A note where values and outputs are raised above a type that is flatter by the paper."""
    flatter = {kind: ratios[kind] for kind in ("emb", "qk", "ffn") if kind in has}
    low = [f"{kind} = {ratio:g}" for kind, ratio in flatter.items() if ratio < ratios.get("vo", 1)]
    if not low or ratios["vo"] <= 1:
        return ()
    return (
        f"vo = {ratios['vo']:g} is above {', '.join(low)}, which are flatter: raising vo first has "
        "made small models worse (docs/learning_rates.md).",
    )


def _anchored(ratios: dict[str, float], anchor: str) -> tuple[dict[str, float], tuple[str, ...]]:
    if anchor not in ANCHORS:
        raise ConfigError(f"anchor = {anchor!r} does not exist. Give {' or '.join(ANCHORS)}.")
    if anchor == "norm":
        return ratios, ()
    logs = [math.log(ratios[k]) for k in PAPER_TYPES if k in ratios]
    mean = math.exp(sum(logs) / len(logs)) if logs else 1.0
    note = f"All ratios are divided by {mean:.4g}, so that their geometric mean keeps the rate."
    return {kind: ratio / mean for kind, ratio in ratios.items()}, (note,)


def _written(ratios: Mapping[str, float]) -> str:
    return ",".join(f"{kind}={ratio:g}" for kind, ratio in ratios.items())
