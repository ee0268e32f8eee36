"""What the counters of GEMM operands and of the optimizer say, as readings of numeric signals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfulp.block_names import block_type
from halfulp.numerics.quantizer import parse_quantizer

_SAME_NAME = ("stale", "underflow", "underflow_energy")  # counters that are signals as they are


@dataclass(frozen=True)
class Reading:
    """One signal of one block; `place` names the GEMM operand, the parameter or the module."""

    rule: str
    block: str
    place: str
    value: float
    backward: bool = False  # the operand belongs to dgrad or wgrad


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
