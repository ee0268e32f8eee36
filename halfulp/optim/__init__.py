"""Optimizers whose weights and moments live in low precision."""

from halfulp.optim.adamw import AdamW
from halfulp.optim.groups import param_groups

__all__ = ["AdamW", "param_groups"]
