"""Run directories as a training would write them, for reports: no model is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.run import Run

STEPS, LAYERS, EVERY = 500, 4, 20
LINEARS = {
    "qk": ("q_proj", "k_proj"),
    "vo": ("v_proj", "o_proj"),
    "ffn": ("gate_proj", "up_proj", "down_proj"),
}
OPERANDS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")

Share = Callable[
    [str, str, float], tuple[float, float]
]  # block, operand, progress → (mean, energy)


def config(recipe: str, **train: Any) -> dict[str, Any]:
    return {
        "model": {"preset": "llama-3m", "layers": LAYERS, "hidden": 0},
        "data": {"source": ["stdlib"], "tokenizer": "bytes", "length": 256},
        "train": {"steps": STEPS, "lr": 1e-3, "seed": 0, "betas": [0.9, 0.95], **train},
        "policy": {"recipe": recipe, "file": "", "carrier": "fp32"},
        "run": {"out": f"runs/{recipe}"},
    }


def blocks(layers: int = LAYERS) -> list[str]:
    return [f"layers.{i}.{kind}" for i in range(layers) for kind in LINEARS]


def loss_curve(steps: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(1, steps + 1)
    noise = rng.normal(0, 0.06, steps)
    return 2.15 + 3.4 * np.exp(-t / 12) + 1.6 * (1 + t / 25) ** -0.75 + noise


def write_run(
    path: Path,
    recipe: str,
    *,
    price: float = 0.0,
    scatter: float = 0.004,
    rows: Callable[[float, np.random.Generator], dict[str, list[dict[str, Any]]]] | None = None,
    steps: int | None = None,
    seed: int = 0,
    nan_at: int = 0,
    finish: bool = True,
    settings: dict[str, Any] | None = None,
    speed: float = 9000.0,
    sharp: Callable[[str, float], float] | None = None,
) -> Path:
    steps = STEPS if steps is None else steps
    rng = np.random.default_rng(hash_of(recipe) + seed)
    loss = loss_curve(STEPS, seed)
    t = np.arange(1, STEPS + 1)
    gap = price * (1 - np.exp(-t / 160)) / (1 - math.exp(-STEPS / 160))
    loss = loss + gap + rng.normal(0, scatter, STEPS)
    smooth = 2.22 + 3.4 * np.exp(-t / 12) + 1.6 * (1 + t / 25) ** -0.75
    asked = settings or config(recipe, seed=seed)
    command = ["halfulp", "train", "--recipe", recipe, "--steps", str(STEPS)]
    with Run.create(path, asked, command=command) as run:
        run.write("start", command=command, world=1, step=0)
        for step in range(1, steps + 1):
            value = math.nan if step == nan_at else float(loss[step - 1])
            run.write(
                "step",
                step=step,
                loss_nats=value,
                grad_norm=float(0.5 + 3 / step),
                lr=1e-3,
                tokens=2048 * step,
                seconds=2048 / speed,
            )
            if step == nan_at:
                run.write("nonfinite", step=step, what="loss", block="layers.2.ffn")
                break
            if step % 50 == 0 or step == STEPS:
                held_out = float(smooth[step - 1] + gap[step - 1] + rng.normal(0, scatter / 20))
                run.write(
                    "eval",
                    step=step,
                    loss_nats=held_out,
                    loss_nats_fp32=held_out - 0.25 * float(gap[step - 1]),
                    tokens=65536,
                )
            if sharp and step % EVERY == 0:
                run.write("sharpness", step=step, **sharpness_fields(sharp, step / STEPS, seed))
            if rows and step % EVERY == 0:
                run.write("counters", step=step, **rows(step / STEPS, rng))
        if nan_at or finish:
            done = nan_at or steps
            reason = "nonfinite" if nan_at else "finished"
            run.write("end", step=done, reason=reason)
            last = [event["loss_nats"] for event in run.events("eval")]
            run.summarize(
                name=path.name,
                recipe=recipe,
                steps=done,
                tokens=2048 * done,
                seconds=2048 * done / speed,
                tokens_per_second=speed,
                loss_nats=last[-1] if last else None,
                diverged=bool(nan_at),
                reason=reason,
                parameters=2_900_000,
                data={"digest": "f00d", "tokens": 31_000_000},
                policy=[["*", recipe, len(blocks()) * 2 + 1], ["head", "fp32", 1]],
            )
    return path


PARAMETERS = {"emb": 524288, "head": 524288, "qk": 131072, "vo": 131072, "ffn": 528384, "norm": 512}


def sharpness_of(block: str, progress: float) -> float:
    """Grows as in the paper: norms late, and QK below FFN only from a third of the run on."""
    kind = block.rpartition(".")[2]
    start, end = {
        "emb": (8e-4, 2e-4), "qk": (4e-4, 5e-4), "ffn": (2e-4, 9e-4), "vo": (1e-3, 4e-3),
        "norm": (3e-4, 2e-2), "head": (9e-4, 5e-4),
    }[kind]  # fmt: skip
    return start * (end / start) ** progress * (1 + 0.3 * layer_of(block))


def sharpness_fields(
    sharp: Callable[[str, float], float], progress: float, seed: int = 0
) -> dict[str, Any]:
    """The fields of one event `sharpness`, each value with 12 % of scatter."""
    rng = np.random.default_rng(round(1e6 * progress) + seed)
    norms = [f"layers.{i}.norm" for i in range(LAYERS)]
    return {
        "blocks": [
            {
                "block": block,
                "parameters": PARAMETERS[block.rpartition(".")[2]],
                "sharpness": sharp(block, progress) * float(rng.lognormal(0, 0.12)),
            }
            for block in ["emb", *blocks(), *norms, "norm", "head"]
        ],
        "draws": 1,
        "positions": 2048,
        "logits": {
            "sharpness": 0.05 + 0.06 * progress,
            "sharpness_centered": 0.05 + 0.04 * progress,
            "logz": 7.6 + 2 * progress,
            "positions": 2048,
        },
        "seconds": 0.2,
    }


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(text))


def gemm_rows(
    rng: np.random.Generator,
    form: str,
    underflow: Callable[[str, str], float],
    saturated: float = 0,
) -> list[dict[str, Any]]:
    rows = []
    for block in blocks():
        for linear in LINEARS[block.rpartition(".")[2]]:
            for operand in OPERANDS:
                n = 65536
                share = min(0.95, underflow(block, operand) * float(rng.lognormal(0, 0.25)))
                rows.append(
                    {
                        "block": block,
                        "gemm": f"{block}.{linear}",
                        "operand": operand,
                        "format": form,
                        "n": n,
                        "saturated": int(rng.poisson(saturated * n)) if saturated else 0,
                        "underflow": int(share * n),
                        "underflow_energy": share**2 * 1e-3,
                        "amax": 3.0,
                        "stale": 1.0,
                    }
                )
    return rows


def weight_rows(rng: np.random.Generator, form: str, lost: Callable[[str], float]) -> list[dict]:
    rows = []
    for block in ["emb", *blocks(), "norm", "head"]:
        for name in LINEARS.get(block.rpartition(".")[2], ("weight",)):
            n = 16384
            share = min(0.98, lost(block) * float(rng.lognormal(0, 0.08)))
            rows.append(
                {
                    "block": block,
                    "parameter": f"{block}.{name}.weight".replace("weight.weight", "weight"),
                    "weight_format": form,
                    "n": n,
                    "asked": n,
                    "lost_updates": int(share * n),
                    "lost_decay": 0,
                    "v_underflow": 0,
                    "update_rms": 1.0,
                }
            )
    return rows


def layer_of(block: str) -> int:
    return int(block.split(".")[1]) if block.startswith("layers.") else 0


def bf16_rows(progress: float, rng: np.random.Generator) -> dict[str, list[dict]]:
    def lost(block: str) -> float:
        base = {"qk": 0.88, "vo": 0.72, "ffn": 0.74, "norm": 0.97, "emb": 0.36}
        return base.get(block.rpartition(".")[2], 0.52) * (0.45 + 0.7 * progress)

    return {"gemms": [], "optimizer": weight_rows(rng, "bf16:nearest", lost)}


def bf16_sr_rows(progress: float, rng: np.random.Generator) -> dict[str, list[dict]]:
    return {"gemms": [], "optimizer": weight_rows(rng, "bf16:stochastic", lambda _: 0.0)}


def current_rows(progress: float, rng: np.random.Generator) -> dict[str, list[dict]]:
    def share(block: str, operand: str) -> float:
        return 2e-4 * (1 + layer_of(block)) * (20 if operand.endswith(".g") else 1)

    return {"gemms": gemm_rows(rng, "e4m3@tensor:current", share), "optimizer": []}


def unscaled_rows(progress: float, rng: np.random.Generator) -> dict[str, list[dict]]:
    def share(block: str, operand: str) -> float:
        deep = 0.55 - 0.09 * layer_of(block)
        return deep * (0.7 + 0.5 * progress) if operand.endswith(".g") else 0.01

    rows = gemm_rows(rng, "e4m3", share, saturated=2e-6 * (1 + 40 * progress))
    return {"gemms": rows, "optimizer": []}


def nvfp4_rows(progress: float, rng: np.random.Generator) -> dict[str, list[dict]]:
    def share(block: str, operand: str) -> float:
        return 0.03 if operand.endswith(".g") else 0.02

    return {"gemms": gemm_rows(rng, "e2m1@1x16:nvfp4", share), "optimizer": []}


def six_runs(root: Path) -> list[Path]:
    return [
        write_run(root / "fp32", "fp32", scatter=0.0, speed=11800),
        write_run(root / "bf16_weights", "bf16_weights", price=0.21, rows=bf16_rows),
        write_run(
            root / "bf16_weights_sr", "bf16_weights_sr", price=0.002, rows=bf16_sr_rows, speed=10400
        ),
        write_run(root / "te_current", "te_current", price=0.003, rows=current_rows, speed=10900),
        write_run(root / "fp8_unscaled", "fp8_unscaled", price=0.29, rows=unscaled_rows),
        write_run(root / "nvfp4", "nvfp4", price=0.0085, scatter=0.02, rows=nvfp4_rows, speed=7900),
    ]


def act(step: int, action: str, to: int = -1, **more: Any) -> dict[str, Any]:
    """An incident as the guard records it, with a verdict that fits its action."""
    units = more.pop("units", ["layers.1.ffn"])
    held = action in ("retry", "skip", "roll back", "stop")
    to = to if to >= 0 else step - held
    verdict = {"skip": "data", "roll back": "state or learning rate", "stop": "could not tell"}
    fields: dict[str, Any] = {
        "step": step,
        "trigger": "spike" if held else "numeric",
        "onset": step,
        "signals": {"z loss": 31.9, "z log norm": 11.1},
        "verdict": verdict.get(action, "precision"),
        "units": units,
        "evidence": {
            "same arithmetic": {"loss": 5.25, "norm": 82.2},
            "reference": {"loss": 2.31, "norm": 0.9},
            "excess": 2.94,
        },
        "rows": [
            {"unit": unit, "gain": 2.5 / k, "gradient_error": 0.7 / k, "growth": 9.0 / k}
            for k, unit in enumerate([*units, "layers.0.vo"], 1)
        ],
        "margin": 2.0,
        "level": 1,
        "action": action,
        "to": to,
        "done": [f"what was done at {step}"],
        "raised": {},
        "cost": {"withheld": float(held), "passes": 6.0, "replayed": float(step - held - to)},
        "above": {},
    }
    return fields | more


def write_guarded(
    path: Path,
    recipe: str,
    acts: list[dict[str, Any]],
    *,
    steps: int = STEPS,
    settings: dict[str, Any] | None = None,
    rows: Callable[[float, np.random.Generator], dict[str, list[dict[str, Any]]]] | None = None,
) -> Path:
    """A run whose guard does `acts`, in this order; `above` of an act: the blocks that stand higher
    after it, and their recipes. A rollback is followed by the same steps with another loss."""
    asked = {**config(recipe), **(settings or {}), "guard": {"on": True}}
    rng, loss, waiting = np.random.default_rng(7), loss_curve(steps), list(acts)
    every = ["emb", *blocks(), "norm", "head"]
    with Run.create(path, asked, command=["halfulp", "train"]) as run:
        run.write("start", command=["halfulp", "train"], world=1, step=0)
        step, reason = 0, "finished"
        while step < steps:
            held = bool(waiting) and waiting[0]["step"] == step + 1
            if held and waiting[0]["cost"]["withheld"]:
                incident = waiting.pop(0)
                step = _write_incident(run, incident, recipe, every)
                if incident["action"] == "stop":
                    reason = "stopped"
                    break
                continue
            step += 1
            value = float(loss[step - 1] + rng.normal(0, 0.03))
            run.write(
                "step", step=step, loss_nats=value, grad_norm=float(0.5 + 3 / step), lr=1e-3,
                tokens=2048 * step, seconds=0.2,
            )  # fmt: skip
            if step % 50 == 0:
                run.write("eval", step=step, loss_nats=value, loss_nats_fp32=value, tokens=65536)
            if rows and step % EVERY == 0:
                run.write("counters", step=step, **rows(step / steps, rng))
            while waiting and waiting[0]["step"] == step and not waiting[0]["cost"]["withheld"]:
                _write_incident(run, waiting.pop(0), recipe, every)
        run.write("end", step=step, reason=reason)
        run.summarize(
            name=path.name, recipe=recipe, steps=step, tokens=2048 * step, reason=reason,
            tokens_per_second=9000.0, diverged=reason == "stopped",
        )  # fmt: skip
    return path


def _write_incident(run: Run, act: dict[str, Any], recipe: str, every: list[str]) -> int:
    higher = act["above"]
    run.write("guard", **{**act, "above": list(higher)}, map=dict.fromkeys(every, recipe) | higher)
    return act["to"]


def thirty_acts() -> list[dict[str, Any]]:
    """Thirty incidents of all kinds, some of them close together, with blocks going up and down."""
    acts, higher, names = [], dict[str, str](), blocks()
    for k in range(28):
        step = 100 + 13 * k + (k % 3) * 2
        kind = ("raise", "skip", "retry", "raise", "roll back")[k % 5]
        if kind in ("raise", "retry"):
            block = names[k % len(names)]
            rung = ("te_current", "te_current_forward_bf16_amp", "bf16_amp")[k % 3]
            higher = {**higher, block: rung}
        to = {"to": step - 40} if kind == "roll back" else {}
        acts.append(act(step, kind, above=dict(higher), units=[names[k % len(names)]], **to))
    acts.append(act(484, "lower", above=dict(list(higher.items())[:-2])))
    acts.append(act(490, "stop", above=dict(list(higher.items())[:-2]), units=names))
    return acts
