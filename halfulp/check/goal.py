"""What the verdict of a check is about: a program of PyTorch's, a policy, or the plan alone."""

from dataclasses import dataclass
from pathlib import Path

from halfulp.blocks import BlockMap
from halfulp.check.judge import Asked, judge_policy, judge_program, traced
from halfulp.check.prices import Prices
from halfulp.check.report import Row
from halfulp.check.targets import PolicyTarget, is_program, load_target
from halfulp.check.trace import Trace, trace
from halfulp.policy import Policy


@dataclass(frozen=True)
class Goal:
    """The target, made ready; `bf16` is what a run in bf16 rounds, whatever the target."""

    name: str  # "": there is no target
    policy: PolicyTarget | None
    ran: Trace | None  # of a program
    bf16: Trace

    @property
    def programs(self) -> tuple[str, ...]:
        """The program by name, if it is one."""
        return (self.name,) if self.ran else ()

    @property
    def rounded(self) -> frozenset[str]:
        """The sites that bf16 or the target rounds."""
        found = self.bf16.names | (self.ran.names if self.ran else frozenset())
        if self.policy is not None:
            tables = self.policy.tables
            found |= {f"weight:{module}.{p}" for module in tables for p in ("weight", "bias")}
            found |= {f"weight:{name}" for name in self.policy.weights}
        return found

    @property
    def words(self) -> tuple[str, ...]:
        """The formats of the target."""
        if self.policy is not None:
            return tuple(self.policy.words)
        return (self.ran.format,) if self.ran else ()

    def judge(self, asked: Asked, prices: Prices) -> Row | None:
        """The target predicted and measured; None without one."""
        if self.ran is not None:
            return judge_program(asked, prices, self.ran)
        if self.policy is not None:
            return judge_policy(asked, prices, self.policy, self.name)
        return None


def goal_of(asked: Asked, target: str | Path | Policy | None, blocks: BlockMap) -> Goal:
    """`target` loaded, and run once where it is a program; errors as in halfulp.check."""
    name = "" if target is None else str(getattr(target, "name", target))
    program = isinstance(target, str) and is_program(target)
    policy = None if target is None or program else load_target(asked.model, target, blocks)
    asked.say("pricing")
    bf16 = trace(asked.model, asked.batch, "bf16", hints=asked.hints, attention=asked.attention)
    return Goal(name, policy, traced(asked, name, bf16) if program else None, bf16)
