"""How many runs failed, and what that says about the next one."""

from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Failures:
    """`failed` of `runs` with a known outcome; `lost` more ended without one and count neither way.

    `lower` and `upper` bound the probability that a run fails, each with 95 % confidence on its
    own side (exact: Clopper and Pearson 1934). After 0 failures in 5 runs it may be up to 45 %.
    """

    failed: int
    runs: int
    lost: int = 0

    @property
    def share(self) -> float | None:
        """Failed runs over known ones; None where there is none."""
        return self.failed / self.runs if self.runs else None

    @property
    def lower(self) -> float:
        from scipy.stats import beta

        if self.failed == 0:
            return 0.0
        return float(beta.ppf(1 - LEVEL, self.failed, self.runs - self.failed + 1))

    @property
    def upper(self) -> float:
        from scipy.stats import beta

        if self.failed == self.runs:
            return 1.0
        return float(beta.ppf(LEVEL, self.failed + 1, self.runs - self.failed))

    @property
    def best(self) -> "Failures":
        """The best case: every lost run would have succeeded."""
        return Failures(self.failed, self.runs + self.lost)

    @property
    def worst(self) -> "Failures":
        """The worst case: every lost run would have failed."""
        return Failures(self.failed + self.lost, self.runs + self.lost)

    def __add__(self, other: "Failures") -> "Failures":
        return Failures(self.failed + other.failed, self.runs + other.runs, self.lost + other.lost)

    def __str__(self) -> str:
        """ "0 of 5 failed (at most 45 % at 95 % confidence)"; never that a recipe is stable."""
        bound = f"at most {100 * self.upper:.0f} % at 95 % confidence"
        text = f"{self.failed} of {self.runs} failed ({bound})"
        return f"{text}, {self.lost} lost" if self.lost else text
