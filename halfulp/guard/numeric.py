"""The last looks at every numeric signal of every block, and the rules that they break."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfulp.errors import RunError
from halfulp.guard.readings import Reading, worst
from halfulp.guard.rules import rules

STORAGE = ("lost_updates", "v_underflow")  # rules on how weights and moments are stored
YOUNG = 20  # steps before which the rules say nothing: histories and moments still fill


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
        if unknown := sorted({key[0] for key in keys} - rules().keys()):
            raise RunError(
                f"the saved guard has looks at {', '.join(unknown)}, and there are rules for "
                f"{', '.join(rules())} only. Resume with the version of halfulp that wrote it."
            )
        self._looks = {
            (rule, block, backward): [(step, value) for step, value in looks]
            for rule, block, backward, looks in state["looks"]
        }
        self._warned = {(rule, block, backward) for rule, block, backward in state["warned"]}

    def _judge(self, step: int, reading: Reading) -> Finding | None:
        rule, key = rules()[reading.rule], (reading.rule, reading.block, reading.backward)
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


def _finding(reading: Reading, threshold: float, level: str) -> Finding:
    return Finding(
        reading.rule, reading.block, reading.place, reading.value, threshold, level,
        reading.backward,
    )  # fmt: skip
