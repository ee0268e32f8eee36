"""What `halfulp corpus stats` found in a corpus, as a plan needs it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfulp.errors import DataError, PlanError
from halfulp.plan.said import said

if TYPE_CHECKING:
    from halfulp.corpus.growth import Growth
    from halfulp.corpus.stats import Stats


@dataclass(frozen=True, kw_only=True)
class Order:
    """Distinct n-symbol sequences; `curve` holds (sequences read, distinct ones)."""

    n: int
    unit: str  # "token" or "word"
    unique: float
    exponent: float | None  # local exponent d ln U / d ln T at the end
    doubling: float | None  # how much more corpus doubles U, were the exponent to stay
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Symbols of a corpus, those in documents not seen before, and sequences of every order.

    Symbols are tokens, or words where no tokens were counted: `unit`.
    """

    file: str
    unit: str
    tokenizer: str
    symbols: float
    unique_symbols: float
    orders: tuple[Order, ...]

    @property
    def note(self) -> str:
        """What stands in for tokens, where none were counted."""
        return "" if self.unit == "token" else said("words_for_tokens", file=self.file)


def read_facts(path: Path) -> Facts:
    """The facts in a file of `halfulp corpus stats -o`.

    Raises DataError for a file that cannot be read or is something else, and PlanError for a
    corpus without any text.
    """
    from halfulp.corpus.stats import load_stats

    stats = load_stats(path)
    try:
        return _facts(path, stats)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(
            f"{path} is damaged or was edited ({error!r}). Write it again with: "
            "halfulp corpus stats PATH -o stats.json"
        ) from error


def _facts(path: Path, stats: "Stats") -> Facts:
    stream = "tokens" if stats.symbols.get("tokens") else "words"
    symbols = float(stats.symbols.get(stream, 0))
    if not symbols:
        raise PlanError(f"{path} counted no text: the corpus is empty. Count another one.")
    if not 0 < symbols < math.inf:
        raise ValueError(f"{symbols:g} {stream}")
    # Documents of text are measured in words, those of token files in tokens.
    measured = stats.symbols["tokens" if stats.text_bytes is None else "words"]
    distinct = stats.counts["documents"].unique_symbols
    share = 1.0 if distinct is None else min(1.0, distinct / measured)
    orders = (_order(name, count) for name, count in stats.counts.items() if ":" in name)
    return Facts(
        file=path.name,
        unit=stream.removesuffix("s"),
        tokenizer=_tokenizer(stats.tokenizer, token_files=stats.text_bytes is None),
        symbols=symbols,
        unique_symbols=symbols * share,
        orders=tuple(sorted((o for o in orders if o), key=lambda order: (order.unit, order.n))),
    )


def _order(name: str, count: "Growth") -> Order | None:
    family, _, n = name.partition(":")
    if family not in ("words", "tokens"):
        return None
    return Order(
        n=int(n),
        unit=family.removesuffix("s"),
        unique=float(count.distinct),
        exponent=count.slope,
        doubling=_finite(count.doubling_factor),
        curve=tuple((float(t), float(u)) for t, u in count.curve),
    )


def _tokenizer(described: Mapping[str, Any] | None, *, token_files: bool) -> str:
    if described is None:
        return said("of_token_files" if token_files else "only_words")
    name = str(described.get("path") or described.get("kind"))
    digest = str(described.get("sha256") or "")
    return f"{Path(name).name} {digest[:8]}".strip()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
