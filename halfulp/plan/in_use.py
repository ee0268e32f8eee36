"""The law that a plan uses: one of laws.toml, or a fit of one's own runs, with its band."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import Chinchilla, chinchilla
from halfulp.plan.laws import LOSS_KINDS, Law, law_names, load_law
from halfulp.plan.repetition import Repetition, repetition
from halfulp.plan.said import Said, said

FEWEST_DRAWS = 100  # refits needed for the ends of a band
BAND = 0.8


@dataclass(frozen=True, kw_only=True)
class LawInUse:
    """A law of the loss, the decay of repeated tokens, and refits of the law on resampled runs.

    `draws` scatter around `center`, the fit to all runs; without them there is no band.
    """

    law: Law
    repeat: Repetition
    center: Chinchilla
    draws: tuple[Chinchilla, ...] = ()

    @property
    def plain(self) -> Chinchilla:
        """The law without repetition."""
        return self.repeat.law

    @property
    def about_band(self) -> Said:
        """How the band was made, or why there is none."""
        if not self.draws and self.law.name in law_names():
            return said("band_unpublished", law=self.law.name)
        if not self.draws:
            return said("band_few", law=self.law.name, least=FEWEST_DRAWS)
        return said("band_made", percent=100 * BAND, draws=len(self.draws))

    def loss(self, n: float, d: float, unique: float) -> float:
        """Nats per token of `n` parameters after `d` tokens of which `unique` are different."""
        return self.repeat.loss(n, d, unique)

    def band(self, n: float, d: float, unique: float) -> tuple[float, float] | None:
        """The lower and upper end of the band of `loss`; None where the law has no draws."""
        if not self.draws:
            return None
        import numpy as np

        def of(law: Chinchilla) -> float:
            decays = self.repeat.tokens_decay, self.repeat.parameters_decay
            return Repetition(law, *decays).loss(n, d, unique)

        shifts = np.array([of(law) for law in self.draws]) - of(self.center)
        low, high = np.quantile(shifts, [(1 - BAND) / 2, (1 + BAND) / 2])
        expected = self.loss(n, d, unique)
        return expected + float(low), expected + float(high)


def open_law(name: str) -> LawInUse:
    """The law `name` of laws.toml, or the fit in a .json file, or a fit to the runs in a .csv file.

    Raises PlanError for an unknown law, one that is no law of the loss, and an unusable file.
    """
    if name.endswith((".json", ".csv")):
        return _from_fit(_read_fit(Path(name)), Path(name).name)
    law = load_law(name)
    if law.kind not in LOSS_KINDS:
        known = ", ".join(law_names(*LOSS_KINDS))
        raise PlanError(
            f"law {name!r} does not give a loss for parameters and tokens that could be planned "
            f"with. Those that do: {known}; or a fit of your own runs (.json or .csv)."
        )
    plain = chinchilla(name)
    center, draws = _refits() if name == "epoch" else (plain, ())
    return LawInUse(law=law, repeat=repetition(plain), center=center, draws=draws)


@cache
def _refits() -> tuple[Chinchilla, tuple[Chinchilla, ...]]:
    text = (resources.files("halfulp.plan") / "epoch_draws.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return Chinchilla(*table["fit"]), tuple(Chinchilla(*row) for row in table["draws"])


def _read_fit(path: Path) -> Mapping[str, Any]:
    from halfulp.plan.fit_file import fit_file, read_fit

    return fit_file(path) if path.suffix == ".csv" else read_fit(path)


def _from_fit(table: Mapping[str, Any], name: str) -> LawInUse:
    values = {key: float(table["coefficients"][key]) for key in ("E", "A", "B", "alpha", "beta")}
    plain, draws = Chinchilla(**values), tuple(Chinchilla(*row) for row in table["draws"])
    law = Law(
        name=name,
        kind="loss",
        title=f"fit of {table['runs']} runs",
        formula=load_law("epoch").formula,
        source=str(table.get("source", name)),
        read="source",
        coefficients=values,
        ranges={key: (low, high) for key, (low, high) in table["ranges"].items()},
        notes=tuple(str(note) for note in table.get("notes", ())),
    )
    kept = draws if len(draws) >= FEWEST_DRAWS else ()
    return LawInUse(law=law, repeat=repetition(plain), center=plain, draws=kept)
