"""The precision in force during a run: policy stages, the quantized model and its optimizer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from halfulp.errors import PolicyError
from halfulp.numerics.quantizer import Quantizer
from halfulp.optim import AdamW, param_groups
from halfulp.policy import Policy, Resolution
from halfulp.quantization import Quantized, quantize, resolve
from halfulp.recipe import LossScale
from halfulp.train.config import PolicySection, Stage, TrainConfig
from halfulp.train.schedule import stage_at

# Growing back from here takes no more than a few intervals; more skips in a row are a divergence.
MOST_SKIPS = 40


@dataclass
class Scaler:
    """Dynamic loss scaling; without a rule the scale stays 1 and nothing is ever skipped."""

    rule: LossScale | None
    scale: float = 1.0
    good: int = 0  # finite steps since the last change
    skipped: int = 0  # skipped steps in a row

    def __post_init__(self) -> None:
        if self.rule is not None:
            self.scale = float(self.rule.init)

    @property
    def may_skip(self) -> bool:
        return self.rule is not None and self.skipped < MOST_SKIPS

    def update(self, *, finite: bool) -> bool:
        """Grow after `interval` finite steps, back off after another; True if the scale changed."""
        if self.rule is None:
            return False
        before = self.scale
        self.good = self.good + 1 if finite else 0
        self.skipped = 0 if finite else self.skipped + 1
        if not finite:
            self.scale *= self.rule.backoff
        elif self.good == self.rule.interval:
            self.scale, self.good = self.scale * self.rule.growth, 0
        return self.scale != before

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load(self, state: Mapping[str, float]) -> None:
        """The inverse of `state`."""
        self.scale, self.good = float(state["scale"]), int(state["good"])
        self.skipped = int(state["skipped"])


@dataclass
class Precision:
    """One model under the policy of its stage. `start` quantizes, `optimize` builds the optimizer.

    The two are apart because sharding comes between them.
    """

    model: nn.Module
    config: TrainConfig
    policies: tuple[Policy, ...]
    hints: Mapping[str, str]
    lr_types: Mapping[str, str] | None = None  # parameter → type with a learning rate of its own
    stage: int = 0
    handle: Quantized = field(init=False)
    optimizer: AdamW = field(init=False)
    scaler: Scaler = field(init=False)
    gradient_quantizers: Mapping[str, Quantizer] = field(init=False)  # only where not fp32

    def start(self, step: int) -> None:
        """Quantize the plain model for the 0-based `step`, and check the policies of all stages."""
        section, self.stage = self.config.policy, self._stage_at(step)
        for policy in self.policies:
            self._resolve(policy)
        self.handle = quantize(
            self.model,
            self.policies[self.stage],
            seed=self.config.train.seed,
            carrier=section.carrier,
            hints=self.hints,
            allow_partial=section.allow_partial,
        )
        self._read_recipes()

    def optimize(self) -> None:
        """Build the optimizer that stores each block's weights as its recipe says."""
        train = self.config.train
        groups = param_groups(
            self.model, self.handle.resolution, train.weight_decay, lr_types=self.lr_types
        )
        self.optimizer = AdamW(
            groups,
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            seed=train.seed,
        )

    def enter(self, step: int) -> bool:
        """Go over to the policy of the 0-based `step`; True if that is another one."""
        stage = self._stage_at(step)
        if stage == self.stage:
            return False
        self.stage = stage
        self.put(self.policies[stage])
        return True

    def put(self, policy: Policy) -> None:
        """Put `policy` in force between two steps; weights, moments and counts stay."""
        scaler = self.scaler
        self.handle.switch(self._resolve(policy))
        self._read_recipes()
        if scaler.rule == self.scaler.rule:
            self.scaler = scaler
        states = self.optimizer.state
        self.optimize()
        for parameter, state in states.items():
            self.optimizer.state[parameter] = state

    @property
    def starts_at(self) -> int:
        """The 0-based step at which the stage in force begins."""
        steps, before = self.config.train.steps, self.config.policy.schedule[: self.stage]
        return before[-1].last_step(steps) if before else 0

    @property
    def name(self) -> str:
        """Recipe or policy file of the stage in force."""
        return name_of((*self.config.policy.schedule, self.config.policy)[self.stage])

    def resolutions(self) -> tuple[Resolution, ...]:
        """What the policy of each stage decides."""
        return tuple(map(self._resolve, self.policies))

    def _resolve(self, policy: Policy) -> Resolution:
        partial = self.config.policy.allow_partial
        return resolve(self.model, policy, hints=self.hints, allow_partial=partial)

    def _stage_at(self, step: int) -> int:
        return stage_at(step, self.config.train.steps, self.config.policy.schedule)

    def _read_recipes(self) -> None:
        self.scaler = Scaler(loss_scale_of(self.handle.resolution))
        parameters = self.handle.resolution.parameters.items()
        quantizers = {name: recipe.gradient for name, recipe in parameters}
        self.gradient_quantizers = {n: q for n, q in quantizers.items() if not q.is_identity}


def load_policies(section: PolicySection) -> tuple[Policy, ...]:
    """One policy per stage, the last for the rest of the run; PolicyError as Policy.load."""
    return tuple(_load(stage) for stage in (*section.schedule, section))


def name_of(section: PolicySection | Stage) -> str:
    """The recipe's name, or the policy file's path; "fp32" where neither is given."""
    return section.recipe or section.file or "fp32"


def digest_of(policies: Sequence[Policy]) -> str:
    """sha256 of the policies' text: equal digests mean equal arithmetic."""
    return hashlib.sha256("\0".join(p.to_toml() for p in policies).encode()).hexdigest()


def loss_scale_of(resolution: Resolution) -> LossScale | None:
    """The one loss-scaling rule of a run; PolicyError if its recipes ask for two."""
    scaled = [recipe for recipe in resolution.recipes if recipe.loss_scale is not None]
    rules = {recipe.loss_scale for recipe in scaled}
    if len(rules) > 1:
        names = ", ".join(recipe.name for recipe in scaled)
        raise PolicyError(
            f"recipes {names} scale the loss by different rules, and a run has one loss. "
            "Use one of them for all blocks that need loss scaling."
        )
    return rules.pop() if rules else None


def _load(section: PolicySection | Stage) -> Policy:
    return Policy.load(section.file) if section.file else Policy.from_recipe(name_of(section))
