"""A plan as JSON: everything it says, in plain numbers with their units in the names."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from halfulp.plan.budget import Plan
from halfulp.plan.facts import Facts
from halfulp.plan.options import Option


def to_json(plan: Plan, facts: Facts | None = None, *, command: str = "") -> str:
    """The plan as JSON text; what is not known is null."""
    kind, amount = plan.budget
    law = plan.law.law
    table = {
        "kind": "plan",
        "command": command,
        "budget": {kind: amount},
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "days": plan.days,
        "mfu": plan.mfu,
        "price": None if plan.price is None else asdict(plan.price),
        "law": {
            "name": law.name,
            "formula": law.formula,
            "coefficients": dict(law.coefficients),
            "source": law.source,
        },
        "chosen": _option(plan.chosen),
        "why": plan.why,
        "options": [_option(option) for option in plan.options],
        "comparisons": [asdict(c) | {"verdict": c.verdict} for c in plan.comparisons],
        "refused": dict(plan.refused),
        "doubled": _option(plan.doubled),
        "doubled_unique_gain_nats": plan.doubled_unique_nats,
        "lr": plan.lr,
        "batch_tokens": plan.batch_tokens,
        "rates": [asdict(rates) for rates in plan.rates],
        "memory": asdict(plan.memory) | {"verdict": plan.memory.verdict},
        "shape": asdict(plan.shape),
        "served_tokens": plan.served_tokens,
        "corpus": None if facts is None else asdict(facts),
        "flags": list(plan.flags),
        "notes": list(plan.notes),
    }
    return json.dumps(_finite(table), indent=1)


def _option(option: Option) -> dict[str, Any]:
    more = {"tokens_per_parameter": option.tokens_per_parameter, "epochs": option.epochs}
    return asdict(option) | more


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
