"""The units that the guard watches and raises: blocks, joined where one GEMM computes several."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfulp.blocks import BlockMap


@dataclass(frozen=True)
class Units:
    """`of` maps every block to its unit; `blocks` every unit to its blocks.

    A unit has the name of its block. Blocks of a fused projection (GPT-2's c_attn computes qk and
    part of vo) can only change precision together: `layers.0.qk+vo`.
    """

    of: Mapping[str, str]
    blocks: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, str]  # parameter → unit

    @property
    def names(self) -> tuple[str, ...]:
        """All units, in the order of the model."""
        return tuple(self.blocks)

    def of_all(self, blocks: Iterable[str]) -> tuple[str, ...]:
        """The units of some blocks, each once."""
        return tuple(dict.fromkeys(self.of[block] for block in blocks if block in self.of))


def units_of(blocks: BlockMap) -> Units:
    """The units of a model."""
    groups: dict[str, tuple[str, ...]] = {block: (block,) for block in blocks.blocks}
    for gemm in blocks.gemms:
        joined = tuple(dict.fromkeys(b for part in gemm.parts for b in groups.get(part, (part,))))
        groups |= dict.fromkeys(joined, joined)
    names = {members: _name(members) for members in groups.values()}
    of = {block: names[members] for block, members in groups.items()}
    parameters = {name: of[block] for name, block in blocks.parameters.items()}
    return Units(of, {name: members for members, name in names.items()}, parameters)


def _name(members: tuple[str, ...]) -> str:
    """ "layers.0.qk", "layers.0.vo" → "layers.0.qk+vo"."""
    first, *others = members
    return "+".join([first, *(other.rpartition(".")[2] for other in others)])


class UnitSums:
    """Adds values of parameters up by unit; keeps the index of the last ones on their device."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self._index: tuple[list[str], Tensor] | None = None

    def add(self, names: list[str], values: Tensor) -> Tensor:
        """Sums [units], fp64, of `values`, one of each of the parameters `names`."""
        if self._index is None or self._index[0] != names:
            places = [self.units.names.index(self.units.parameters[name]) for name in names]
            self._index = names, torch.tensor(places, device=values.device)
        sums = torch.zeros(len(self.units.names), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self._index[1], values)
