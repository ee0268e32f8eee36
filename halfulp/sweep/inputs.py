"""What the user says about the run to decide on, and what stands in for what was not said."""

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from halfulp.errors import ConfigError
from halfulp.hardware import load_gpu
from halfulp.speedups import Speedup, load_speedups
from halfulp.sweep.cost import JEFFREYS, Guard
from halfulp.sweep.ranges import Range, between, exactly

_POSITIVE = (
    *("gpu_hours", "price_usd", "prior_octaves", "proxy_fraction", "search_seeds", "tokens"),
)
_MOST_SPEEDUP = 50.0  # beyond it only a percentage leads
_MOST_PRIOR = 1e6
Speed = float | tuple[float, float]  # a ratio, or its lowest and highest value


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The run to decide on. What is None is taken from shipped data where there is any.

    gpu_hours: GPU-hours of one successful run of the reference. price_usd: dollars per GPU-hour.
    speedup: step time of the reference over that of the recipe, end to end, on the hardware that
    will run it; one for all recipes or one per recipe. prior_octaves: how many factors of two the
    best learning rate is uncertain by. proxy_fraction: cost of one run of the search over the cost
    of a run. tokens: of one run. extra_tokens: share that a recipe needs on top. adoption_usd: what
    leaving the reference costs in people. guard: on every recipe alike. success_prior: (a, b) of
    the Beta distribution of the success probability before the sweep, of every recipe alike.
    """

    gpu_hours: float | None = None
    gpu: str | None = None
    price_usd: Speed | None = None
    speedup: Speed | Mapping[str, Speed] | None = None
    prior_octaves: float | None = None
    proxy_fraction: float | None = None
    search_seeds: int | None = None
    tokens: float | None = None
    extra_tokens: Mapping[str, float] = field(default_factory=dict)
    adoption_usd: float = 0.0
    guard: Guard | None = None
    success_prior: tuple[float, float] = JEFFREYS

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _positive(name, getattr(self, name))
        if not all(0 < part < _MOST_PRIOR for part in self.success_prior):
            raise ConfigError(
                f"success_prior = {list(self.success_prior)} is no Beta distribution. Give two "
                f"numbers > 0 and below {_MOST_PRIOR:g}: runs that have succeeded and failed, each "
                "plus 0.5."
            )
        if not (math.isfinite(self.adoption_usd) and self.adoption_usd >= 0):
            raise ConfigError(f"adoption_usd = {self.adoption_usd} is no bill. Give dollars >= 0.")
        speeds = self.speedup if isinstance(self.speedup, Mapping) else {"": self.speedup}
        for recipe, speed in speeds.items():
            _positive(f"speedup {recipe}".strip(), speed, most=_MOST_SPEEDUP)
        for recipe, share in self.extra_tokens.items():
            if not -1 < share < math.inf:
                raise ConfigError(f"extra_tokens of {recipe} = {share} is no share. Give one > -1.")
        gpu = load_gpu(self.gpu) if self.gpu else None
        if gpu and gpu.price_usd is None and self.price_usd is None and self.gpu_hours:
            raise ConfigError(
                f"no price is listed for {gpu.key}. Give yours, in dollars per GPU-hour."
            )
        if self.adoption_usd and (self.gpu_hours is None or self.price is None):
            raise ConfigError(
                f"adoption_usd = {self.adoption_usd:g} can be weighed only against a bill in "
                "dollars. Give the GPU-hours of the reference, and a price or a GPU."
            )

    @property
    def price(self) -> Range | None:
        """Dollars per GPU-hour: given, else listed for the GPU, else None."""
        if self.price_usd is not None:
            return _range(self.price_usd)
        listed = load_gpu(self.gpu).price_usd if self.gpu else None
        return between(*listed) if listed else None

    def speed_of(self, recipe: str, reference: str) -> tuple[Range | None, tuple[Speedup, ...]]:
        """The ratio of step times and the published rows behind it (none if it was given)."""
        given = self.speedup
        if recipe == reference:
            return exactly(1.0), ()
        if isinstance(given, Mapping):
            given = given.get(recipe)
        if given is not None:
            return _range(given), ()
        rows = _published(recipe, self.gpu) if _is_bf16(reference) else ()
        if not rows:
            return None, ()
        middle = median(sum(row.range) / 2 for row in rows)
        low, high = min(row.range[0] for row in rows), max(row.range[1] for row in rows)
        return Range(value=middle, low=low, high=high), rows

    def assumed(self) -> dict[str, str]:
        """What the user assumes, as `--assume` spells it; without what has its own option."""
        found = {
            "prior_octaves": self.prior_octaves,
            "proxy_fraction": self.proxy_fraction,
            "search_seeds": self.search_seeds,
            "success_prior": None if self.success_prior == JEFFREYS else self.success_prior,
            "adoption_usd": self.adoption_usd or None,
            **{f"extra_tokens.{name}": share for name, share in self.extra_tokens.items()},
            **{
                f"guard.{name}": value
                for name, value in (vars(self.guard) if self.guard else {}).items()
            },
        }
        return {name: _spelled(value) for name, value in found.items() if value is not None}

    def check_recipes(self, recipes: Iterable[str], reference: str) -> None:
        """ConfigError for a speed-up or extra tokens of the reference or of none of `recipes`."""
        known = [recipe for recipe in recipes if recipe != reference]
        named = {*(self.speedup if isinstance(self.speedup, Mapping) else ()), *self.extra_tokens}
        if reference in named:
            raise ConfigError(
                f"{reference!r} is the reference: speed-ups and extra tokens are over its own. "
                f"Give those of {', '.join(known)}."
            )
        for name in sorted(named - set(known)):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ConfigError(
                f"{name!r} is no recipe of this sweep. Nearest: {', '.join(near)}. "
                "Name one of the sweep's recipes."
            )


def _spelled(value: float | tuple[float, float]) -> str:
    ends = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else ""
    return f"[{ends}]" if isinstance(value, tuple) else f"{value:g}"


def read_speedup(text: str) -> Speed | dict[str, Speed]:
    """`1.35`, `1.28-1.37` or one per recipe: `te_current=1.35,nvfp4=1.28-1.37`.

    Raises ConfigError naming the part that is neither.
    """
    if "=" not in text:
        return _speed(text)
    speeds = {}
    for part in text.split(","):
        recipe, sign, ratio = part.partition("=")
        if not (sign and recipe.strip()) or recipe.strip() in speeds:
            raise ConfigError(
                f"speed-up {part.strip()!r}: every recipe has one ratio. "
                "Write for instance te_current=1.35,nvfp4=1.28-1.37."
            )
        speeds[recipe.strip()] = _speed(ratio)
    return speeds


def _speed(text: str) -> Speed:
    try:
        ends = [float(end) for end in text.split("-")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2):
        raise ConfigError(
            f"speed-up {text.strip()!r} is no ratio. Give a number such as 1.35, "
            "or the lowest and the highest one: 1.28-1.37."
        )
    return ends[0] if len(ends) == 1 else (ends[0], ends[1])


def _is_bf16(reference: str) -> bool:
    """Whether published ratios are against this: a recipe, no stages and no policy file."""
    return reference.startswith("bf16") and "+" not in reference and not reference.endswith(".toml")


def _published(recipe: str, gpu: str | None) -> tuple[Speedup, ...]:
    """Step times, end to end, on GPUs of the same architecture; on any where no GPU is named."""
    rows = [row for row in load_speedups() if row.recipe == recipe and row.scope == "step"]
    if gpu is None:
        return tuple(rows)
    wanted = load_gpu(gpu).architecture
    return tuple(row for row in rows if row.hardware and _architecture(row.hardware) == wanted)


def _architecture(hardware: str) -> str:
    try:
        return load_gpu(hardware).architecture
    except ConfigError:  # a machine of the speed-ups that nobody rents out
        return ""


def _range(value: Speed) -> Range:
    return between(*value) if isinstance(value, tuple) else exactly(value)


def _positive(name: str, value: Speed | None, most: float = sys.float_info.max) -> None:
    ends = value if isinstance(value, tuple) else (value,)
    known = [end for end in ends if end is not None]
    if all(0 < end <= most for end in known) and known == sorted(known):
        return
    limit = f" and at most {most:g}" if most < sys.float_info.max else ""
    raise ConfigError(
        f"{name} = {value} has no meaning. Give a number > 0{limit}, a range lowest first."
    )
