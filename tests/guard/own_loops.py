"""A training loop as users write it, over a language with something to learn in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import halfulp
from halfulp.guard import detect, loop, withheld
from halfulp.guard.calls import loss_in

ROWS, LENGTH, VOCAB = 4, 16, 64


def act_early(monkeypatch: Any) -> None:
    """Windows are active after 24 steps, numeric rules after 2, so that tests are short."""
    monkeypatch.setattr(detect, "ACTIVE", 24)
    monkeypatch.setattr(withheld, "ACTIVE", 24)
    monkeypatch.setattr(loop, "YOUNG", 2)


def batches(count: int, *, seed: int = 1, rows: int = ROWS) -> list[Tensor]:
    """Batches [rows, LENGTH] of a language in which one of four tokens follows each token."""
    follow = torch.randint(0, VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(0))
    chance, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        text = torch.randint(0, VOCAB, (rows, 1), generator=chance)
        while text.shape[1] < LENGTH:
            turn = torch.randint(0, 4, (rows,), generator=chance)
            text = torch.cat([text, follow[text[:, -1], turn][:, None]], 1)
        found.append(text)
    return found


def noise() -> Tensor:
    """A batch that is no language."""
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


@cache
def trained() -> dict[str, Tensor]:
    """Weights after 300 steps, where the loss is flat."""
    model = _fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(300, seed=7, rows=8):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: t.clone() for name, t in model.state_dict().items()}


def model_trained() -> nn.Module:
    model = _fresh()
    model.load_state_dict(trained())
    return model


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return loss_in(model(input_ids=batch, labels=batch))


@dataclass
class Loop:
    """A model, its optimizer and scheduler, and a guard if asked for; `run` trains."""

    policy: str | None = None
    guarded: bool = True
    accumulate: int = 1
    summed: bool = False  # micro-batches' losses are not divided by their number
    lr: float = 1e-3
    before: Callable[["Loop", int], object] = lambda loop, step: None  # each (1-based) step
    make: Callable[[], nn.Module] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    answers: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.make() if self.make else model_trained()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        rate = lambda step: 1 / (1 + step / 50)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.events: list[dict[str, Any]] = []
        self.guard: Any = None
        if self.guarded:
            options = {"also": [self.scheduler], "log": self.events.append, **self.options}
            self.guard = halfulp.Guard(self.model, self.optimizer, policy=self.policy, **options)
        elif self.policy:
            halfulp.quantize(self.model, self.policy)

    def run(self, data: Sequence[Tensor]) -> "Loop":
        for i in range(0, len(data), self.accumulate):
            self.before(self, len(self.answers) + 1)
            self.step(data[i : i + self.accumulate])
        return self

    def step(self, micro: Sequence[Tensor]) -> None:
        total = 0.0
        for batch in micro:
            loss = loss_of(self.model, batch)
            (loss if self.summed else loss / len(micro)).backward()
            total = total + loss.detach() / len(micro)
        self.answers.append(self.guard is None or self.guard.step(total))
        if self.answers[-1]:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()

    @property
    def withheld(self) -> list[int]:
        """The (1-based) steps after which no update was made."""
        return [i + 1 for i, answer in enumerate(self.answers) if not answer]

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights and moments."""
        found = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for i, p in enumerate(self.model.parameters()):
            found |= {f"{i}/{k}": v.clone() for k, v in self.optimizer.state[p].items()}
        return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.up_proj(x).relu())


class Tiny(nn.Module):
    """Two feed-forward layers: what follows a token depends on it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        return {"loss": loss}


def llama() -> nn.Module:
    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    config = ModelConfig(preset="llama-tiny", hidden=32)
    return build_model(config, vocab=VOCAB, length=LENGTH, seed=0).model.train()


def _fresh() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()
