"""Sketches at rest: NAME.hll, NAME.theta and NAME.hll.json, which says what was counted."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import halfulp
from halfulp.corpus.hll import Hll, rel_std
from halfulp.corpus.theta import Theta
from halfulp.data.cache import read_json, replacing, write_json
from halfulp.errors import DataError

UNKNOWN = "unknown"
KEYS = "polynomial 1"
_FORMAT = "halfulp sketch 1"


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What is counted; sketches unite only where all of it is the same.

    `sequences` is "words:3", "tokens:8", "window:16", … `tokenizer` is its SHA-256, "unknown" for
    token files that do not say, "" for words. `normalizer` says how text becomes words ("" for
    tokens), `keys` how sequences become 64-bit keys.
    """

    sequences: str
    tokenizer: str
    normalizer: str
    keys: str = KEYS


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much was counted: `symbols` are words or tokens, `occurrences` sequences."""

    documents: int
    symbols: int
    occurrences: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The distinct sequences of a corpus or a part of it.

    `checkpoints`: (occurrences, estimate) along the corpus in the order of its files, at least a
    factor √2 apart, and at its end; empty after a merge, which has no order.
    """

    definition: Definition
    amounts: Amounts
    hll: Hll
    theta: Theta
    checkpoints: tuple[tuple[int, float], ...] = ()


def paths_of(path: Path) -> tuple[Path, Path, Path]:
    """The three files of the sketch `path` (NAME.hll)."""
    return path, path.with_suffix(".theta"), path.with_name(f"{path.name}.json")


def save(sketch: Sketch, path: Path) -> None:
    """Write the sketch's three files. DataError when one cannot be written."""
    hll, theta, sidecar = paths_of(path)
    for file, image in ((hll, sketch.hll.to_bytes()), (theta, sketch.theta.to_bytes())):
        with replacing(file) as out:
            out.write(image)
    write_json(sidecar, facts_of(sketch))


def load(path: Path) -> Sketch:
    """The sketch that `save` wrote at `path`.

    Raises DataError when one of its three files is missing or damaged.
    """
    hll, theta, sidecar = paths_of(path)
    if path.is_dir():
        raise DataError(
            f"{path} is a folder. Make its sketch first: halfulp corpus sketch {path} -o NAME.hll"
        )
    try:
        images = hll.read_bytes(), theta.read_bytes()
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}. A sketch is three files, "
            f"{', '.join(file.name for file in (hll, theta, sidecar))}; keep them together."
        ) from error
    try:
        return _read(read_json(sidecar), Hll.from_bytes(images[0]), Theta.from_bytes(images[1]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{sidecar} does not say what {path} counts ({error!r}). Make the sketch again."
        ) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def merge(sketches: Sequence[Sketch]) -> Sketch:
    """The union of at least one sketch; the parts must not share documents in their amounts.

    Raises DataError for sketches of unlike definitions or sizes.
    """
    first = sketches[0]
    hll, theta = Hll(first.hll.lg_k), Theta(first.theta.lg_capacity)
    for sketch in sketches:
        require_alike(first, sketch)
        hll.merge(sketch.hll)
        theta.merge(sketch.theta)
    sums = {f.name: sum(getattr(s.amounts, f.name) for s in sketches) for f in fields(Amounts)}
    checkpoints = first.checkpoints if len(sketches) == 1 else ()
    return Sketch(
        definition=first.definition,
        amounts=Amounts(**sums),
        hll=hll,
        theta=theta,
        checkpoints=checkpoints,
    )


def require_alike(one: Sketch, other: Sketch) -> None:
    """DataError naming the first thing in which the definitions or the sizes differ."""
    mine, theirs = (
        {**asdict(s.definition), "lg_k": s.hll.lg_k, "lg_capacity": s.theta.lg_capacity}
        for s in (one, other)
    )
    for name, value in mine.items():
        if theirs[name] != value:
            raise DataError(
                f"the sketches count unlike things: {name} is {value!r} in one and "
                f"{theirs[name]!r} in another. Make both with one {name}."
            )


def facts_of(sketch: Sketch) -> dict[str, Any]:
    """What the side-car says."""
    return {
        "format": _FORMAT,
        "halfulp": halfulp.__version__,
        "definition": asdict(sketch.definition),
        "amounts": asdict(sketch.amounts),
        "lg_k": sketch.hll.lg_k,
        "distinct": sketch.hll.estimate(),
        "rel_std": rel_std(sketch.hll.lg_k),
        "checkpoints": [list(pair) for pair in sketch.checkpoints],
    }


def _read(facts: dict[str, Any] | None, hll: Hll, theta: Theta) -> Sketch:
    if facts is None or facts["format"] != _FORMAT:
        raise ValueError(f"it is no JSON of the format {_FORMAT!r}")
    amounts = Amounts(**facts["amounts"])
    if not all(type(value) is int and value >= 0 for value in asdict(amounts).values()):
        raise ValueError(f"its amounts are {facts['amounts']}")
    # Another version may sum in another order, so that its last digits differ.
    if not math.isclose(facts["distinct"], hll.estimate(), rel_tol=1e-6):
        raise ValueError(f"it is of a sketch of {facts['distinct']} sequences")
    return Sketch(
        definition=Definition(**facts["definition"]),
        amounts=amounts,
        hll=hll,
        theta=theta,
        checkpoints=tuple((int(at), float(distinct)) for at, distinct in facts["checkpoints"]),
    )
