"""The precision map of a guarded run as a policy for the next one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from halfulp.blocks import BlockMap, block_map
from halfulp.errors import RunError
from halfulp.guard.ladder import Ladder
from halfulp.policy import Policy
from halfulp.run import Run
from halfulp.train.loop import config_of
from halfulp.train.model import outline


@dataclass(frozen=True)
class PrecisionMap:
    """`policy` starts a run where the guard of another ended: its own where nothing stood higher.

    `raised` maps every block that ended above its own recipe to both, (own, raised).
    """

    policy: Policy
    raised: Mapping[str, tuple[str, str]]
    blocks: int  # of the model
    incidents: int


def precision_map(path: Path) -> PrecisionMap:
    """The map of the run at `path` after the last incident that its events tell of.

    A rule per raised block comes before the rules of the run's own policy; of the last one, where
    it had a schedule. RunError for what is no run or has no policy.toml.
    """
    run = Run.open(path, writer=False)
    incidents = list(run.events("guard"))
    policy, blocks = _policy(path), _blocks(path)
    ladder = Ladder(policy, blocks)
    own = ladder.map()
    if incidents:
        last = incidents[-1]
        higher = {block: last["map"][block] for block in last.get("above", ())}
        _put(ladder, higher)
    found = ladder.map()
    raised = {block: (own[block], found[block]) for block in ladder.above()}
    return PrecisionMap(
        policy=_named(ladder, policy) if raised else policy,
        raised=raised,
        blocks=len(blocks.blocks),
        incidents=len(incidents),
    )


def _put(ladder: Ladder, higher: Mapping[str, str]) -> None:
    """Raise the blocks, but for those that the policy of a last stage has as high already."""
    if len(higher) == len(ladder.blocks.blocks) and len(set(higher.values())) == 1:
        ladder.fallback = next(iter(higher.values()))
        return
    ladder.put(higher)
    ladder.rebase(ladder.base)


def _named(ladder: Ladder, policy: Policy) -> Policy:
    found = replace(ladder.policy(), name=f"{policy.name}_raised")
    found.resolve(ladder.blocks)
    return found


def _policy(path: Path) -> Policy:
    file = path / "policy.toml"
    if not file.is_file():
        raise RunError(
            f"{path} has no policy.toml, which `halfulp train` writes when a run begins. "
            "Put the policy of the run there."
        )
    return Policy.load(file)


def _blocks(path: Path) -> BlockMap:
    config = config_of(path)
    return block_map(outline(config.model), config.model.hints)
